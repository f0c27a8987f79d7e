"""ModelRunner on a tiny checkpoint: tokens are those of a plain forward pass, however the work is cut into steps."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from plain_forward import logits_of

from jaxserve.config import ModelOptions
from jaxserve.errors import DeviceError
from jaxserve.models import Model
from jaxserve.request import Request, SamplingParams
from jaxserve.runner import ModelRunner, Preparation, RunnerConfig, make_mesh, memory
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.state import abstract_state
from jaxserve.step import StepResult
from jaxserve.weights import ModelSource
from jaxserve.weights.loader import load_model

PAGE_SIZE = 4
MAX_TOTAL_TOKENS = 64
CONFIG = RunnerConfig(2, 32, PAGE_SIZE, MAX_TOTAL_TOKENS, kv_bytes=2**20, masked=True)
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Sample:
    """A sample as the runner sees it, on pages of its own: slot * 16 and following."""

    slot: int
    prompt: Sequence[int]
    params: SamplingParams = GREEDY
    seed: int = 0
    token_ids: list[int] = field(init=False)
    page_tables: list[list[int]] = field(init=False)
    request: Request = field(init=False)
    entered: bool = False

    def __post_init__(self):
        self.token_ids = list(self.prompt)
        self.page_tables = [[]]
        self.request = Request("r", tuple(self.prompt), self.params)


@dataclass
class Row:
    sample: Sample
    start: int
    token_ids: Sequence[int]
    samples: bool
    new_slot: bool
    num_output_tokens: int
    num_scored: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class Batch:
    rows: list[Row]
    page_copies: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_scored(self) -> int:
        return sum(row.num_scored for row in self.rows)


def row(sample: Sample, start: int, end: int, num_outputs: int | None = None) -> Row:
    """Tokens start ... end of a sample; those it does not know are on the device. The last one known or beyond is sampled from."""
    ids = [sample.token_ids[p] if p < len(sample.token_ids) else -1 for p in range(start, end)]
    table = sample.page_tables[0]
    while len(table) * PAGE_SIZE < end:
        table.append(sample.slot * 16 + len(table))
    new_slot, sample.entered = not sample.entered, True
    outputs = end - len(sample.prompt) if num_outputs is None else num_outputs
    return Row(sample, start, ids, end >= len(sample.token_ids), new_slot, max(outputs, 0))


def run(runner: ModelRunner, *rows: Row, page_copies: Sequence[tuple[int, int, int]] = ()) -> StepResult:
    return runner.collect(runner.dispatch(Batch(list(rows), list(page_copies))))


def chosen(result: StepResult, row: int = 0) -> int:
    assert result.counts[row] == 1
    return int(result.token_ids[row, 0])


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> Model:
    return load_model(ModelSource("tiny", "", tiny_checkpoint("llama")), ModelOptions(), make_mesh(1))


@pytest.fixture(scope="module")
def runner(model: Model) -> ModelRunner:
    runner = ModelRunner(model, make_mesh(1), CONFIG)
    runner.warmup()
    return runner


@pytest.fixture(scope="module")
def plain(model: Model) -> Callable[[Sequence[int], int], list[int]]:
    """(prompt, n) -> the next n greedy tokens."""

    def continue_(prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(logits_of(model, make_mesh(1), tokens, MAX_TOTAL_TOKENS)[-1].argmax()))
        return tokens[len(prompt) :]

    return continue_


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 320, length).tolist()


def test_chunked_prefill_then_decode_from_tokens_on_the_device(runner: ModelRunner, plain):
    sample = Sample(1, prompt(0, 41))
    expected = plain(sample.prompt, 6)
    compile_events = runner.stats()["compile_events"]
    steps = [runner.dispatch(Batch([row(sample, 0, 32)]))]
    tokens = []
    for end in range(41, 47):
        steps.append(runner.dispatch(Batch([row(sample, 32 if end == 41 else end - 1, end)])))
        result = runner.collect(steps.pop(0))
        tokens += [chosen(result)] if end > 41 else []
    tokens.append(chosen(runner.collect(steps.pop())))
    assert tokens == expected
    assert runner.stats()["compile_events"] == compile_events


def test_decodes_and_chunks_in_one_step(runner: ModelRunner, plain):
    first, second = Sample(0, prompt(1, 9)), Sample(1, prompt(2, 31))
    tokens = {0: [], 1: []}
    for rows in (
        [row(first, 0, 9)],
        [row(first, 9, 10), row(second, 0, 20)],
        [row(first, 10, 11), row(second, 20, 31)],
        [row(first, 11, 12), row(second, 31, 32)],
        [row(second, 32, 33)],
    ):
        result = run(runner, *rows)
        for i, r in enumerate(rows):
            tokens[r.sample.slot] += [chosen(result, i)] if r.samples else []
    assert tokens == {s.slot: plain(s.prompt, len(tokens[s.slot])) for s in (first, second)}


def test_a_step_in_one_program_chooses_the_same_tokens(model: Model, plain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Buckets, "for_platform", lambda *_: Buckets((2,), [(16, 2)], None, whole=(2,)))
    runner, sample, started = ModelRunner(model, make_mesh(1), CONFIG), Sample(0, prompt(3, 9)), []
    runner.warmup()
    start = runner._executor.run
    monkeypatch.setattr(runner._executor, "run", lambda key, *arrays: started.append(key.name) or start(key, *arrays))
    tokens = [chosen(run(runner, row(sample, max(end - 1, 9) if end > 9 else 0, end))) for end in range(9, 13)]
    assert tokens == plain(sample.prompt, 4)
    assert [name for name in started if "entries" not in name] == ["forward-16x2", "sample-2", *["step-2x2-decode"] * 3]
    told = replace(sample, params=SamplingParams(temperature=0.0, logprobs=1), entered=False)
    result = run(runner, row(told, 0, 9), row(replace(told, slot=1), 0, 1))
    assert result.logprobs is not None  # which the program of a whole step does not tell


def test_a_gpu_runs_its_small_programs_twice_once_all_are_loaded(model: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Buckets, "for_platform", lambda *_: Buckets((2,), [(16, 2), (32, 2)], None, whole=(2,)))
    monkeypatch.setattr("jaxserve.runner.executor._MOST_RECORDED_TOKENS", 16)
    monkeypatch.setattr("jaxserve.runner.executor.num_scored_a_call", lambda _: 64)  # what was compiled is a CPU's
    runner, started = ModelRunner(model, make_mesh(1), CONFIG), []
    executor = runner._executor
    executor._platform, run = "gpu", executor._run
    monkeypatch.setattr(executor, "_run", lambda key, arrays: started.append(key.name) or run(key, arrays))
    runner.warmup()
    count = len(executor._compiled)
    first, again = set(started[:count]), started[count:]
    assert len(first) == count and first - {"forward-32x2"} == set(again)
    assert all(again.count(name) == 2 for name in again)


def test_a_row_that_does_not_sample_leaves_its_slot_alone(runner: ModelRunner):
    sample = Sample(0, prompt(4, 12))
    result = run(runner, row(sample, 0, 8))
    assert result.counts[0] == 0 and result.logprobs is None


def test_copied_pages_let_two_samples_part(runner: ModelRunner, plain):
    source, target = Sample(0, prompt(5, 10)), Sample(1, prompt(5, 10))
    run(runner, row(source, 0, 10))
    target.page_tables = [[*source.page_tables[0][:2], 31]]  # two full pages are shared, the third is copied
    source.token_ids.append(7)
    target.token_ids.append(8)
    result = run(runner, row(source, 10, 11), row(target, 10, 11), page_copies=[(0, source.page_tables[0][2], 31)])
    assert [chosen(result, 0), chosen(result, 1)] == [plain([*source.prompt, last], 1)[0] for last in (7, 8)]


def test_many_page_copies(runner: ModelRunner, plain):
    sample = Sample(0, prompt(6, 63))
    run(runner, row(sample, 0, 32))
    run(runner, row(sample, 32, 63))
    again = Sample(1, sample.prompt)
    again.page_tables = [[16 + page for page in sample.page_tables[0]]]
    copies = [(0, 5, 16 + page) for page in range(5)] + [(0, page, 16 + page) for page in range(16)]  # more than one call takes; in order
    # A prefix hit: more new page-table entries than a decode step's upload holds.
    assert chosen(run(runner, row(again, 62, 63), page_copies=copies)) == plain(sample.prompt, 1)[0]


def test_a_mask_of_ones_changes_nothing(runner: ModelRunner):
    sample = Sample(0, prompt(7, 20), SamplingParams(temperature=1.0, seed=3, logprobs=2))
    free = run(runner, row(sample, 0, 20))
    sample.entered = False
    step = runner.forward(Batch([row(sample, 0, 20)]))
    runner.sample(step, np.full((1, 10), 0xFFFFFFFF, np.uint32))
    masked = runner.collect(step)
    assert chosen(masked) == chosen(free)
    assert free.logprobs is not None and masked.logprobs is not None
    np.testing.assert_allclose(masked.logprobs.top_raw[0], free.logprobs.top_raw[0], atol=1e-5)


def test_a_mask_forbids(runner: ModelRunner, model: Model):
    sample = Sample(0, prompt(8, 20))
    logits = logits_of(model, make_mesh(1), sample.token_ids, MAX_TOTAL_TOKENS)[-1]
    step = runner.forward(Batch([row(sample, 0, 20)]))
    masks = np.zeros((1, 10), np.uint32)
    masks[0, 5] = 1 << 31 | 1
    runner.sample(step, masks)
    assert chosen(runner.collect(step)) == max((160, 191), key=lambda token: logits[token])


def test_a_sample_takes_its_options_into_its_slot(runner: ModelRunner, plain):
    biased = Sample(1, prompt(9, 6), SamplingParams(temperature=0.0, logit_bias={17: 100.0}, logprobs=1))
    result = run(runner, row(biased, 0, 6))
    assert chosen(result) == 17
    assert result.logprobs is not None and int(np.asarray(result.logprobs.top_ids)[0, 0, 0]) == plain(biased.prompt, 1)[0]
    assert chosen(run(runner, row(Sample(1, biased.prompt), 0, 6))) == plain(biased.prompt, 1)[0]


def test_counters(runner: ModelRunner):
    before = runner.stats()
    run(runner, row(Sample(0, prompt(10, 20)), 0, 20))
    after = runner.stats()
    assert after["useful_tokens"] - before["useful_tokens"] == 20
    assert after["padded_tokens"] - before["padded_tokens"] == 12


def test_at_most_two_steps_are_in_flight(runner: ModelRunner):
    samples = [Sample(slot, prompt(11, 3)) for slot in (0, 1)]
    steps = [runner.dispatch(Batch([row(sample, 0, 3)])) for sample in samples]
    with pytest.raises(AssertionError, match="collect"):
        runner.dispatch(Batch([row(samples[0], 3, 4)]))
    for step in steps:
        runner.collect(step)


def test_on_a_cpu_no_result_is_copied_as_its_step_is_dispatched(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch):
    started: list[jax.Array] = []
    monkeypatch.setattr(type(jax.numpy.zeros(1)), "copy_to_host_async", lambda result: started.append(result))
    scored = replace(row(Sample(0, prompt(12, 4)), 0, 4), num_scored=2)
    result = run(runner, scored)
    assert chosen(result) >= 0 and result.scored is not None
    assert started == []  # a process that ended within milliseconds of its last step could die of the copy's callback


def test_no_program_copies_the_cache(runner: ModelRunner):
    shape = ",".join(map(str, runner._executor._state.kv[0][0].shape))
    for key, program in runner._executor._compiled.items():
        hlo = str(program.as_text())
        if f"f32[{shape}]" in hlo:
            copies = [line for line in hlo.splitlines() if f"= f32[{shape}]" in line and " copy(" in line]
            assert not copies, f"{key}: {copies[0]}"


def test_a_mesh_larger_than_the_devices_is_one_line():
    with pytest.raises(DeviceError, match=r"^replica 1 of 8 devices \(--mesh Dx8, --num-shard 8\) needs 16 devices; there are 8 \(cpu\)$"):
        make_mesh(8, 1)
    assert [device.id for device in make_mesh(2, 3).devices.flat] == [6, 7]


def test_the_cache_takes_what_the_rest_of_the_state_leaves(model: Model, monkeypatch: pytest.MonkeyPatch):
    left = 12 * 2**20
    monkeypatch.setattr(memory, "_bytes_left", lambda device, num_sharing, weights_to_come: left)
    with closing(Preparation(model.architecture, model.leaves[0].dtype, make_mesh(1), RunnerConfig(64, 64, PAGE_SIZE))) as prepared:
        hidden = jax.ShapeDtypeStruct((64, model.config.hidden_size), model.leaves[0].dtype)
        state = abstract_state(prepared.plan(), 64, model.config.vocab_size, hidden, make_mesh(1))
    assert left / 2 < sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= left
