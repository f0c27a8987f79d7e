"""Sums over shards without a GPU: the kernel's PTX on a machine of our own, what is lowered for CUDA, and XLA's sums on fake devices."""

import random
import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec
from ptx_machine import EMPTY, Memory, Trap, run_all, run_thread

from jaxserve.config import EngineOptions
from jaxserve.pallas_kernels import ExchangeLayout, Shards, all_gather, all_reduce, all_reduce_add_rms_norm, all_to_all, peers_table
from jaxserve.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference
from jaxserve.pallas_kernels.all_reduce.exchange import BLOCKS, CONTROL_BYTES, THREADS, round_asm
from jaxserve.pallas_kernels.all_reduce.triton import AllReduceConfig
from jaxserve.runner import RunnerConfig, exchange, make_mesh

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
NOT_A_NUMBER = 0x7FFFFFFF  # what is sent where a part looks like an empty place


class Machine:
    """Some threads of each of `shards` GPUs, all with their buffers in one memory."""

    def __init__(self, shards: int, vectors: int, repeated: bool, scattered: bool = False):
        self.layout, self.words = ExchangeLayout.of(shards), 4 * vectors
        self.bases = [0x7F40_0000_0000 * (shard % 2) + (shard + 1) * 0xFFF0_0000 for shard in range(shards)]
        self.text, constraints = round_asm(self.layout, vectors, pack=8 * vectors, scattered=scattered, repeated=repeated)
        self.pack = 8 * vectors
        assert constraints.split(",").count("=r") == shards * self.words
        self.memory = Memory(self.is_place)

    def is_place(self, address: int) -> bool:
        offsets = [address - base for base in self.bases]
        assert any(0 <= offset < self.layout.nbytes for offset in offsets), "an access outside all buffers"
        return any(CONTROL_BYTES <= offset < self.layout.nbytes for offset in offsets)

    def one_round(self, shard: int, block: int, thread: int, mine: list[int], clock=lambda: 0):
        row = peers_table(self.bases)[shard].ravel().tolist()
        scalars = [block, row[0], *row[2:]]
        operands = mine + [scalar for scalar in scalars for _ in range(self.pack)]
        return run_thread(self.text, thread, operands, self.layout.shards * self.words, self.memory, clock)

    def rounds(self, shard: int, block: int, thread: int, parts: list[list[int]]):
        results = []
        for mine in parts:
            results += yield from self.one_round(shard, block, thread, mine)
        return results


def parts_of(chance: random.Random, num_words: int) -> list[int]:
    return [chance.choice((0, 0x80008000, EMPTY, chance.getrandbits(32))) for _ in range(num_words)]


def as_sent(parts: list[int]) -> list[int]:
    return [NOT_A_NUMBER if word == EMPTY else word for word in parts]


