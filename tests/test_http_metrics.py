"""/metrics: names that routers and dashboards read, with values that add up."""

import json
import re
from pathlib import Path

import pytest
from live_front_end import LiveFrontEnd
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.metrics import BulkHistogram, Metrics
from jaxserve.request import STEP_TIME_BOUNDS, EngineInfo, EngineStats
from jaxserve.rpc.client import EngineClient


def _values(text: str) -> dict[str, float]:
    """Value of each sample by name; labels but `model_name` behind it."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            values[sample.name + (str(sorted(labels.items())) if labels else "")] = sample.value
    return values


def test_requests_are_counted_once(front_end: LiveFrontEnd):
    before = _values(front_end.client.get("/metrics").text)
    body = {"prompt": "abcdef", "temperature": 0, "max_tokens": 4}
    assert front_end.client.post("/v1/completions", json={**body, "stream": True}).status_code == 200
    assert front_end.client.post("/v1/completions", json={**body, "max_tokens": 100}).status_code == 200
    assert front_end.client.post("/generate", json={"inputs": "", "parameters": {}}).status_code == 422
    after = _values(front_end.client.get("/metrics").text)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("tgi_request_count") == grown("tgi_request_success") == 2
    assert grown("tgi_request_failure[('err', 'validation')]") == 1
    assert grown("vllm:request_success_total[('finished_reason', 'length')]") == 1
    assert grown("vllm:request_success_total[('finished_reason', 'stop')]") == 1
    assert grown("vllm:time_to_first_token_seconds_count") == 2
    assert grown("vllm:e2e_request_latency_seconds_count") == 2
    assert grown("vllm:request_generation_tokens_sum") == 4 + 7
    assert grown("vllm:request_prompt_tokens_sum") == 12
    assert grown("vllm:inter_token_latency_seconds_count") == 3 + 6
    assert grown("tgi_request_generated_tokens_sum") == 11


def test_engines_are_told_by_replica(tmp_path: Path):
    info = EngineInfo("m", "", "", 10, 20, 19, (1,), 16, 50, "2x1", "float32", "cpu", {})
    clients = [EngineClient(tmp_path / "a", 0), EngineClient(tmp_path / "b", 1)]
    clients[0].available, clients[0].info = True, info
    clients[0].stats = EngineStats(num_running=3, num_waiting=2, num_pages_used=25, num_pages=50, prompt_tokens=100, padded_tokens=7)
    counts = [0] * (len(STEP_TIME_BOUNDS) + 1)
    counts[1], counts[3], counts[-1] = 4, 2, 1
    clients[1].stats = EngineStats(num_running=9, prompt_tokens=5, device_seconds=1.5, device_counts=tuple(counts))
    text = Metrics(clients, "served").exposition().decode()
    values = _values(text)
    one, two = "[('replica', '0')]", "[('replica', '1')]"
    assert values["jaxserve_requests_running" + one] == 3
    assert values["jaxserve_requests_running" + two] == 0  # it is down
    assert values["vllm:prompt_tokens_total" + two] == 5
    assert values["jaxserve_kv_cache_usage" + one] == 0.5
    assert values["jaxserve_padded_tokens_total" + one] == 7
    device, bucket = (
        "[('part', 'device'), ('replica', '1')]",
        "jaxserve_step_seconds_bucket[('le', '{}'), ('part', 'device'), ('replica', '1')]",
    )
    assert (values["jaxserve_step_seconds_sum" + device], values["jaxserve_step_seconds_count" + device]) == (1.5, 7)
    assert [values[bucket.format(le)] for le in (*STEP_TIME_BOUNDS[:5], "+Inf")] == [0, 4, 4, 6, 6, 7]
    assert values["jaxserve_step_seconds_count" + device.replace("device", "collect")] == 0  # nothing told yet
    assert (values["jaxserve_engine_up" + one], values["jaxserve_engine_up" + two]) == (1, 0)
    assert (values["tgi_queue_size"], values["tgi_batch_current_size"]) == (2, 3)
    assert values["tgi_batch_current_max_tokens"] == 25 * 16
    assert values["tgi_batch_forward_duration_count[('method', 'decode')]"] == 7
    assert "tgi_batch_inference_count[('method', 'decode')]" in values
    assert 'vllm:num_requests_waiting{model_name="served"} 2.0' in text


def test_routers_find_one_value_of_all_replicas(tmp_path: Path):
    """As the Gateway API Inference Extension, llm-d and vLLM's production stack read it: of several samples of a name they take any."""
    info = EngineInfo("m", "", "", 10, 20, 19, (1,), 16, 50, "3x1", "float32", "cpu", {})
    clients = [EngineClient(tmp_path / str(replica), replica) for replica in range(3)]
    for client, running, used in zip(clients, (3, 4, 9), (10, 30, 50), strict=True):
        client.info, client.available = info, client.replica < 2
        client.stats = EngineStats(
            num_running=running, num_waiting=running + 1, num_pages_used=used, num_pages=50, prefix_queries=100, prefix_hits=running
        )
    families = {family.name: family for family in text_string_to_metric_families(Metrics(clients, "served").exposition().decode())}
    expected = {
        "vllm:num_requests_running": 7,
        "vllm:num_requests_waiting": 9,
        "vllm:kv_cache_usage_perc": 0.4,
        "vllm:gpu_cache_usage_perc": 0.4,
        "vllm:gpu_prefix_cache_queries": 300,
        "vllm:gpu_prefix_cache_hits": 16,
        "vllm:cache_config_info": 1,
    }
    for name, value in expected.items():
        (sample,) = families[name].samples
        assert (sample.value, sample.labels["model_name"], "replica" in sample.labels) == (value, "served", False), name
    (cache,) = families["vllm:cache_config_info"].samples
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"]) == ("16", "150")
    (lora,) = families["vllm:lora_requests_info"].samples
    assert lora.labels["max_lora"] == "0" and lora.labels["running_lora_adapters"] == lora.labels["waiting_lora_adapters"] == ""
    assert {families[name].type for name in list(expected)[:4]} == {"gauge"}


def test_the_dashboard_asks_for_what_there_is(front_end: LiveFrontEnd):
    assert front_end.client.post("/generate", json={"inputs": "a", "parameters": {}}).status_code == 200
    assert front_end.client.post("/generate", json={"inputs": "", "parameters": {}}).status_code == 422
    exposed = set(re.findall(r"^([\w:]+)", front_end.client.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads((Path(__file__).parent.parent / "deploy" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    names = {name for expr in asked for name in re.findall(r"(?:vllm:|tgi_|jaxserve_)\w+", expr)}
    assert len(names) > 20 and names <= exposed, names - exposed


def test_many_observations_at_once():
    one, many = (BulkHistogram(name, "x", buckets=(0.1, 0.2, 0.4), registry=None) for name in ("one", "many"))
    values = [0.05, 0.1, 0.15, 0.4, 7.0]
    for value in values:
        one.observe(value)
    many.observe_many(values)
    assert [sample.value for sample in next(iter(one.collect())).samples] == pytest.approx(
        [sample.value for sample in next(iter(many.collect())).samples]
    )
