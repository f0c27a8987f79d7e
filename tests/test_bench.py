"""Benchmarks: their definitions, their workloads, and their figures against a server with known timing."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer

from jaxserve import cli
from jaxserve.bench.figures import RequestFigures, spread, summarize
from jaxserve.bench.options import LatencyOptions, ServeOptions, ThroughputOptions, WorkloadOptions
from jaxserve.bench.report import Report
from jaxserve.bench.serve import arrival_times, measure, measure_request
from jaxserve.bench.workload import as_text, make_workload
from jaxserve.client import ServerError, connect
from jaxserve.errors import StartupError


class Letters:
    """A tokenizer of which some decoded texts encode to fewer ids: token i is letter i % 26, and "ab" is one token."""

    vocab_size = 26

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text.replace("ab", "a")]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + t % 26) for t in token_ids)


def test_figures_follow_the_definitions() -> None:
    request = RequestFigures(sent=10.0, arrivals=[10.5, 10.6, 10.9], prompt_tokens=7, output_tokens=5)
    assert request.ttft == pytest.approx(0.5) and request.e2el == pytest.approx(0.9)
    assert request.tpot == pytest.approx(0.4 / 4)  # tokens as the server counts them, not chunks
    assert request.itls == pytest.approx([0.1, 0.3])
    single = RequestFigures(sent=10.0, arrivals=[11.0], prompt_tokens=3, output_tokens=1)
    assert single.tpot is None and single.itls == []
    figures = summarize([request, single, RequestFigures(error="refused")], seconds=2.0)
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (10, 6)
    assert (figures["request_throughput"], figures["output_throughput"], figures["total_token_throughput"]) == (1.0, 3.0, 8.0)
    assert figures["mean_ttft_ms"] == pytest.approx(750) and figures["mean_tpot_ms"] == pytest.approx(100)
    assert figures["median_itl_ms"] == pytest.approx(200) and figures["p99_e2el_ms"] == pytest.approx(999)
    assert spread([]) == {"mean": 0.0, "median": 0.0, "p99": 0.0}


def test_random_workload_is_exact_and_seeded() -> None:
    options = WorkloadOptions(num_prompts=300, random_input_len=100, random_output_len=10, random_range_ratio=0.5)
    items = make_workload(options, 26, Letters())
    assert items == make_workload(options, 26, Letters()) != make_workload(replace(options, seed=1), 26, Letters())
    assert all(len(item.token_ids) == item.input_len for item in items)
    inputs, outputs = {i.input_len for i in items}, {i.output_len for i in items}
    assert min(inputs) >= 50 and max(inputs) <= 150 and len(inputs) > 60 and outputs == set(range(5, 16))
    assert {t for i in items for t in i.token_ids} == set(range(26))
    fixed = make_workload(replace(options, random_range_ratio=0.0), 26, Letters())
    assert {(i.input_len, i.output_len) for i in fixed} == {(100, 10)}


def test_sharegpt_like_lengths() -> None:
    items = make_workload(WorkloadOptions(dataset="sharegpt", num_prompts=5000), 26, Letters())
    inputs, outputs = np.array([(i.input_len, i.output_len) for i in items]).T
    assert 200 < inputs.mean() < 240 and 185 < outputs.mean() < 215 and np.median(inputs) < 140
    assert inputs.min() >= 4 and inputs.max() <= 1024 and outputs.min() >= 4 and (inputs + outputs).max() <= 2048


def test_a_sharegpt_file_is_filtered(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    talks = [
        ("hello there", "good day"),
        ("hi", "too short a question"),
        ("x" * 1025, "too long"),
        ("fine question", "ok"),
        ("another one", "yes it is"),
    ]
    path.write_text(json.dumps([{"conversations": [{"value": q}, {"value": a}]} for q, a in talks] + [{"conversations": []}]))
    options = WorkloadOptions(dataset="sharegpt", dataset_path=str(path), num_prompts=2)
    items = make_workload(options, 26, Letters())
    assert {(i.text, i.input_len, i.output_len) for i in items} == {("hello there", 11, 8), ("another one", 11, 9)}
    with pytest.raises(StartupError, match="2 usable conversations"):
        make_workload(replace(options, num_prompts=3), 26, Letters())
    path.write_text('{"not": "a list"}')
    with pytest.raises(StartupError, match="not a ShareGPT file"):
        make_workload(options, 26, Letters())
    with pytest.raises(StartupError, match="No such file"):
        make_workload(replace(options, dataset_path="/nowhere"), 26, Letters())


def test_texts_encode_to_the_wanted_length() -> None:
    tokenizer = Letters()
    items = make_workload(WorkloadOptions(num_prompts=50, random_input_len=200), 26, tokenizer)
    assert any(len(tokenizer.encode(tokenizer.decode(list(i.token_ids)))) != 200 for i in items)
    assert all(len(tokenizer.encode(as_text(i, tokenizer))) == 200 for i in items)


def test_arrivals() -> None:
    options = ServeOptions(request_rate=50.0)
    times = np.array(arrival_times(options, 2000, seed=0))
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(2000 / 50) and (gaps >= 0).all()
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)  # exponential gaps: a Poisson process
    even = np.diff(arrival_times(replace(options, burstiness=100.0), 2000, seed=0))
    assert even.std() / even.mean() == pytest.approx(0.1, abs=0.02)
    assert arrival_times(ServeOptions(), 3, seed=0) == [0.0, 0.0, 0.0]
    assert arrival_times(options, 5, 1) == arrival_times(options, 5, 1) != arrival_times(options, 5, 2)


def run_measure(server: FakeServer, count: int, arrivals: list[float] | None = None, max_concurrency: int | None = None) -> Any:
    async def go() -> Any:
        async with connect(server.url) as client:
            body = {"prompt": "x", "stream_options": {"include_usage": True}}
            return await measure(client, [body] * count, arrivals or [0.0] * count, max_concurrency)

    return asyncio.run(go())


def test_a_stream_is_clocked(fake_server: FakeServer) -> None:
    fake_server.pieces, fake_server.delay = ["a", "b", "c", "d", "e"], 0.05
    requests, seconds = run_measure(fake_server, 4)
    assert fake_server.most_running == 4
    for request in requests:
        assert not request.error and (request.prompt_tokens, request.output_tokens) == (7, 5)
        assert len(request.arrivals) == 5  # the chunk with usage carries no token
        assert request.ttft >= 0.05 and request.e2el >= 0.25 and min(request.itls) > 0.02
        assert request.tpot == pytest.approx((request.e2el - request.ttft) / 4)
    assert 0.25 <= seconds < 1.0


def test_concurrency_and_rate_are_kept(fake_server: FakeServer) -> None:
    fake_server.delay = 0.01
    requests, seconds = run_measure(fake_server, 6, max_concurrency=2)
    assert fake_server.most_running == 2 and len(requests) == 6 and seconds >= 3 * 0.04
    assert max(r.ttft for r in requests) < 0.1  # waiting for a permit is not counted
    _, seconds = run_measure(fake_server, 3, arrivals=[0.0, 0.1, 0.3])
    assert seconds >= 0.34


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"status": 429, "error": {"error": {"message": "overloaded"}}}, "429: overloaded"),
        ({"status": 422, "error": {"error": "bad", "error_type": "validation"}}, "422: bad"),
        ({"status": 500, "error": "plain"}, "500: plain"),
        ({"break_off": True}, "the server broke the stream off"),
        ({"pieces": []}, "the stream held no token"),
    ],
)
def test_failures_are_told(fault: dict[str, Any], told: str, fake_server: FakeServer) -> None:
    for name, value in fault.items():
        setattr(fake_server, name, value)
    (request,), _ = run_measure(fake_server, 1)
    assert request.error == told


def test_no_server_is_one_line() -> None:
    async def go(url: str) -> None:
        async with connect(url) as client:
            assert (await measure_request(client, {})).error == f"no server answers at {url}"
            await client.models()

    for url in ("http://127.0.0.1:9", "nonsense"):
        with pytest.raises(ServerError, match="no server answers"):
            asyncio.run(go(url))


def test_the_command(
    fake_server: FakeServer, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "figures.json"
    line = f"bench serve --url {fake_server.url} --tokenizer {tiny_checkpoint('llama')} --output-json {saved} --api-key hidden"
    line += " --num-prompts 6 --num-warmups 2 --random-input-len 20 --random-output-len 4 --request-rate 200 --temperature 0 --ignore-eos"
    assert cli.main(line.split()) == 0
    assert len(fake_server.bodies) == 1 + 2 + 6  # one to try the server, the warm-ups, the measured ones
    body = fake_server.bodies[-1]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"], body["model"]) == (4, 0.0, True, "fake-model")
    assert len({b["prompt"] for b in fake_server.bodies}) == 6
    document = json.loads(saved.read_text())
    assert document["figures"]["completed"] == 6 and document["figures"]["total_output_tokens"] == 24
    assert (
        document["options"]["request_rate"] == 200
        and document["system"]["model_id"] == "fake-model"
        and "hidden" not in str(document["options"])
    )
    assert "output_throughput" in capsys.readouterr().out


def test_a_server_that_fails_the_trial_is_one_line(
    fake_server: FakeServer, tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_server.status = 401
    assert cli.main(["bench", "serve", "--url", fake_server.url, "--tokenizer", str(tiny_checkpoint("llama")), "--num-prompts", "1"]) == 1
    assert capsys.readouterr().err == "jaxserve: the server failed the first request: 401: no\n"


def test_throughput_counts_the_measured_requests_only() -> None:
    from llm_double import LLMDouble

    from jaxserve.bench.offline import bench_throughput

    llm = LLMDouble(delay=0.05)
    workload = WorkloadOptions(num_prompts=5, random_input_len=64, random_output_len=4)
    report = bench_throughput(llm, ThroughputOptions(temperature=0.5, num_warmups=7), workload)  # type: ignore[arg-type]
    warmups, measured = llm.calls
    assert len(warmups) == 7 and len(measured) == 5 and not set(warmups) & set(measured)
    assert all(p.ignore_eos and p.max_tokens == 4 and p.temperature == 0.5 for p in llm.params)
    figures = report.figures
    assert (figures["num_requests"], figures["total_input_tokens"], figures["total_output_tokens"]) == (5, 320, 20)
    assert 0.05 <= figures["elapsed_time"] < 0.5
    assert figures["output_tokens_per_second"] == pytest.approx(20 / figures["elapsed_time"])
    assert figures["tokens_per_second"] == pytest.approx(340 / figures["elapsed_time"])
    assert report.system["model_id"] == "double" and report.options["num_prompts"] == 5


def test_latency_times_batches_of_new_prompts() -> None:
    from llm_double import LLMDouble

    from jaxserve.bench.offline import bench_latency

    llm = LLMDouble(delay=0.02)
    report = bench_latency(llm, LatencyOptions(batch_size=3, input_len=16, output_len=5, num_iters_warmup=2, num_iters=4))  # type: ignore[arg-type]
    assert len(llm.calls) == 6 and all(len(batch) == 3 for batch in llm.calls)
    assert len({prompt for batch in llm.calls for prompt in batch}) == 18  # none can come from the prefix cache
    assert len(report.figures["latencies"]) == 4 and min(report.figures["latencies"]) >= 0.02
    assert report.figures["avg_latency"] == pytest.approx(np.mean(report.figures["latencies"]))
    assert report.figures["p50_latency"] == pytest.approx(np.median(report.figures["latencies"]))
    assert report.figures["output_tokens_per_second"] == pytest.approx(15 / report.figures["avg_latency"])


def test_a_report_says_what_ran_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(
        "latency", {"avg_latency": 1234.5, "p50_latency": 0.01234, "latencies": [1.0]}, {"model_id": "tiny", "device": "cpu"}, {"seed": 3}
    )
    report.show()
    told = capsys.readouterr().out
    assert "1,234.50 s\n" in told and "0.0123 s\n" in told and "tiny" in told and "cpu" in told and "latencies" not in told
    report.save(str(tmp_path / "out.json"))
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["figures"]["latencies"] == [1.0] and saved["options"] == {"seed": 3} and saved["system"]["device"] == "cpu"
    assert saved["environment"]["jax"] and saved["date"] and saved["command"]
    with pytest.raises(StartupError, match="cannot write"):
        report.save(str(tmp_path / "no" / "out.json"))


@pytest.mark.parametrize(
    "arguments", [[], ["swim"], ["serve", "--num-prompts", "0"], ["latency", "--batch-size", "x"], ["throughput", "--dataset", "x"]]
)
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", *arguments])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_of_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["throughput", "--help"], ["latency", "--help"], ["serve", "--help"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(["bench", *arguments])
        assert exit.value.code == 0 and "usage: jaxserve bench" in capsys.readouterr().out


def test_defaults_are_vllm_benchs() -> None:
    assert (WorkloadOptions().num_prompts, WorkloadOptions().random_input_len, WorkloadOptions().random_output_len) == (1000, 1024, 128)
    assert (LatencyOptions().batch_size, LatencyOptions().input_len, LatencyOptions().output_len) == (8, 32, 128)
    assert (ServeOptions().request_rate, ServeOptions().burstiness, ThroughputOptions().temperature) == (float("inf"), 1.0, 1.0)


def test_a_profile_adds_up_kernels_and_the_time_between_them() -> None:
    from jaxserve.bench.profile import Kernel, describe

    # One long kernel with a short one beside it on another stream; then nothing for 4 us; then two more.
    kernels = [Kernel(0, 10_000, "matmul"), Kernel(2_000, 3_000, "copy"), Kernel(14_000, 6_000, "matmul"), Kernel(20_000, 1_000, "copy")]
    lines = describe("/device:GPU:0", reversed(kernels), 2)
    assert lines[0] == "profile: 2 steps on /device:GPU:0, 0.011 ms a step, idle 19.0%"
    assert [line.split() for line in lines[2:4]] == [["8.0", "1.00", "matmul"], ["2.0", "1.00", "copy"]]
    assert lines[5].split() == ["2.0", "0.50", "matmul", "->", "matmul"] and len(lines) == 6


def test_steady_steps_are_traced(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from types import SimpleNamespace

    from engines import greedy, tiny_runner

    from jaxserve.bench.profile import profile

    engine = tiny_runner(tiny_checkpoint("llama")).engine()
    lines = profile(SimpleNamespace(engines=[engine]), [[5, 6, 7]] * 4, [greedy(50)] * 4, str(tmp_path / "trace"))  # type: ignore[arg-type]
    assert lines[0].startswith("profile: 20 steps on /host:CPU") and len(lines) > 6
    assert list((tmp_path / "trace").glob("**/*.xplane.pb"))
    assert not engine.has_work and engine.stats().num_pages_used == 0
    with pytest.raises(StartupError, match="cannot write"):
        profile(SimpleNamespace(engines=[engine]), [[5]], [greedy(2)], "/dev/null/x")  # type: ignore[arg-type]
