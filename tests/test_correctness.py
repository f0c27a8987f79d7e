"""The checks that run on a GPU (benchmarks.correctness and others), on a tiny model and the CPU; and that they can fail."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from engines import FEW_PROGRAMS, tiny_runner
from live_front_end import LiveFrontEnd
from tiny_models import CONFIGS

from benchmarks import edges, random_traffic, under_load
from benchmarks import logits as checked
from benchmarks.plain_llama import GOLDEN, Float32Llama, hidden_in_float64
from benchmarks.server import sum_metrics
from jaxserve.request import TokenLogprobs
from jaxserve.runner.buckets import Buckets

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "models.json").read_text())


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["llama", "llama-rope-llama3"])
def test_the_plain_model_is_transformers(name: str, tiny_checkpoint: Callable[[str], Path]):
    tensors, config = read_tensors(tiny_checkpoint(name)), CONFIGS[name]
    golden = GOLDENS[name][1]
    tokens = np.array(golden["prompt"] + golden["tokens"][:-1], np.int32)
    hidden = hidden_in_float64(config, tensors.__getitem__, tokens)
    logits = hidden @ tensors["lm_head.weight"].T.astype(np.float64)
    assert logits[len(golden["prompt"]) - 1 :].argmax(axis=1).tolist() == golden["tokens"]
    np.testing.assert_allclose(logits[-1], golden["last_logits"], atol=1e-4)
    single = np.asarray(Float32Llama(config, lambda key: jax.numpy.asarray(tensors[key])).hidden(tokens))
    np.testing.assert_allclose(single, hidden, atol=1e-4)


def test_logits_at_every_position(tiny_checkpoint: Callable[[str], Path]):
    tiny = tiny_runner(tiny_checkpoint("llama"))
    model, lines = tiny._model, []
    assert checked.check_logits(tiny.runner, tiny.config, model, CONFIGS["llama"], 70, lines.append)
    told = [line.split()[:2] for line in lines]
    assert told[:4] == [["whole", "2"], ["spread", "70"], ["whole", "2"], ["decode", "70"]] and told[4][0] == "mixed"
    other = {**CONFIGS["llama"], "rope_theta": 1200.0}
    assert not checked.check_logits(tiny.runner, tiny.config, model, other, 20, lines.append)


def test_logits_of_a_mesh_are_held_against_one_device(tiny_checkpoint: Callable[[str], Path]):
    folder, lines = tiny_checkpoint("llama"), []
    four = tiny_runner(folder, tensor_size=4, **FEW_PROGRAMS)
    assert checked.check_logits(four.runner, four.config, tiny_runner(folder)._model, CONFIGS["llama"], 40, lines.append)
    assert len(lines) == 5


def test_the_golden_is_whole():
    golden = np.load(GOLDEN)
    assert golden["logits"].shape == (512, 32) and 1.2 < golden["logits"].std() < 1.4
    assert golden["log_sums"].shape == (512,) and np.isfinite(golden["log_sums"]).all()


def test_answers_under_load_part_only_where_they_may(tiny_checkpoint: Callable[[str], Path]):
    lines: list[str] = []
    engine = tiny_runner(tiny_checkpoint("llama")).engine(prefix_caching=False)
    assert under_load.check_under_load(engine, 4, 40, 8, 4, lines.append)
    assert len(lines) == 2 and " of 4 answers part" in lines[0]
    engine.check_integrity()


def test_no_bit_may_differ_of_deterministic_answers(tiny_checkpoint: Callable[[str], Path]):
    engine, lines = tiny_runner(tiny_checkpoint("llama")).engine(prefix_caching=False), []
    assert not under_load.check_under_load(engine, 4, 40, 8, 4, lines.append, bitwise=True)
    assert "0 of 4 answers differ" not in lines[1] and "output token" in lines[2]


def test_a_parting_is_judged_by_the_margin_alone():
    def answer(token_ids: list[int], raws: list[float], seconds: list[float]) -> under_load.Answer:
        tops = zip(raws, seconds, strict=True)
        return under_load.Answer(token_ids, [TokenLogprobs(raw, raw, [1, 2], [raw, second], [raw, second]) for raw, second in tops])

    alone = answer([5, 6, 7], [-1.0, -2.0, -1.0], [-3.0, -2.04, -3.0])
    close = under_load.compare(alone, answer([5, 9, 7], [-1.02, -2.0, -1.0], [-3.0, -2.0, -3.0]))
    assert (close.at, close.margin, close.logprob_error) == (1, pytest.approx(0.04), pytest.approx(0.02)) and close.within
    assert not under_load.compare(alone, answer([4, 6, 7], [-1.0, -2.0, -1.0], [-3.0, -2.0, -3.0])).within  # parted where it was clear
    assert not under_load.compare(alone, answer([5, 6, 7], [-1.0, -2.0, -1.04], [-3.0, -2.0, -3.0])).within
    assert not under_load.compare(alone, answer([5, 6, 7], [-1.0, float("nan"), -1.0], [-3.0, -2.0, -3.0])).within


def test_every_bucket_at_its_edge(tiny_checkpoint: Callable[[str], Path]):
    tiny, lines = tiny_runner(tiny_checkpoint("llama")), []
    engine = tiny.engine(prefix_caching=False)
    assert edges.check_edges(engine, tiny.config, tiny.runner.buckets, True, lines.append)
    assert "preemptions" in lines[0] and int(lines[0].split()[-2]) > 0
    assert f"edges: {len(list(Buckets.for_platform('cpu', 4, 64, 0)))} buckets filled, 0 compile events" in lines[1]


class LiveServer:
    """benchmarks.server.Server, as far as the traffic needs it, over a front end in this process."""

    def __init__(self, live: LiveFrontEnd):
        self.url = live.url
        self._live = live

    def metrics(self) -> dict[str, float]:
        time.sleep(1.1)  # engines tell their statistics every half second
        return sum_metrics(self._live.client.get("/metrics").text)


@pytest.mark.parametrize("fail_token_id", [-1, 8])
def test_random_traffic_finds_what_is_wrong(fail_token_id: int, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random_traffic, "BURST_EXCESS", 40)
    monkeypatch.setattr(random_traffic, "LATE_SECONDS", 60.0)  # no timings in tests
    engine = {"max_concurrent_requests": 20, "fail_token_id": fail_token_id, "step_seconds": 0.002}
    live = LiveFrontEnd(tiny_checkpoint("llama"), {"max_best_of": 4}, engine)
    live.service.max_concurrent_requests = 20
    live.start()
    try:
        faults = asyncio.run(random_traffic.check(LiveServer(live), 1.0, 6, 320, 2000))  # type: ignore[arg-type]
    finally:
        live.stop()
    if fail_token_id < 0:
        assert not faults
    else:
        assert any(fault.startswith("burst") and "step failed" in fault for fault in faults)
