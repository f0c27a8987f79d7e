"""The sampler against tests/sampler_reference.py: distributions, logprobs, tokens, penalties, bias, bans and masks."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from sampler_reference import adjusted_logits, log_softmax, noise, probabilities

from jaxserve.request import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams
from jaxserve.runner.distribution import sum_masses, truncate, whole_distribution
from jaxserve.runner.sampler import apply_masks, find_logprobs, sample, unpack_sampled
from jaxserve.runner.sampling_rows import RowPacker, unpack_rows
from jaxserve.runner.sampling_state import LOAD_CHUNK, SamplingState, load_slot, make_sampling_state, needs_slot_load, slot_loads
from jaxserve.scheduler.sample import sample_seed
from jaxserve.watermark import green, z_score

SLOTS = 12
VOCAB = 20_011  # above the size from which truncation looks at the nearest blocks first, and a multiple of no block
PADDED = VOCAB + 5
EOS = (7, 20_000)


@functools.partial(jax.jit, donate_argnums=(1,))
def step(logits: jax.Array, state: SamplingState, columns: jax.Array, masks: jax.Array | None = None) -> tuple[jax.Array, SamplingState]:
    masked = logits if masks is None else apply_masks(logits, masks)
    sampled, state = sample(masked, state, columns)
    return find_logprobs(logits, masked, state, columns, sampled), state


load = jax.jit(load_slot, donate_argnums=0)


@jax.jit
def processed_logprobs(logits: jax.Array, columns: jax.Array) -> jax.Array:
    rows = unpack_rows(columns)
    whole = sum_masses(whole_distribution(logits, rows), logits)
    return truncate(whole, logits, rows).logprobs(logits)


class Batch:
    """Samples in slots, sampled one step at a time."""

    def __init__(self, params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]] = (), slots: Sequence[int] | None = None):
        self.params = params
        self.slots = np.array(range(len(params)) if slots is None else slots)
        self.prompts = [list(p) for p in prompts] or [[1, 2, 3] for _ in params]
        self.outputs: list[list[int]] = [[] for _ in params]
        self.state = make_sampling_state(SLOTS, VOCAB)
        self.packer = RowPacker(SLOTS)
        for slot, p, prompt in zip(self.slots, params, self.prompts, strict=True):
            self.enter(int(slot), p, prompt, [])

    def enter(self, slot: int, params: SamplingParams, prompt: list[int], output: list[int]) -> None:
        self.packer.enter(slot, params, sample_seed(params.seed, 0))
        if needs_slot_load(params):
            for upload in slot_loads(slot, params, prompt, output, EOS, VOCAB):
                self.state = load(self.state, upload)

    def columns(self, num_rows: int, samples: np.ndarray | None = None) -> np.ndarray:
        lengths = np.array([len(o) for o in self.outputs])
        positions = lengths + [len(p) for p in self.prompts]
        samples = np.ones(len(self.slots), bool) if samples is None else samples
        return self.packer.pack(self.slots, positions, lengths, samples, num_rows)

    def step(self, logits: np.ndarray, masks: np.ndarray | None = None, samples: np.ndarray | None = None) -> SimpleNamespace:
        packed, self.state = step(logits, self.state, self.columns(len(logits), samples), masks)
        result = unpack_sampled(np.asarray(packed))
        assert result.logprobs is not None
        tokens = SimpleNamespace(token_ids=result.token_ids, counts=result.counts, **asdict(result.logprobs))
        for output, count, token in zip(self.outputs, tokens.counts, tokens.token_ids[:, 0], strict=False):
            output += [int(token)] * int(count)
        return tokens


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    """float32 [rows, PADDED] with the largest of all in the padding."""
    logits = np.random.default_rng(seed).normal(size=(rows, PADDED)).astype(np.float32) * np.float32(scale)
    logits[:, VOCAB:] = 1e30
    return logits


TRUNCATIONS = [
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.3),
    SamplingParams(min_p=0.02),
    SamplingParams(temperature=0.5, min_p=0.001, top_k=60, top_p=0.9),
    SamplingParams(top_k=100, typical_p=0.5),
    SamplingParams(temperature=0.6, top_p=0.4, typical_p=0.8),
    SamplingParams(temperature=0.0, top_k=3, top_p=0.1, typical_p=0.2),
]
WIDE_TRUNCATIONS = [
    SamplingParams(typical_p=0.6),
    SamplingParams(top_k=9000),
    SamplingParams(top_p=0.97),
    SamplingParams(temperature=2.0, min_p=1e-5),
    SamplingParams(top_k=15_000, top_p=0.9999, typical_p=0.99),
    SamplingParams(top_k=VOCAB + 100),
    SamplingParams(temperature=50.0, top_p=0.5),
    SamplingParams(temperature=1e-4, top_p=0.5, typical_p=0.5),
]


@pytest.mark.parametrize("params", [TRUNCATIONS, WIDE_TRUNCATIONS, TRUNCATIONS[:4] + WIDE_TRUNCATIONS[:4]], ids=["narrow", "wide", "mixed"])
def test_processed_logprobs_equal_the_reference(params: list[SamplingParams]):
    logits = random_logits(8)[:, :VOCAB]
    found = np.asarray(processed_logprobs(logits, Batch(params).columns(8)))
    for row, p in enumerate(params):
        expected = probabilities(logits[row].astype(np.float64), p)
        kept = expected > 1e-30
        assert np.flatnonzero(found[row] > np.log(1e-30)).tolist() == np.flatnonzero(kept).tolist(), p
        np.testing.assert_allclose(found[row][kept], np.log(expected[kept]), rtol=2e-6, atol=1e-4, err_msg=str(p))


def test_ties_are_kept_or_dropped_together():
    logits = np.full((8, VOCAB), -30, np.float32)
    logits[:, 100:106] = 2.0
    logits[:, 50] = 5.0
    params = [
        SamplingParams(top_k=3),
        SamplingParams(top_p=float(np.exp(5) / (np.exp(5) + 6 * np.exp(2)) + 0.01)),
        SamplingParams(top_k=1),
        SamplingParams(min_p=float(np.exp(-3)) * 0.999),
        SamplingParams(min_p=float(np.exp(-3)) * 1.001),
        *[SamplingParams(top_k=7)] * 3,
    ]
    found = np.isfinite(np.asarray(processed_logprobs(logits, Batch(params).columns(8))))
    assert found.sum(axis=1).tolist() == [7, 7, 1, 7, 1, 7, 7, 7]


def test_tokens_and_logprobs_equal_the_reference():
    seeds = [0, 1, 2**63 + 5, -1, 12345, 2**32, 7, 8]
    params = [replace(p, seed=seed, logprobs=3) for p, seed in zip(TRUNCATIONS, seeds, strict=True)]
    batch = Batch(params)
    for number in range(6):
        logits = random_logits(8, seed=number)
        tokens = batch.step(logits)
        assert (tokens.token_ids.shape, tokens.top_ids.shape) == ((8, 1), (8, 1, MAX_TOP_LOGPROBS))
        assert tokens.counts.tolist() == [1] * 8
        for row, p in enumerate(params):
            real = logits[row, :VOCAB].astype(np.float64)
            expected = probabilities(real, p)
            race = expected / noise(seeds[row] % 2**64, 3 + number, VOCAB) if not p.greedy else real
            token = int(tokens.token_ids[row, 0])
            assert token == int(np.argmax(race))
            raw = log_softmax(real)
            np.testing.assert_allclose(tokens.raw[row, 0], raw[token], atol=1e-5)
            np.testing.assert_allclose(tokens.processed[row, 0], np.log(expected[token]), atol=1e-5)
            best = np.argsort(-real, kind="stable")[:MAX_TOP_LOGPROBS]
            assert tokens.top_ids[row, 0].tolist() == best.tolist()
            np.testing.assert_allclose(tokens.top_raw[row, 0], raw[best], atol=1e-5)
            with np.errstate(divide="ignore"):
                np.testing.assert_allclose(tokens.top_processed[row, 0], np.log(expected[best]), atol=1e-5)


def test_greedy_takes_the_lowest_of_equal_logits_and_never_padding():
    logits = np.zeros((8, PADDED), np.float32)
    logits[:, VOCAB:] = 9.0
    logits[1, [4000, 4001, 19_999]] = 3.0
    logits[2, VOCAB - 1] = 3.0
    logits[3] = -np.inf
    logits[4] = np.nan
    almost = SamplingParams(temperature=1e-9, top_p=0.5, logprobs=0)
    batch = Batch([SamplingParams(temperature=0.0, logprobs=20)] * 6 + [almost] * 2)
    tokens = batch.step(logits)
    assert tokens.token_ids[6:, 0].tolist() == [0, 0]
    assert tokens.token_ids[:3, 0].tolist() == [0, 4000, VOCAB - 1]
    assert all(0 <= token < VOCAB for token in tokens.token_ids[:, 0])
    assert tokens.top_ids[0, 0].tolist() == list(range(20))
    assert tokens.top_ids[1, 0, :5].tolist() == [4000, 4001, 19_999, 0, 1]


def test_sampled_rows_never_take_padding_or_crash_on_broken_logits():
    logits = random_logits(8)
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, 5] = np.inf
    tokens = Batch([SamplingParams(seed=i, top_p=0.9, logprobs=0) for i in range(8)]).step(logits)
    assert all(0 <= token < VOCAB for token in tokens.token_ids[:, 0])


def test_penalties_count_prompt_and_output():
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.5, logprobs=0),
        SamplingParams(temperature=0.0, presence_penalty=1.0, logprobs=0),
        SamplingParams(temperature=0.0, frequency_penalty=0.7, logprobs=0),
        SamplingParams(temperature=0.0, repetition_penalty=0.8, presence_penalty=-0.5, frequency_penalty=0.3, logprobs=0),
        SamplingParams(temperature=0.0, logprobs=0),
        *[SamplingParams(temperature=0.0, frequency_penalty=2.0, logprobs=0)] * 3,
    ]
    logits = random_logits(8, scale=1.0)
    prompts = [np.argsort(-logits[row, :VOCAB])[: 2 + row].tolist() * 2 for row in range(8)]
    batch = Batch(params, prompts)
    for number in range(12):
        before = [list(output) for output in batch.outputs]
        samples = np.array([True] * 7 + [number % 2 == 0])
        tokens = batch.step(logits, samples=samples)
        for row, p in enumerate(params):
            adjusted = adjusted_logits(logits[row, :VOCAB], p, prompts[row], before[row])
            if samples[row]:
                assert tokens.token_ids[row, 0] == np.argmax(adjusted)
                np.testing.assert_allclose(tokens.processed[row, 0], log_softmax(adjusted)[tokens.token_ids[row, 0]], atol=1e-5)
                np.testing.assert_allclose(tokens.raw[row, 0], log_softmax(logits[row, :VOCAB])[tokens.token_ids[row, 0]], atol=1e-5)
            else:
                assert tokens.counts[row] == 0
    assert len(set(batch.outputs[5])) > 3, "the penalties changed nothing"
    assert np.asarray(batch.state.last_tokens)[:7, 0].tolist() == [output[-1] for output in batch.outputs[:7]]


def test_a_slot_loads_any_number_of_tokens_and_forgets_its_last_sample():
    rng = np.random.default_rng(3)
    batch = Batch([SamplingParams(temperature=0.0)] * 8)
    params = SamplingParams(repetition_penalty=1.2)
    for num_prompt, num_output in ((5, 0), (LOAD_CHUNK, 0), (LOAD_CHUNK - 3, 7), (2 * LOAD_CHUNK + 1, LOAD_CHUNK)):
        prompt, output = (rng.integers(0, 50, n).tolist() for n in (num_prompt, num_output))
        batch.enter(2, params, prompt, output)
        counts = np.asarray(batch.state.token_counts)
        expected = np.bincount(output, minlength=VOCAB) + (np.bincount(prompt, minlength=VOCAB) > 0) * (1 << 30)
        assert counts[2].tolist() == expected.tolist()
        assert not counts[[0, 1, 3]].any()


def test_logit_bias_and_bans():
    many = {token: 100.0 - token / 100 for token in range(MAX_LOGIT_BIAS)}
    params = [
        SamplingParams(temperature=0.0, logit_bias={11: 100.0}),
        SamplingParams(temperature=0.0, logit_bias=many, logprobs=0),
        SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(9,)),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, min_tokens=2, logit_bias={7: 100.0}),
        *[SamplingParams(temperature=1.0, seed=1, min_tokens=1)] * 3,
    ]
    logits = random_logits(8)
    logits[2, [7, 9]] = 50.0, 60.0
    logits[5:, 20_000] = 100.0
    batch = Batch(params)
    first = batch.step(logits)
    again = batch.step(logits)
    last = batch.step(logits)
    row1 = adjusted_logits(logits[1, :VOCAB], params[1])
    assert first.token_ids[0, 0] == 11
    assert first.token_ids[1, 0] == np.argmax(row1)
    np.testing.assert_allclose(first.processed[1, 0], log_softmax(row1).max(), atol=1e-5)
    assert (
        first.token_ids[2, 0]
        == again.token_ids[2, 0]
        == np.argmax(np.where(np.isin(np.arange(VOCAB), [7, 9, 20_000]), -99, logits[2, :VOCAB]))
    )
    assert last.token_ids[2, 0] == 9
    assert first.token_ids[3, 0] == np.argmax(logits[3, :VOCAB])
    assert again.token_ids[4, 0] != 7 == last.token_ids[4, 0]
    assert all(token != 20_000 for token in first.token_ids[5:, 0])
    assert all(token == 20_000 for token in again.token_ids[5:, 0])


def test_a_watermark_favours_what_its_detector_finds():
    params = SamplingParams(temperature=0.0, watermark_gamma=0.25, watermark_delta=5.0, logprobs=2)
    batch = Batch([params, SamplingParams(temperature=0.0, logprobs=2)])
    batch.state = replace(batch.state, last_tokens=batch.state.last_tokens + 3)
    for number in range(40):
        logits = random_logits(2, seed=number, scale=1.0)
        before = [output[-1] if output else 3 for output in batch.outputs]
        tokens = batch.step(logits)
        favoured = green([before[0]] * VOCAB, range(VOCAB), 0.25)
        assert 0.2 < favoured.mean() < 0.3
        biased = np.where(favoured, logits[0, :VOCAB] + 5.0, logits[0, :VOCAB])
        assert tokens.token_ids[0, 0] == np.argmax(biased)
        np.testing.assert_allclose(tokens.processed[0, 0], log_softmax(biased).max(), atol=1e-5)
        np.testing.assert_allclose(tokens.raw[0, 0], log_softmax(logits[0, :VOCAB])[tokens.token_ids[0, 0]], atol=1e-5)
        assert tokens.token_ids[1, 0] == np.argmax(logits[1, :VOCAB])
    assert z_score([3, *batch.outputs[0]], 0.25) > 8 > 4 > abs(z_score([3, *batch.outputs[1]], 0.25))


def test_too_many_bans_are_refused():
    with pytest.raises(ValueError, match="at most"):
        list(slot_loads(0, SamplingParams(min_tokens=1), [1], [], range(1000), VOCAB))


def packed_masks(allowed: np.ndarray) -> np.ndarray:
    """uint32 [rows, ceil(VOCAB / 32)] of bool [rows, VOCAB]."""
    words = np.zeros((len(allowed), -(-VOCAB // 32)), np.uint32)
    for row, token in zip(*np.nonzero(allowed), strict=True):
        words[row, token // 32] |= np.uint32(1 << (token % 32))
    return words


@pytest.mark.parametrize("first", [0, 2, 4, 6])
def test_masks_allow_only_their_bits(first: int):
    allowed = np.random.default_rng(first).random((2, VOCAB)) < 0.001
    if first == 0:
        allowed[0] = np.isin(np.arange(VOCAB), [5, 31, 32])
    params = [replace(p, seed=row, logprobs=0) for row, p in enumerate(TRUNCATIONS[first : first + 2])]
    logits = random_logits(2)
    tokens = Batch(params).step(logits, masks=packed_masks(allowed))
    for row, p in enumerate(params):
        token = int(tokens.token_ids[row, 0])
        masked = np.where(allowed[row], logits[row, :VOCAB].astype(np.float64), -np.inf)
        assert allowed[row, token]
        if p.greedy:
            assert token == np.argmax(masked)
        np.testing.assert_allclose(tokens.processed[row, 0], np.log(probabilities(masked, p)[token]), atol=1e-5)
        np.testing.assert_allclose(tokens.raw[row, 0], log_softmax(logits[row, :VOCAB])[token], atol=1e-5)


def test_the_same_seed_gives_the_same_tokens_in_any_bucket_row_and_slot():
    params = SamplingParams(seed=99, temperature=0.9, top_p=0.8, repetition_penalty=1.1)
    others = [SamplingParams(seed=i, top_k=9, logprobs=2) for i in range(7)]
    alone = Batch([params], slots=[0])
    crowd = Batch([*others[:5], params, *others[5:]], slots=[3, 1, 0, 2, 4, 11, 5, 6])
    everything = packed_masks(np.ones((2, VOCAB), bool))
    for number in range(10):
        logits = random_logits(8, seed=number)
        alone.step(np.repeat(logits[5:6], 2, axis=0), masks=everything)
        crowd.step(logits)
    assert alone.outputs[0] == crowd.outputs[5]
    assert len(set(alone.outputs[0])) > 5
