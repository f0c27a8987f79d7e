"""The sampler of a vocabulary that is cut over shards, against the sampler of whole rows: the same tokens, states and bits."""

import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec
from plain_forward import make_mesh

from jaxserve.pallas_kernels import Shards
from jaxserve.pallas_kernels.token_options import Column
from jaxserve.request import SamplingParams
from jaxserve.runner import prompt_scores, sampler, sharded_sampler
from jaxserve.runner.sampling_rows import RowPacker
from jaxserve.runner.sampling_state import load_slot, make_sampling_state, needs_slot_load, slot_loads
from jaxserve.runner.state import SAMPLING_SPEC, VOCABULARY_SPEC
from jaxserve.runner.vocabulary import VocabularyShards, shard_width
from jaxserve.scheduler.sample import sample_seed

VOCAB = 5_003  # no multiple of 2 or 4
EOS = (7, 5_000)
HERE, EVERYWHERE = VOCABULARY_SPEC, PartitionSpec()
ODD = 4_002  # of the last shard of 2 and of 4

WITHIN = [  # each shard finds its own winner
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=3.0),
    SamplingParams(seed=3, min_p=0.02),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.3),
    SamplingParams(seed=4, temperature=0.7, frequency_penalty=2.0, repetition_penalty=0.8),
    SamplingParams(temperature=0.0, logit_bias={11: 90.0, ODD: 95.0}, min_tokens=2, stop_token_ids=(ODD,)),
    SamplingParams(seed=5, watermark_gamma=0.3, watermark_delta=4.0),
]
DEALT_OUT = [
    SamplingParams(seed=6, top_p=0.9),
    SamplingParams(seed=7, top_k=20, temperature=0.7, logprobs=2),
    SamplingParams(seed=8, top_k=100, top_p=0.9, typical_p=0.7, min_p=0.001, logprobs=20),
    SamplingParams(temperature=0.0, frequency_penalty=1.0, logprobs=3),
    SamplingParams(seed=9, temperature=50.0, top_p=0.5, logprobs=0),
    SamplingParams(seed=10, logit_bias={3: 9.0, ODD: 8.0}, min_tokens=3, top_p=0.95, logprobs=1),
    SamplingParams(seed=11, watermark_gamma=0.3, watermark_delta=4.0, typical_p=0.8, logprobs=1),
]


NUM_ROWS = len(WITHIN + DEALT_OUT)  # 15: no multiple of the shards either


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def over(tensor: int, function, in_specs, out_specs):
    """A function of a vocabulary's shards, its last argument, over so many."""

    def local(*arguments):
        return function(*arguments, VocabularyShards(VOCAB, Shards()))

    return jit(jax.shard_map(local, mesh=make_mesh(tensor), in_specs=in_specs, out_specs=out_specs, check_vma=False))


@functools.cache
def programs(tensor: int):
    """load, mask, sample and logprobs on `tensor` devices, or those of whole rows where that is 1; traced and compiled once."""
    if tensor == 1:
        return tuple(map(jit, (load_slot, sampler.apply_masks, sampler.sample, sampler.find_logprobs)))
    return (
        over(tensor, load_slot, (SAMPLING_SPEC, EVERYWHERE), SAMPLING_SPEC),
        over(tensor, sharded_sampler.apply_masks, (HERE, EVERYWHERE), HERE),
        over(tensor, sharded_sampler.sample, (HERE, SAMPLING_SPEC, EVERYWHERE), (EVERYWHERE, SAMPLING_SPEC)),
        over(tensor, sharded_sampler.find_logprobs, (HERE, HERE, SAMPLING_SPEC, EVERYWHERE, EVERYWHERE), EVERYWHERE),
    )


