"""Exchange: the memory through which the GPUs of one process hand each other parts of a sum, and how a kernel uses it.

On each device lies one buffer for life, an ordinary JAX array, whose address every device is told as data. A thread writes its part into
its place of every device's buffer and waits until the others' parts stand in its own. No flag is sent: a buffer that is empty holds a
word that no part has, and each word is watched by itself, as in the low-latency protocols of NCCL (LL) and of TensorRT-LLM's one-shot
all-reduce ("Lamport" buffers), so that one trip over NVLink is all that a sum waits for; two where it is made in two steps.

A place belongs to one thread of one block. Rounds use two places in turn: a device writes into a place again only two rounds later, and
then it has had the other's part of the round between, which the other sent after it had read and emptied the place. The number of
rounds is counted by each thread in the same buffer. So a buffer may be used by programs of all sizes, one after the other; two sums of
one program must depend on each other, or the devices could take them in different orders.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

MAX_SHARDS = 8
BLOCKS = 128  # all of them must run at once: fewer than a GPU has multiprocessors
THREADS = 1024  # most of a block
VECTOR_BYTES = 16  # that a thread writes or reads at once
EMPTY = 0xFFFFFFFF  # in all dtypes the bits of numbers that are not, and of none that a sum gives
CONTROL_BYTES = BLOCKS * THREADS * 4  # one counter a thread, before the places
_SECONDS_OF_WAITING = 10.0
_CLOCK_HZ = 1.98e9


@dataclass(frozen=True)
class ExchangeLayout:
    """Where the places are.

    Attributes:
        shards: devices.
        vectors: most of VECTOR_BYTES that a thread sends in a round.
    """

    shards: int
    vectors: int

    @classmethod
    def of(cls, shards: int) -> "ExchangeLayout":
        """For a mesh. What a thread reads in a round must fit into its registers."""
        return cls(shards, 2 if shards == 2 else 1)

    @property
    def block_bytes(self) -> int:
        """Of one block's places for the part of one device."""
        return self.vectors * THREADS * VECTOR_BYTES

    @property
    def nbytes(self) -> int:
        """Of the buffer on each device."""
        return CONTROL_BYTES + 2 * self.shards * BLOCKS * self.block_bytes

    def empty(self) -> jax.Array:
        """A buffer's content at the start, uint32 [1, nbytes / 4]."""
        content = jnp.full((1, self.nbytes // 4), EMPTY, jnp.uint32)
        return content.at[:, : CONTROL_BYTES // 4].set(jnp.uint32(0))


def peers_table(addresses: list[int]) -> np.ndarray:
    """What the kernel has to know on each shard: uint32 [shards, shards + 1, 2].

    Row r is shard r's: its index, then every buffer's address, the lower half first.
    """
    shards = len(addresses)
    table = np.zeros((shards, shards + 1, 2), np.uint32)
    table[:, 0, 0] = np.arange(shards)
    table[:, 1:, 0] = [address & 0xFFFFFFFF for address in addresses]
    table[:, 1:, 1] = [address >> 32 for address in addresses]
    return table


def round_asm(layout: ExchangeLayout, vectors: int, pack: int, *, scattered: bool, repeated: bool) -> tuple[str, str]:
    """PTX of one round of a thread, and LLVM's constraints of its operands.

    Results: what each shard sent, `vectors` vectors each. Operands, all read before a result is written: this shard's vectors, or those for
    each shard; then, each `pack` times as Triton hands them over, the block's index, the shard's, and the halves of all addresses. A thread
    that waits for over ten seconds ends the program (trap).

    Args:
        vectors: that the thread sends to a shard.
        pack: elements of an array that it holds.
        scattered: whether each shard is sent vectors of its own; else all are sent the same.
        repeated: whether the thread does another round in the same kernel.
    """
    words = 4 * vectors
    results = [[f"${shard * words + word}" for word in range(words)] for shard in range(layout.shards)]
    first = layout.shards * words
    sent = words * layout.shards if scattered else words
    scalars = [f"${first + sent + pack * i}" for i in range(2 + 2 * layout.shards)]
    block, rank, *addresses = scalars
    stride = BLOCKS * layout.block_bytes
    code = [
        ".reg .pred %empty, %late;",
        ".reg .b32 %thread, %at, %round, %slot, %word<4>;",
        f".reg .b64 %counter, %place, %start, %now, %base<{layout.shards}>, %own, %target, %offset;",
        "mov.u32 %thread, %tid.x;",
        *(f"mov.b64 %base{i}, {{{addresses[2 * i]}, {addresses[2 * i + 1]}}};" for i in range(layout.shards)),
        # The own buffer's address, by index.
        "mov.b64 %own, %base0;",
        *(f"setp.eq.u32 %empty, {rank}, {i};\n@%empty mov.b64 %own, %base{i};" for i in range(1, layout.shards)),
        f"mad.lo.u32 %at, {block}, {THREADS}, %thread;",
        "mad.wide.u32 %counter, %at, 4, %own;",
        "ld.relaxed.sys.global.u32 %round, [%counter];",
        "and.b32 %slot, %round, 1;",
        f"mul.lo.u32 %slot, %slot, {layout.shards};",
        # From a buffer's address to the place of shard 0's part.
        f"mul.wide.u32 %offset, %slot, {stride};",
        f"mad.wide.u32 %offset, {block}, {layout.block_bytes}, %offset;",
        f"mad.wide.u32 %offset, %thread, {VECTOR_BYTES}, %offset;",
        f"add.u64 %offset, %offset, {CONTROL_BYTES};",
        f"mad.wide.u32 %place, {rank}, {stride}, %offset;",
    ]
    for begin in range(first, first + sent, 4):
        # A part must not look like an empty place; these bits are one of many that are not a number.
        for i in range(4):
            code += [f"setp.eq.u32 %empty, ${begin + i}, {EMPTY};", f"selp.b32 %word{i}, 0x7FFFFFFF, ${begin + i}, %empty;"]
        receiver, v = divmod((begin - first) // 4, vectors)
        for i in [receiver] if scattered else range(layout.shards):
            code += [
                f"add.u64 %target, %base{i}, %place;",
                f"st.relaxed.sys.global.v4.b32 [%target + {v * THREADS * VECTOR_BYTES}], {{%word0, %word1, %word2, %word3}};",
            ]
    code += ["add.u64 %own, %own, %offset;", "mov.u64 %start, %clock64;", "wait:"]
    vector_of = [(shard, v, results[shard][4 * v : 4 * v + 4]) for v in range(vectors) for shard in range(layout.shards)]
    for shard, v, registers in vector_of:
        place = f"[%own + {shard * stride + v * THREADS * VECTOR_BYTES}]"
        code += [f"ld.relaxed.sys.global.v4.b32 {{{', '.join(registers)}}}, {place};"]
    code += [f"setp.eq.u32 %empty, {results[0][0]}, {EMPTY};"]
    code += [f"setp.eq.or.u32 %empty, {word}, {EMPTY}, %empty;" for _, _, registers in vector_of for word in registers]
    code += [
        "mov.u64 %now, %clock64;",
        "sub.u64 %now, %now, %start;",
        f"setp.gt.u64 %late, %now, {int(_SECONDS_OF_WAITING * _CLOCK_HZ)};",
        "and.pred %late, %late, %empty;",
        "@%late trap;",
        "@%empty bra wait;",
        f"mov.b32 %word0, {EMPTY};",
    ]
    for shard, v, _ in vector_of:
        place = f"[%own + {shard * stride + v * THREADS * VECTOR_BYTES}]"
        code += [f"st.relaxed.sys.global.v4.b32 {place}, {{%word0, %word0, %word0, %word0}};"]
    code += ["add.u32 %round, %round, 1;", "st.relaxed.sys.global.u32 [%counter], %round;"]
    if repeated:
        # Between kernels their end sees to it that a place is empty before the next part is sent.
        code += ["fence.acq_rel.sys;"]
    operands = sent + pack * len(scalars)
    return "{\n" + "\n".join(code) + "\n}", ",".join(["=r"] * (layout.shards * words) + ["r"] * operands)
