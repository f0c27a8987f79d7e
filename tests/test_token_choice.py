"""The kernel that chooses tokens, interpreted, against the sampler of the CPU: the same tokens, states and distributions."""

import functools
import warnings
from dataclasses import replace

import jax
import jax.experimental.pallas.tpu  # the first pallas_call imports it, and what was traced before would be traced again
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.triton import lowering as triton_lowering
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.pallas_kernels.noise import noise_keys
from jaxserve.pallas_kernels.token_choice import TokenRange, choose_adjusted_tokens, choose_tokens, race
from jaxserve.pallas_kernels.token_options import Column, Flag
from jaxserve.request import SamplingParams
from jaxserve.runner.sampler import apply_masks
from jaxserve.runner.sampler import choose_by_xla as choose_of_xla
from jaxserve.runner.sampling_rows import RowPacker, unpack_rows
from jaxserve.runner.sampling_state import load_slot, make_sampling_state, needs_slot_load, slot_loads
from jaxserve.scheduler.sample import sample_seed

VOCAB = 9001  # more than a row of scratch holds
EOS = (7, 8999)
load = jax.jit(load_slot, donate_argnums=0)
choose = jax.jit(functools.partial(choose_tokens, interpret=True))
choose_by_xla = jax.jit(choose_of_xla)

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.9),
    SamplingParams(seed=3, top_k=20),
    SamplingParams(seed=4, top_k=50, top_p=0.8, temperature=0.7),
    SamplingParams(seed=5, min_p=0.05, logprobs=1),
    SamplingParams(seed=6, top_p=0.3, logprobs=1),
    SamplingParams(seed=7, typical_p=0.5, logprobs=1),
    SamplingParams(seed=8, top_k=100, top_p=0.9, typical_p=0.7, min_p=0.001, logprobs=1),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.3, logprobs=1),
    SamplingParams(seed=9, logit_bias={11: 9.0, 4000: -5.0}, min_tokens=3, stop_token_ids=(11,), top_p=0.95),
    SamplingParams(seed=13, watermark_gamma=0.3, watermark_delta=4.0, logprobs=1),
    SamplingParams(temperature=0.0, watermark_gamma=0.5, watermark_delta=6.0),
    *[SamplingParams(seed=seed, temperature=30.0, top_p=0.5) for seed in (10, 11, 12)],  # flat: the race is run again
    SamplingParams(seed=14, typical_p=0.5, logprobs=1),
    SamplingParams(seed=14, top_p=0.3, logprobs=1),
    SamplingParams(seed=14, top_k=3, logprobs=1),
]
NUM_EQUAL = 3  # the last rows have equal logits: nothing parts them, and no list holds them


def inputs(masks: np.ndarray | None, logits: np.ndarray):
    """Logits as masks leave them, state and columns."""
    state, packer, slots = make_sampling_state(20, VOCAB), RowPacker(20), np.arange(len(PARAMS))[::-1].copy()
    state = replace(state, last_tokens=state.last_tokens + 77)
    for slot, params in zip(slots, PARAMS, strict=True):
        packer.enter(int(slot), params, sample_seed(params.seed, 0))
        if needs_slot_load(params):
            for upload in slot_loads(int(slot), params, [1, 2, 3, 9], [9, 5], EOS, VOCAB):
                state = load(state, upload)
    columns = jnp.asarray(packer.pack(slots, slots + 7, np.full(len(slots), 2), slots != 3, len(slots) + 1, np.where(slots % 2, slots, -1)))
    return jnp.asarray(logits if masks is None else np.asarray(apply_masks(jnp.asarray(logits), jnp.asarray(masks)))), state, columns


def choices(masks: np.ndarray | None, logits: np.ndarray):
    """Tokens, distributions [R, 6] and states by both ways."""
    raw, state, columns = inputs(masks, logits)
    rows = unpack_rows(columns)
    tokens, distribution, expected_state = choose_by_xla(raw, state, columns)
    stats = jnp.stack(
        [getattr(distribution, name) for name in ("best", "inverse_temperature", "bound", "mean", "typical_bound", "log_mass")], 1
    )
    keys = noise_keys(rows.seed_low, rows.seed_high, rows.positions)
    found = choose(raw, columns, keys, state.token_counts, state.bias, state.last_tokens)
    return rows, tokens, stats, expected_state, found