@pytest.mark.parametrize(("shards", "vectors"), [(2, 1), (2, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_shard_gets_what_all_sent(shards: int, vectors: int, seed: int):
    """Rounds of one kernel run into each other; threads are of the first and last blocks, of which one does fewer rounds."""
    chance, machine = random.Random(seed), Machine(shards, vectors, repeated=True)
    places = [(0, 0, 3), (0, THREADS - 1, 3), (BLOCKS - 1, 5, 2)]
    for _ in range(2):
        sent = {(shard, place): [parts_of(chance, machine.words) for _ in range(place[2])] for shard in range(shards) for place in places}
        results = run_all([machine.rounds(shard, *place[:2], parts) for (shard, place), parts in sent.items()], chance)
        for (_, place), got in zip(sent, results, strict=True):
            expected = [as_sent(sent[shard, place][i]) for i in range(place[2]) for shard in range(shards)]
            assert got == [word for part in expected for word in part]
    places_in_use = [word for address, word in machine.memory.words.items() if machine.is_place(address)]
    assert places_in_use and set(places_in_use) == {EMPTY}


@pytest.mark.parametrize("shards", [3, 8])
def test_every_shard_is_sent_its_own(shards: int):
    """Two shots: a round in which each shard is sent another piece, and one in which all are sent the same, again and again."""
    chance, scatter, gather = random.Random(4), Machine(shards, 1, True, scattered=True), Machine(shards, 1, True)
    gather.memory = scatter.memory
    pieces = {shard: [parts_of(chance, 4 * shards) for _ in range(3)] for shard in range(shards)}
    sums = {shard: [parts_of(chance, 4) for _ in range(3)] for shard in range(shards)}

    def both(shard: int):
        results = []
        for piece, total in zip(pieces[shard], sums[shard], strict=True):
            results += [(yield from scatter.one_round(shard, 3, 40, piece)), (yield from gather.one_round(shard, 3, 40, total))]
        return results

    for shard, got in enumerate(run_all([both(shard) for shard in range(shards)], chance)):
        for i in range(3):
            received = [word for sender in range(shards) for word in pieces[sender][i][4 * shard : 4 * shard + 4]]
            assert got[2 * i] == as_sent(received)
            assert got[2 * i + 1] == as_sent([word for sender in range(shards) for word in sums[sender][i]])


def test_kernels_of_other_cuts_share_the_buffers():
    """Each kernel ends on a device before the next begins there; one device may be a kernel ahead."""
    chance, memory = random.Random(3), None
    for vectors in (2, 1, 1, 2, 1):
        machine = Machine(2, vectors, repeated=False)
        machine.memory = memory = memory or machine.memory
        sent = [parts_of(chance, machine.words) for _ in range(2)]
        results = run_all([machine.one_round(shard, 7, 33, sent[shard]) for shard in range(2)], chance)
        assert results == [as_sent(sent[0]) + as_sent(sent[1])] * 2


def test_a_thread_does_not_wait_for_ever():
    machine, seconds = Machine(2, 1, repeated=False), iter(range(1000))
    alone = machine.one_round(0, 0, 0, [1, 2, 3, 4], clock=lambda: next(seconds) * 1_980_000_000)
    with pytest.raises(Trap):
        for steps, _ in enumerate(alone):
            assert steps < 200
    assert next(seconds) in range(10, 20)


def test_a_cut_fits_the_places():
    for shards in range(2, 9):
        layout = ExchangeLayout.of(shards)
        assert layout.nbytes < 64 * 2**20
        for dtype in (BF16, F32):
            for count in (1, 4096, 131072, 2**20, 2**24):
                config = AllReduceConfig.for_elements(count, dtype, layout)
                assert config.threads <= THREADS and config.vectors <= layout.vectors
                assert count <= 2**17 or config.threads >= 256
            for size in (64, 2048, 5120, 8192):
                config = AllReduceConfig.for_rows(size, dtype, layout)
                assert config is None or size <= config.elements(dtype) < 2 * max(size, 256)
    assert AllReduceConfig.for_rows(8192, BF16, ExchangeLayout.of(8)) == AllReduceConfig(1024, 1)
    assert AllReduceConfig.for_rows(16384, BF16, ExchangeLayout.of(2)) == AllReduceConfig(1024, 2)
    assert AllReduceConfig.for_rows(16384, BF16, ExchangeLayout.of(4)) is None


def lower_for_cuda(function, num_shards, shapes, peers=True):
    """Of `function(parts, residual, weight, shards)` on each shard of H200s: how many kernels, how many collectives of XLA's."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((num_shards,), ("tensor",), abstract_device=device)
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec(), PartitionSpec("tensor")
    sharded = jax.shard_map(
        lambda *x: function(*x[:3], Shards(x[3] if peers else None)), mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    table = jax.ShapeDtypeStruct((num_shards, num_shards + 1, 2), jnp.uint32, sharding=NamedSharding(mesh, specs[-1]))
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated; nothing else serves GPUs before sm_90
        text = jax.jit(sharded).trace(*shapes, table).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @__gpu$xla.gpu.triton"), len(re.findall(r"stablehlo\.all_(reduce|gather|to_all)", text))


def shapes_of(num_tokens, size, num_parts=None, dtype=BF16, parts_dtype=None):
    row = (num_tokens, size)
    parts = jax.ShapeDtypeStruct(row if num_parts is None else (num_parts, *row), parts_dtype or dtype)
    return parts, jax.ShapeDtypeStruct(row, dtype), jax.ShapeDtypeStruct((size,), dtype)


def norm_of(parts, residual, weight, shards):
    return all_reduce_add_rms_norm(parts, residual, weight, 1e-5, shards)


def norm_in_float16_of(parts, residual, weight, shards):
    return all_reduce_add_rms_norm(parts, residual, weight, 1e-5, shards, jnp.dtype(jnp.float16))


def sum_of(parts, residual, weight, shards):
    return all_reduce(parts, residual.dtype, shards)


def gather_of(part, residual, weight, shards):
    return all_gather(part, shards)


def dealt_of(part, residual, weight, shards):
    return all_to_all(part, shards, residual[:, 0] > 0)


@pytest.mark.parametrize(
    ("function", "num_shards", "shapes", "calls"),
    [
        (norm_of, 2, shapes_of(8, 4096), (1, 0)),
        (norm_in_float16_of, 2, shapes_of(64, 5120, 4, parts_dtype=F32), (1, 0)),
        (norm_of, 8, shapes_of(8, 8192, 2, dtype=jnp.dtype(jnp.float16)), (1, 0)),
        (norm_of, 8, shapes_of(64, 8192, 2, dtype=jnp.dtype(jnp.float16)), (2, 0)),  # two shots, and the norm's kernel
        (norm_of, 2, shapes_of(256, 2048, dtype=F32), (1, 0)),
        (norm_of, 4, shapes_of(8, 16384), (2, 0)),  # a row of it is too long for the kernel with the norm
        (norm_of, 2, shapes_of(300, 4096), (1, 0)),  # many rows: XLA's norm
        (norm_of, 4, shapes_of(256, 8192), (1, 0)),  # two shots: XLA's norm
        (norm_of, 2, shapes_of(8192, 8192), (0, 1)),
        (sum_of, 2, shapes_of(8, 4096), (1, 0)),
        (sum_of, 3, shapes_of(7, 1000, 2, parts_dtype=F32), (1, 0)),
        (sum_of, 8, shapes_of(64, 8192, 2, parts_dtype=F32), (1, 0)),
        (sum_of, 8, shapes_of(8192, 4096), (0, 1)),
        (gather_of, 2, shapes_of(8, 2, dtype=F32), (1, 0)),  # what shards of a vocabulary tell of each row
        (gather_of, 8, shapes_of(256, 9, dtype=F32), (1, 0)),
        (dealt_of, 2, shapes_of(8, 64128, dtype=F32), (1, 0)),  # the logits of the 8B's vocabulary
        (dealt_of, 4, shapes_of(256, 32064, dtype=F32), (1, 0)),
        (dealt_of, 8, shapes_of(64, 16032, dtype=F32), (1, 0)),
    ],
)
def test_small_sums_of_gpus_are_the_kernels(function, num_shards, shapes, calls):
    assert lower_for_cuda(function, num_shards, shapes) == calls
    assert lower_for_cuda(function, num_shards, shapes, peers=False)[1] == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_shards_that_do_not_reach_each_other_get_the_same_sum(deterministic: bool):
    random_numbers = np.random.default_rng(0)
    parts = random_numbers.standard_normal((8, 2, 5, 24)).astype(np.float32)
    residual, weight = random_numbers.standard_normal((5, 24), np.float32), random_numbers.standard_normal(24, np.float32)
    mesh, everywhere = make_mesh(8), PartitionSpec()
    specs = PartitionSpec("tensor"), everywhere, everywhere
    call = partial(all_reduce_add_rms_norm, eps=1e-5, shards=Shards(deterministic=deterministic))
    step = jax.shard_map(lambda x, *rest: call(x[0], *rest), mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
    got = jax.jit(step)(parts, residual, weight)
    expected = add_rms_norm_reference(jnp.asarray(parts.sum((0, 1))), jnp.asarray(residual), jnp.asarray(weight), 1e-5)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_what_shards_tell_and_deal_out():
    whole, side_by_side, everywhere = np.arange(8 * 20, dtype=np.float32).reshape(8, 20), PartitionSpec(None, "tensor"), PartitionSpec()

    def over_four(function, out_specs):
        function = jax.shard_map(function, mesh=make_mesh(4), in_specs=side_by_side, out_specs=out_specs, check_vma=False)
        return np.asarray(jax.jit(function)(whole))

    told = over_four(lambda part: all_gather(part, Shards()), everywhere)
    np.testing.assert_array_equal(np.concatenate(list(told), axis=1), whole)
    dealt = over_four(lambda part: all_to_all(part, Shards()), PartitionSpec("tensor"))
    np.testing.assert_array_equal(dealt, np.concatenate([whole[shard::4] for shard in range(4)]))


def test_a_buffer_a_device():
    mesh = make_mesh(4)
    assert not exchange.reach_each_other(mesh)
    made = exchange.Exchange(mesh)
    table = np.asarray(made.peers).astype(np.int64)
    buffers = sorted(made._buffers.addressable_shards, key=lambda shard: shard.device.id)
    assert [table[i, 0, 0] for i in range(4)] == [0, 1, 2, 3]
    assert all((table[i, 1:, 0] + (table[i, 1:, 1] << 32) == [b.data.unsafe_buffer_pointer() for b in buffers]).all() for i in range(4))
    control = CONTROL_BYTES // 4
    for buffer in buffers:
        content = np.asarray(buffer.data)[0]
        assert not content[:control].any() and (content[control:] == EMPTY).all() and content.nbytes == ExchangeLayout.of(4).nbytes


def test_the_flag_leaves_sums_to_xla():
    made = [RunnerConfig.from_options(EngineOptions(disable_custom_all_reduce=disabled), "gpu") for disabled in (False, True)]
    assert [config.peer_memory for config in made] == [True, False]


class Driver:
    """CUDA's, of GPUs of which only those of a pair reach each other."""

    def cuDeviceCanAccessPeer(self, answer, device, peer):
        answer._obj.value = device // 2 == peer // 2
        return 0


def test_the_driver_is_asked_for_every_pair(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(exchange.ctypes, "CDLL", lambda name: Driver())
    ask = exchange._can_access.__wrapped__
    assert ask(0, 1) and ask(3, 2) and not caplog.records
    assert not ask(1, 2) and "GPU 1 cannot access GPU 2's memory" in caplog.text
    monkeypatch.setattr(exchange.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert not ask(0, 1)
