"""Tokens in SMEM made float16, by one warpgroup, in place: what the tensor cores of mosaic_eight_bit.py and mosaic_four_bit.py take."""

import functools

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxserve.pallas_kernels.mosaic import swizzled
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK

HALF_FACTOR = 16.0  # bfloat16 tokens are divided by it: float16 then holds up to a million, and is 5e-7 from what is small
_PIECE = 32  # columns, 64 bytes among which the swizzle moves a token's
_LANES = 8  # tokens that are swizzled among themselves
TILE_BYTES = _LANES * _PIECE * 2
_RUN = 32  # bytes of 16 columns, in which the order of columns changes
_TO_HALF = (  # two bfloat16, $1, divided by 16
    "{ .reg .f32 a, b; .reg .b32 t; shl.b32 t, $1, 16; mov.b32 a, t; and.b32 t, $1, 0xffff0000; mov.b32 b, t;"
    " mul.f32 a, a, 0f3D800000; mul.f32 b, b, 0f3D800000; cvt.rn.satfinite.f16x2.f32 $0, b, a; }"
)


def halves_in_pairs(ref, dtype) -> None:
    """Tokens [T, C] of a dtype to float16, in place, and four columns that lie together to pairs 8 columns apart.

    A run of 16 columns is two pieces of 16 bytes, which the swizzle leaves neighbours but swaps in every other 128 bytes.
    """
    runs = ref.shape[0] * ref.shape[1] * 2 // _RUN

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(_PIECE, jnp.float16)),))
    def convert(ctx, ref):
        del ctx
        word = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((4,), word)
        constant = functools.partial(mgpu_utils.c, ty=word)
        thread = arith.andi(mgpu_utils.thread_idx(), constant(127))

        def convert_run(run):
            byte = arith.muli(run, constant(_RUN))
            swapped = arith.andi(arith.shrui(byte, constant(3)), constant(16))  # bit 7 to bit 4
            places = [
                llvm.getelementptr(
                    llvm.PointerType.get(3), mgpu_utils.memref_ptr(ref), [at], [-(2**31)], ir.IntegerType.get_signless(8), None
                )
                for at in (arith.addi(byte, swapped), arith.addi(byte, arith.xori(swapped, constant(16))))
            ]
            given = [llvm.load(words, place, alignment=16) for place in places]
            given = [llvm.extractelement(x, constant(i)) for x in given for i in range(4)]
            if dtype == jnp.bfloat16:
                given = [llvm.inline_asm(word, [x], _TO_HALF, "=r,r") for x in given]
            for half, to in enumerate(places):
                vector = llvm.mlir_undef(words)
                for i in range(4):
                    vector = llvm.insertelement(vector, given[2 * i + half], constant(i))
                llvm.store(vector, to, alignment=16)

        for first in range(0, runs, 128):
            run = arith.addi(thread, constant(first))
            if runs - first >= 128:
                convert_run(run)
            else:
                with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.ult, run, constant(runs))):
                    convert_run(run)

    convert(ref)  # pyright: ignore[reportCallIssue]


_SUM_OF_HALVES = "{ .reg .b16 a, b; .reg .f32 c, d; mov.b32 {a, b}, $1; cvt.f32.f16 c, a; cvt.f32.f16 d, b; add.f32 $0, c, d; }"
_STORE_OF_FIRST = "{ .reg .pred p; setp.eq.u32 p, $2, 0; @p st.shared.f32 [$0], $1; }"  # a branch would hold up what comes after


def halves_and_sums(x_ref, sums_ref, unit: float, parts: int, dtype) -> None:
    """Tokens [T, C] of a dtype to float16, in place, and the sums of their groups' columns, times unit, float32 [C / group, T].

    A warp takes a block of 128 columns of two tokens at once, a thread 16 bytes: of the 64 bytes among which the swizzle moves them.
    """
    lanes, columns = x_ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(_PIECE, jnp.float16)), plgpu.RefType()))
    def convert(ctx, x_ref, sums_ref):
        del ctx
        word, byte, single = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8), ir.F32Type.get()
        words = ir.VectorType.get((4,), word)
        constant = functools.partial(mgpu_utils.c, ty=word)
        shared = llvm.PointerType.get(3)

        def pointer(ref, offset, dynamic):
            base = llvm.getelementptr(shared, mgpu_utils.memref_ptr(ref), [dynamic], [-(2**31)], byte, None)
            return llvm.getelementptr(shared, base, [], [offset], byte, None)

        thread = arith.andi(mgpu_utils.thread_idx(), constant(127))
        token, run = arith.shrui(thread, constant(4)), arith.andi(thread, constant(15))
        own = arith.addi(arith.shli(token, constant(6)), arith.shli(arith.andi(run, constant(3)), constant(4)))
        own = arith.addi(own, arith.muli(arith.shrui(run, constant(2)), constant(TILE_BYTES)))
        runs = 16 // parts  # of a group
        of_sums = arith.addi(arith.shli(token, constant(2)), arith.muli(arith.divui(run, constant(runs)), constant(lanes * 4)))
        within = arith.andi(run, constant(runs - 1))
        places = [(n, block) for n in range(lanes // _LANES) for block in range(columns // BLOCK)]
        runs_at = [pointer(x_ref, (n * columns // _PIECE + block * BLOCK // _PIECE) * TILE_BYTES, own) for n, block in places]
        vectors = [llvm.load(words, at, alignment=16) for at in runs_at]
        for (n, block), at, vector in zip(places, runs_at, vectors, strict=True):
            numbers = [llvm.extractelement(vector, constant(i)) for i in range(4)]
            if dtype == jnp.bfloat16:
                numbers = [llvm.inline_asm(word, [x], _TO_HALF, "=r,r") for x in numbers]
                halves = llvm.mlir_undef(words)
                for i, number in enumerate(numbers):
                    halves = llvm.insertelement(halves, number, constant(i))
                llvm.store(halves, at, alignment=16)
            one, two, three, four = (llvm.inline_asm(single, [x], _SUM_OF_HALVES, "=f,r") for x in numbers)
            total = arith.addf(arith.addf(one, two), arith.addf(three, four))
            distance = 1
            while distance < runs:
                total = arith.addf(total, mgpu_utils.shfl_bfly(total, distance))
                distance *= 2
            of_block = pointer(sums_ref, (block * parts * lanes + n * _LANES) * 4, of_sums)
            total = arith.mulf(total, mgpu_utils.c(unit, single))
            operands = [llvm.ptrtoint(word, of_block), total, within]
            llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, _STORE_OF_FIRST, "r,f,r,~{memory}", has_side_effects=True)

    convert(x_ref, sums_ref)  # pyright: ignore[reportCallIssue]
