"""vLLM's flags by the name that they have here, so that an error can name it; none of them is accepted."""

# Without dashes in front: vLLM's name, ours.
OUR_NAMES = {
    "allowed-origins": "cors-allow-origin",
    "api-server-count": "http-workers",
    "attention-backend": "attention",
    "block-size": "page-size",
    "data-parallel-size": "mesh",
    "download-dir": "huggingface-hub-cache",
    "enable-prefix-caching": "prefix-caching",
    "gpu-memory-utilization": "cuda-memory-fraction",
    "host": "hostname",
    "max-logprobs": "max-top-n-tokens",
    "max-model-len": "max-total-tokens",
    "max-num-batched-tokens": "max-batch-prefill-tokens",
    "max-num-seqs": "max-batch-size",
    "model": "model-id",
    "quantization": "quantize",
    "tensor-parallel-size": "mesh",
    "uvicorn-log-level": "log-level",
}
