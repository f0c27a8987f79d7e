"""jaxserve in Ray Serve: a real local Ray and two replicas, each with a real engine on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from few_programs import Precompiled

pytest.importorskip("ray.serve", reason="Ray is an extra: pip install jaxserve[ray]")

# A process of its own: Ray leaves threads, handlers and warnings behind.
SCRIPT = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import httpx, ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

folder, cache, temporary, port = json.load(sys.stdin)
few_programs = {"max_batch_size": 1, "max-batch-prefill-tokens": 32, "max_total_tokens": "240", "disable_grammar_support": True}
arguments = {"model_id": folder, "compilation_cache_dir": cache, "num_gpus": 0, **few_programs}
told = {}
def deploy(num_replicas):  # what `serve deploy` does with a config file, and Kubernetes' RayService
    llm = {"name": "llm", "import_path": "jaxserve.integrations.ray_serve:app", "args": arguments}
    schema = ServeDeploySchema(applications=[{**llm, "deployments": [{"name": "jaxserve", "num_replicas": num_replicas}]}])
    _get_global_client().deploy_apps(schema)
def states():
    deployments = serve.status().applications["llm"].deployments
    return deployments["jaxserve"].replica_states if "jaxserve" in deployments else {}
def wait_for(num_replicas):
    while states() != {"RUNNING": num_replicas}:
        assert serve.status().applications["llm"].status != "DEPLOY_FAILED", serve.status()
        time.sleep(0.3)
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=temporary, log_to_driver=False)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deploy(1)
    wait_for(1)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    told["alone"] = client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    deploy(2)  # scaled to two, and the first goes on
    told["meanwhile"] = [client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]]
    wait_for(2)
    told["stream"] = client.post("/v1/completions", json={**body, "stream": True}).text
    told["bad"] = client.post("/v1/completions", json={**body, "n": 0}).status_code
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: client.post("/v1/completions", json=body), range(24)))
    told["together"] = [answer.json()["choices"][0]["token_ids"] for answer in answers]
    told["work"] = {}
    deadline = time.monotonic() + 60
    while (len(told["work"]) < 2 or sum(told["work"].values()) < 8 * 27) and time.monotonic() < deadline:
        # Ray decides which replica answers, for up to 10 s by queue lengths it remembers: one request after another can all go to one.
        # And an engine tells its front end of its counters once a second.
        with ThreadPoolExecutor(8) as threads:
            pages = list(threads.map(lambda _: client.get("/metrics").text.splitlines(), range(16)))
        for lines in pages:
            values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
            (tokens,) = [value for name, value in values.items() if name.startswith("vllm:generation_tokens_total")]
            (identity,) = [value for name, value in values.items() if name.startswith("vllm:e2e_request_latency_seconds_sum")]
            told["work"][identity] = tokens
finally:
    serve.shutdown()
    ray.shutdown()
json.dump(told, sys.stdout)
"""


def test_a_local_ray_scales_to_two_replicas(tiny_checkpoint: Callable[[str], Path], few_programs: Precompiled):
    import socket
    import tempfile

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:  # Ray's sockets are in it: their names must be short
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            input=json.dumps([str(tiny_checkpoint("llama")), str(few_programs.folder), temporary, port]),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert len(told["alone"]) == 8 and told["together"] == [told["alone"]] * 24
    assert told["bad"] == 400
    *events, done, _ = told["stream"].split("\n\n")
    assert done == "data: [DONE]" and len(events) >= 8
    streamed = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [token for choice in streamed for token in choice["token_ids"]] == told["alone"]
    assert told["meanwhile"] == [told["alone"]]
    # All tokens are there: the first replica was not started anew.
    assert len(told["work"]) == 2 and min(told["work"].values()) > 0 and sum(told["work"].values()) == 8 * (1 + 1 + 1 + 24)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"max_batch_size": "many"}, "whole number"),
        ({"unknown": 1}, "--unknown"),
        ({"mesh": "2x1"}, "num_replicas=2"),
        ({"port": 80}, "port is Ray Serve's"),
        ({"mesh": "1x2", "num_hosts": 2, "host_index": 0, "coordinator": "127.0.0.1:5000"}, "one host"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_gpus": "x"}, "num_gpus"),
    ],
)
def test_bad_arguments_are_one_line(arguments: dict[str, object], part: str):
    from jaxserve.integrations.ray_serve import app

    with pytest.raises(ValueError, match=part) as error:
        app(arguments)
    assert "\n" not in str(error.value)


def test_a_replica_asks_for_its_gpus():
    from jaxserve.integrations.ray_serve import app

    for arguments, gpus in (({"mesh": "1x4"}, 4), ({"num-shard": 2}, 2), ({"num_gpus": 0}, 0)):
        deployment = app(arguments)._bound_deployment
        assert (deployment.ray_actor_options or {})["num_gpus"] == gpus and deployment.max_ongoing_requests == 1024
