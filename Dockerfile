# jaxserve on NVIDIA GPUs; port 80 and /data as TGI's image has them:
#   docker run --gpus all --shm-size 1g -p 8080:80 -v $PWD/data:/data jaxserve --model-id Qwen/Qwen3-0.6B
# Not built by the project's tests: there is no Docker engine where they run.
#
# An image that holds the compiled programs of a model, so that its containers start without compiling; made where the GPU is:
#   docker run --gpus all --user root --name compiled jaxserve compile --model-id Qwen/Qwen3-0.6B --compilation-cache-dir /opt/xla
#   docker commit --change 'ENV COMPILATION_CACHE_DIR=/opt/xla' --change 'USER jaxserve' --change 'ENTRYPOINT ["jaxserve"]' --change 'CMD []' compiled jaxserve-qwen3
# The servers take the same flags as `compile` did, of the model and the engine; what fits a GPU of another size is compiled anew.
#
# CUDA's own libraries come with the locked Python packages; of the base image only the driver's hooks are used.
FROM nvidia/cuda:12.9.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/jaxserve
COPY requirements/cuda12.txt requirements/
RUN python3.12 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --require-hashes --requirement requirements/cuda12.txt
COPY pyproject.toml README.md ./
COPY jaxserve jaxserve
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

# /data keeps downloaded models and compiled programs. A folder mounted over it must be writable for this user, or run with --user.
RUN useradd --no-create-home --uid 10001 jaxserve && mkdir /data && chown jaxserve /data
USER jaxserve
VOLUME /data
ENV PATH=/opt/jaxserve/.venv/bin:$PATH \
    HOME=/data \
    HF_HOME=/data \
    JAXSERVE_CACHE=/data/jaxserve \
    PYTHONUNBUFFERED=1 \
    PORT=80
EXPOSE 80
# Docker lets every user bind port 80 inside a container; where a runtime does not, set PORT to a number above 1023.
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health')"]
ENTRYPOINT ["jaxserve"]