class Sampler:
    """Steps on so many devices, and the state that goes from one to the next."""

    def __init__(self, tensor: int):
        self.padding = tensor * shard_width(VOCAB, tensor) - VOCAB
        self._mesh = make_mesh(tensor)
        state = make_sampling_state(NUM_ROWS, VOCAB + self.padding)
        self.state = jax.tree.map(self._placed, state, SAMPLING_SPEC)
        self._load, self._mask, self._sample, self._logprobs = programs(tensor)

    def _placed(self, x: jax.Array | np.ndarray, spec: PartitionSpec = HERE) -> jax.Array:
        """On the devices as the programs take it, so that they are not compiled for another placement, too."""
        return jax.device_put(x, NamedSharding(self._mesh, spec))

    def load(self, upload: np.ndarray) -> None:
        self.state = self._load(self.state, upload)

    def step(self, logits: np.ndarray, columns: np.ndarray, masks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """What `sample` and `find_logprobs` give; padding has the largest logits."""
        raw = self._placed(np.pad(logits, ((0, 0), (0, self.padding)), constant_values=1e30))
        masked = raw if masks is None else self._mask(raw, masks)
        sampled, self.state = self._sample(masked, self.state, columns)
        return np.asarray(sampled), np.asarray(self._logprobs(raw, masked, self.state, columns, sampled))


def logits_of_step(number: int, num_rows: int) -> np.ndarray:
    logits = np.random.default_rng(number).normal(size=(num_rows, VOCAB)).astype(np.float32) * 3
    logits[:, [40, 2_000, ODD, VOCAB - 1]] = logits.max() + 1  # equal ones on several shards
    return logits


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
def test_shards_choose_what_one_device_does(tensor: int, masked: bool):
    params = WITHIN + DEALT_OUT
    packer, slots, both = RowPacker(NUM_ROWS), np.arange(NUM_ROWS)[::-1].copy(), (Sampler(1), Sampler(tensor))
    for slot, each in zip(slots.tolist(), params, strict=True):
        packer.enter(slot, each, sample_seed(each.seed, 0))
        for upload in slot_loads(slot, each, [1, 2, ODD, 40], [40, 5], EOS, VOCAB) if needs_slot_load(each) else ():
            for one in both:
                one.load(upload)
    wants = np.array([each.logprobs is not None for each in params])
    chosen = []
    for number in range(4):
        logits = logits_of_step(number, NUM_ROWS)
        allowed = np.random.default_rng(number).integers(0, 2**32, (NUM_ROWS, -(-VOCAB // 32)), dtype=np.uint32) if masked else None
        samples = slots != number
        columns = packer.pack(slots, slots + number, np.full(NUM_ROWS, number), samples, NUM_ROWS)
        (expected, logprobs), (found, found_logprobs) = (one.step(logits, columns, allowed) for one in both)
        assert found[:, :3].tolist() == expected[:, :3].tolist()
        rows = wants & samples
        np.testing.assert_array_equal(found_logprobs[rows], logprobs[rows])
        for of_one, of_shards in zip(jax.tree.leaves(both[0].state), jax.tree.leaves(both[1].state), strict=True):
            np.testing.assert_array_equal(np.asarray(of_shards)[:, : of_one.shape[1]], of_one)
        chosen += found[:, 1].tolist()
    assert {40, ODD} < set(chosen) and len(set(chosen)) > 12 and max(chosen) < VOCAB


def test_broken_logits_give_some_token():
    params = [SamplingParams(seed=i, top_p=0.9 if i % 2 else 1.0, temperature=float(i < 6)) for i in range(8)]
    packer, slots = RowPacker(8), np.arange(8)
    for slot, each in enumerate(params):
        packer.enter(slot, each, sample_seed(each.seed, 0))
    logits = logits_of_step(0, NUM_ROWS)
    logits[[0, 1, 6]], logits[[2, 3, 7]], logits[4:6, 9] = np.nan, -np.inf, np.inf
    sampled, _ = Sampler(4).step(logits, packer.pack(slots, slots, slots, slots >= 0, NUM_ROWS), None)
    assert all(0 <= token < VOCAB for token in sampled[:, 1])


def test_shards_score_what_one_device_does():
    logits = logits_of_step(9, 7)
    token_ids = np.array([0, 40, ODD, VOCAB - 1, 2_000, 12, 1_251], np.int32)
    expected = jit(prompt_scores.score_tokens)(logits, token_ids)
    padded = np.pad(logits, ((0, 0), (0, 1)), constant_values=1e30)
    found = over(4, sharded_sampler.score_tokens, (HERE, EVERYWHERE), EVERYWHERE)(padded, token_ids)
    np.testing.assert_array_equal(found, expected)


def test_a_device_is_dealt_its_share_of_the_rows():
    """Nothing in the program has a whole vocabulary of more rows than that, and a state has one range of it."""
    one = Sampler(4)
    logits, columns = one._placed(np.zeros((NUM_ROWS, VOCAB + one.padding), np.float32)), np.zeros((NUM_ROWS, len(Column)), np.int32)
    _, state = one._sample(logits, one.state, columns)
    assert state.token_counts.sharding.shard_shape(state.token_counts.shape) == (NUM_ROWS, shard_width(VOCAB, 4))
    traced = one._sample.trace(logits, one.state, columns).jaxpr.jaxpr
    (sharded,) = [equation for equation in _equations(traced) if equation.primitive.name == "shard_map"]
    shapes = [variable.aval.shape for equation in _equations(sharded.params["jaxpr"]) for variable in equation.outvars]
    assert {math.prod(shape[:-1]) for shape in shapes if shape and shape[-1] >= VOCAB} == {1, 4}


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_gpus_exchange_by_kernels_alone():
    """XLA's own collectives would split the step's CUDA graph."""
    mesh = AbstractMesh((4,), ("tensor",), abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"))

    def sample(logits, state, columns, peers):
        return sharded_sampler.sample(logits, state, columns, VocabularyShards(VOCAB, Shards(peers)))

    specs, out_specs = (HERE, SAMPLING_SPEC, EVERYWHERE, PartitionSpec("tensor")), (EVERYWHERE, SAMPLING_SPEC)
    sharded = jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False))
    padded = 4 * shard_width(VOCAB, 4)

    def placed(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    state = jax.eval_shape(lambda: make_sampling_state(8, padded))
    state = jax.tree.map(lambda x, spec: placed(x.shape, x.dtype, spec), state, SAMPLING_SPEC)
    shapes = ((8, padded), jnp.float32), ((8, len(Column)), jnp.int32), ((4, 5, 2), jnp.uint32)
    logits, columns, peers = (placed(*shape, spec) for shape, spec in zip(shapes, (specs[0], *specs[2:]), strict=True))
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated
        text = sharded.trace(logits, state, columns, peers).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r'triton\(.*\bname = "(\w+)"', text)
    kernels = "largest_logits", "all_gather", "all_to_all", "choose_tokens", "choose_truncated_tokens", "race_of_shard", "all_gather"
    assert sorted(names) == sorted(kernels)
    assert not re.search(r"stablehlo\.all_|stablehlo\.collective|stablehlo\.while|stablehlo\.case|stablehlo\.if", text)