@pytest.fixture(scope="module")
def small_blocks():
    """Many blocks a row, so that the winner is seldom in the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "_BLOCK", 512)
        yield


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
def test_the_kernel_chooses_as_xla_does(masked: bool):
    rng = np.random.default_rng(masked)
    logits = rng.normal(size=(len(PARAMS) + 1, VOCAB)).astype(np.float32) * 3
    logits[len(PARAMS) - NUM_EQUAL : len(PARAMS)] = 1.5
    masks = rng.integers(0, 2**32, (len(logits), -(-VOCAB // 32)), dtype=np.uint32) if masked else None
    rows, tokens, stats, state, found = choices(masks, logits)
    assert found.token_ids.tolist() == tokens.tolist()
    assert len(set(tokens.tolist())) > 6
    np.testing.assert_array_equal(found.token_counts, state.token_counts)
    np.testing.assert_array_equal(found.last_tokens, state.last_tokens)
    wants = np.asarray(rows.wants_logprobs)
    matters = np.ones(6, bool) & wants[:, None]
    matters[:, 3] &= np.asarray(rows.typical_p) < 1  # the mean
    np.testing.assert_allclose(np.asarray(found.stats)[matters], np.asarray(stats)[matters], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_broken_logits_give_some_token():
    logits = np.random.default_rng(3).normal(size=(len(PARAMS) + 1, VOCAB)).astype(np.float32)
    logits[:, :] = np.where(
        np.arange(len(logits))[:, None] % 3 == 0, np.nan, np.where(np.arange(len(logits))[:, None] % 3 == 1, -np.inf, logits)
    )
    logits[2::3, 5] = np.inf
    *_, found = choices(None, logits)
    assert all(0 <= token < VOCAB for token in found.token_ids.tolist())


@functools.partial(jax.jit, static_argnums=(3, 4))
def choose_by_shards(raw, state, columns, width: int, vocab_size: int):
    """Tokens, as shards of `width` tokens would find them, one after the other."""
    rows, shards, found = unpack_rows(columns), [], []
    keys = noise_keys(rows.seed_low, rows.seed_high, rows.positions)
    for first in range(0, vocab_size, width):
        held = min(width, vocab_size - first)
        logits, counts, bias = (
            jnp.pad(x[:, first : first + held], ((0, 0), (0, width - held)), constant_values=fill)
            for x, fill in ((raw, 1e30), (state.token_counts, 0), (state.bias, 0))
        )
        shard = TokenRange(jnp.array([first, held], jnp.int32), logits, columns, keys, counts, bias, state.last_tokens)
        shards.append(shard)
        found.append(shard.largest(interpret=True))
    best = functools.reduce(jnp.maximum, (value for value, _, _ in found))

    def winner(places, values):
        places, values = jnp.stack(places), jnp.stack(values)
        ids = places + width * jnp.arange(len(places), dtype=jnp.int32)[:, None]
        return jnp.take_along_axis(ids, jnp.argmax(values, axis=0)[None], axis=0)[0]

    most_likely = winner([place for _, place, _ in found], [value for value, _, _ in found])
    scores, places = zip(*(shard.race(best, interpret=True) for shard in shards), strict=True)
    within = jnp.where(rows.draws, winner(places, scores), most_likely)
    dealt = jnp.concatenate([adjusted for *_, adjusted in found], axis=1)
    dealt_columns = columns.at[:, Column.FLAGS].set(columns[:, Column.FLAGS] & int(Flag.LOGPROBS)).at[:, Column.SLOT].set(0)
    whole = choose_adjusted_tokens(dealt, dealt_columns, keys, vocab_size, interpret=True)
    return jnp.where(rows.needs_whole, whole.token_ids, within), whole.stats


@pytest.mark.parametrize("truncated", [True, False], ids=["truncated", "whole"])
def test_shards_of_the_vocabulary_choose_as_the_kernel_does(truncated: bool):
    """Of greedy rows and of those that truncate by min_p alone each finds its own; the others are put together, adjusted."""
    logits = np.random.default_rng(5).normal(size=(len(PARAMS) + 1, VOCAB)).astype(np.float32) * 3
    logits[0, [17, 3000, 8000]] = 50.0
    raw, state, columns = inputs(None, logits)
    if not truncated:
        columns = columns.at[:, Column.FLAGS].set(columns[:, Column.FLAGS] & ~int(Flag.LOGPROBS)).at[:, Column.TOP_K].set(0)
        ones = np.ones((len(logits), 1), np.float32).view(np.int32)
        columns = columns.at[:, [Column.TOP_P, Column.TYPICAL_P]].set(ones)
    rows = unpack_rows(columns)
    keys = noise_keys(rows.seed_low, rows.seed_high, rows.positions)
    found = choose(raw, columns, keys, state.token_counts, state.bias, state.last_tokens)
    tokens, stats = choose_by_shards(raw, state, columns, -(-VOCAB // 2), VOCAB)
    assert tokens.tolist() == found.token_ids.tolist() and tokens[0] == 17 and len(set(tokens.tolist())) > 8
    assert np.asarray(rows.needs_whole).sum() == (15 if truncated else 0)
    wants = np.asarray(rows.wants_logprobs)
    np.testing.assert_array_equal(np.asarray(stats)[wants], np.asarray(found.stats)[wants])


def test_the_kernel_lowers_for_cuda(monkeypatch: pytest.MonkeyPatch):
    lower = triton_lowering.lower_jaxpr_to_triton_module
    modules = []
    monkeypatch.setattr(
        triton_lowering, "lower_jaxpr_to_triton_module", lambda *args, **kwargs: modules.append(lower(*args, **kwargs)) or modules[-1]
    )
    rows, slots, vocab = 4, 8, 128256
    shapes = [((rows, vocab), jnp.float32), ((rows, len(Column)), jnp.int32), ((rows,), jnp.uint32), ((slots, vocab), jnp.int32)]
    logits, columns, word, counts = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    bias, last = jax.ShapeDtypeStruct((slots, vocab), jnp.float32), jax.ShapeDtypeStruct((slots, 1), jnp.int32)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated; nothing else serves GPUs before sm_90
        lowered = jax.jit(choose_tokens).trace(logits, columns, (word, word), counts, bias, last)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "choose_tokens" in text
    assert [module.module.operation.verify() for module in modules] == [True, True]
