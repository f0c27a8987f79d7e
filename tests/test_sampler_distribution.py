"""Sampled distributions by chi-square tests with fixed seeds, the noise behind them, and the seeds of a request's samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_reference import noise, probabilities
from scipy import stats

from jaxserve.pallas_kernels.noise import exponential_noise, noise_keys
from jaxserve.request import SamplingParams
from jaxserve.runner.sampler import sample
from jaxserve.runner.sampling_rows import RowPacker
from jaxserve.runner.sampling_state import SamplingState, make_sampling_state
from jaxserve.scheduler.sample import sample_seed

VOCAB = 48
ROWS = 512


@functools.partial(jax.jit, donate_argnums=(1,))
def step(logits: jax.Array, state: SamplingState, columns: jax.Array) -> tuple[jax.Array, SamplingState]:
    packed, state = sample(logits, state, columns)
    return packed[:, 1], state


def draw(logits: np.ndarray, params: SamplingParams, count: int, index: int = 0) -> np.ndarray:
    """Tokens at positions 0, 1, ..., count - 1 of one sample."""
    packer = RowPacker(1)
    packer.enter(0, params, sample_seed(params.seed, index))
    state = make_sampling_state(1, VOCAB)
    slots = np.zeros(ROWS, np.int64)
    drawn = []
    for start in range(0, count, ROWS):
        columns = packer.pack(slots, start + np.arange(ROWS), slots, np.ones(ROWS, bool), ROWS)
        tokens, state = step(np.repeat(logits[None], ROWS, axis=0), state, columns)
        drawn.append(np.asarray(tokens))
    return np.concatenate(drawn)


def assert_drawn_from(expected: np.ndarray, drawn: np.ndarray) -> None:
    """Chi-square over the tokens expected at least five times; the others are one cell; what is impossible never comes."""
    counts = np.bincount(drawn, minlength=VOCAB)
    assert not counts[expected == 0].any()
    expected = expected * len(drawn)
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    present = wanted > 0
    result = stats.chisquare(observed[present], wanted[present])
    assert common.sum() > 2
    assert result.pvalue > 1e-3, result


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.5),
        SamplingParams(seed=3, temperature=3.0),
        SamplingParams(seed=4, top_k=6),
        SamplingParams(seed=5, top_p=0.85),
        SamplingParams(seed=6, min_p=0.05),
        SamplingParams(seed=7, typical_p=0.7),
        SamplingParams(seed=8, temperature=1.5, min_p=0.01, top_k=20, top_p=0.9, typical_p=0.9),
    ],
    ids=lambda p: f"seed{p.seed}",
)
def test_sampled_distribution(params: SamplingParams):
    logits = np.random.default_rng(params.seed).normal(size=VOCAB).astype(np.float32) * 2
    assert_drawn_from(probabilities(logits.astype(np.float64), params), draw(logits, params, 16 * ROWS))


def test_rare_tokens_get_their_share():
    logits = np.zeros(VOCAB, np.float32)
    logits[8:] = np.log(2e-5)
    drawn = draw(logits, SamplingParams(seed=11), 400 * ROWS)
    rare = (drawn >= 8).sum()
    expected = len(drawn) * 40 * 2e-5 / (8 + 40 * 2e-5)
    assert stats.poisson.cdf(rare, expected) > 1e-3
    assert stats.poisson.sf(rare, expected) > 1e-3
    assert rare > 0


def test_noise_is_that_of_the_reference_and_independent_of_the_part_of_the_vocabulary():
    seeds = [0, 1, 2**64 - 1, 0x0123456789ABCDEF]
    positions = [0, 5, 2**31 - 1, 77]
    halves = np.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], np.uint32)
    make = jax.jit(lambda low, high, positions, tokens: exponential_noise(noise_keys(low, high, positions), tokens))
    whole = np.asarray(make(halves[:, 0], halves[:, 1], np.array(positions, np.int32), jnp.arange(5000, dtype=jnp.int32)))
    for row in range(4):
        expected = noise(seeds[row], positions[row], 5000)
        small = expected < 1  # the large end is coarse: float32 has few numbers close below 1
        np.testing.assert_allclose(whole[row][small], expected[small], rtol=1e-5)
        np.testing.assert_allclose(np.exp(-whole[row]), np.exp(-expected), atol=1e-6)
    shard = make(halves[:, 0], halves[:, 1], jnp.array(positions, jnp.int32), jnp.arange(2500, 5000, dtype=jnp.int32))
    np.testing.assert_allclose(np.asarray(shard), whole[:, 2500:], rtol=1e-4)


def test_noise_of_neighbouring_seeds_positions_and_tokens_is_unrelated():
    count, tokens = 256, jnp.arange(512, dtype=jnp.int32)
    zeros, numbers = np.zeros(count, np.uint32), np.arange(count, dtype=np.uint32)
    for low, high, positions in ((numbers, zeros, zeros), (zeros, numbers, zeros), (zeros, zeros, numbers)):
        found = np.asarray(
            exponential_noise(noise_keys(jnp.asarray(low), jnp.asarray(high), jnp.asarray(positions.astype(np.int32))), tokens)
        )
        uniform = np.exp(-found.astype(np.float64))
        assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
        centred = uniform - 0.5
        for first, second in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
            assert abs((first * second).mean() * 12 * np.sqrt(first.size)) < 4


def test_each_of_n_samples_has_a_seed_of_its_own():
    seeds = [sample_seed(5, index) for index in range(128)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 128
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed(-1, 0) == 2**64 - 1
    assert sample_seed(None, 0) != sample_seed(None, 0)
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    params = SamplingParams(seed=5)
    assert (draw(logits, params, ROWS, index=0) != draw(logits, params, ROWS, index=1)).mean() > 0.5
    assert (draw(logits, params, ROWS, index=1) == draw(logits, params, ROWS, index=1)).all()
