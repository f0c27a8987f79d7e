"""Codes of 4 and 8 bits to numbers of 16 bits inside a Triton kernel, two a register, without an integer-to-float conversion.

A code is put into the mantissa of a number whose unit in the last place is one, and that number's own value is taken away: exact. On a
CPU (interpret mode) the same is said in plain jnp.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt


@dataclass(frozen=True)
class _Magic:
    """Constants of a 16-bit dtype: PTX suffix, the number with unit 1 in its last place, bits that a float8's exponent moves right."""

    suffix: str
    base: int
    float8_shift: int
    float8_factor: float

    @property
    def less_base(self) -> int:
        """The bits of -base."""
        return 0xC300 if self.suffix == "bf16x2" else 0xE400

    @classmethod
    def of(cls, dtype: jnp.dtype) -> "_Magic":
        if dtype == jnp.bfloat16:
            return cls("bf16x2", 128, 4, 2.0**120)
        return cls("f16x2", 1024, 1, 2.0**8)


def _pair(value: float, dtype: jnp.dtype) -> str:
    """The 32 bits that hold a number twice."""
    bits = int(np.asarray(value, np.dtype(jnp.bfloat16) if dtype == jnp.bfloat16 else np.dtype(np.float16)).view(np.uint16))
    return f"0x{bits * 0x10001:08x}"


def _asm(code: str, arguments: Sequence[jax.Array], dtype: jnp.dtype, pack: int) -> jax.Array:
    constraints = ",".join(["=r"] * (pack // 2) + ["r"] * len(arguments))
    result = [jax.ShapeDtypeStruct(arguments[0].shape, dtype)]
    [numbers] = plt.elementwise_inline_asm(code, args=arguments, constraints=constraints, pack=pack, result_shape_dtypes=result)
    return numbers


def addends(zeros: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What to add to a 4-bit code in a mantissa: less the base and the zero, uint8 of any shape, itself put into the mantissa."""
    return lax.bitcast_convert_type(zeros.astype(jnp.uint16) | jnp.uint16(_Magic.of(dtype).less_base), dtype)


def four_bit_numbers(words: jax.Array, plane: int, added: jax.Array, interpret: bool) -> jax.Array:
    """Codes `plane` of uint16 words [N, C] less their zeros, in the dtype of their `addends` [N]."""
    dtype = added.dtype
    added = jnp.broadcast_to(added[:, None], words.shape)
    if interpret:
        return _codes(words, plane).astype(dtype) + _Magic.of(dtype).base + added
    return _asm(four_bit_asm(plane, dtype), [words, added], dtype, 2)


def four_bit_asm(plane: int, dtype: jnp.dtype) -> str:
    """PTX for codes `plane` of two words, $1, less their zeros, in $0; $2 is their addend, twice.

    The codes are shifted into place, cut out and put into the mantissas by one instruction.
    """
    magic = _Magic.of(dtype)
    shift = f"shr.u32 t, $1, {4 * plane};" if plane else "mov.b32 t, $1;"
    return (
        f"{{ .reg .b32 t, o; {shift} mov.b32 o, {_pair(1, dtype)}; lop3.b32 t, t, 0x000f000f, {_pair(magic.base, dtype)}, 0xEA;"
        f" fma.rn.{magic.suffix} $0, t, o, $2; }}"
    )


def scaled_four_bit_asm(plane: int, dtype: jnp.dtype, exact: bool) -> str:
    """As `four_bit_asm`, times a scale, $3 twice, plus the rest of it that dtype does not hold, $4, unless it is exact; for sm_90."""
    code = four_bit_asm(plane, dtype).replace("$0, t, o, $2;", "t, t, o, $2;").removesuffix("}")
    return f"{code} {_scaled('t', '$3', '$4', dtype, exact)} }}"


def scaled_asm(dtype: jnp.dtype, exact: bool) -> str:
    """PTX for two numbers, $1, times a scale, $2 twice, plus the rest of it that dtype does not hold, $3, unless it is exact; for sm_90."""
    return f"{{ .reg .b32 o; {_scaled('$1', '$2', '$3', dtype, exact)} }}"


def _scaled(numbers: str, scale: str, rest: str, dtype: jnp.dtype, exact: bool) -> str:
    suffix = _Magic.of(dtype).suffix
    if exact:
        return f"mul.rn.{suffix} $0, {numbers}, {scale};"
    return f"mul.rn.{suffix} o, {numbers}, {rest}; fma.rn.{suffix} $0, {numbers}, {scale}, o;"


def raised_four_bit_asm(plane: int, dtype: jnp.dtype, zero: int) -> str:
    """PTX for codes `plane` of two words, $1, less a zero, times a scale and plus a minimum, float32 $3, rounded once, in $0.

    $2 is the scale over 16^plane, as codes are cut out where they are: put into the mantissas of float32 that are 2^23.
    """
    unit = 16**plane
    name, less = _Magic.of(dtype).suffix, np.float32(-(2**23) - zero * unit).view(np.uint32)
    code = "{ .reg .b32 t<2>; .reg .f32 f<2>; mov.b32 t0, $1; shr.u32 t1, $1, 16;"
    for i in range(2):
        code += f" lop3.b32 t{i}, t{i}, 0x{15 * unit:x}, 0x4b000000, 0xEA; mov.b32 f{i}, t{i}; add.rn.f32 f{i}, f{i}, 0f{less:08x};"
        code += f" fma.rn.f32 f{i}, f{i}, $2, $3;"
    return f"{code} cvt.rn.{name}.f32 $0, f1, f0; }}"


def byte_planes(numbers: np.ndarray) -> tuple[list[int], list[int]]:
    """The lower and the upper bytes of numbers of 16 bits, four a word."""
    lower, upper = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, 2).T
    return tuple(np.ascontiguousarray(plane).view(np.uint32).tolist() for plane in (lower, upper))


def products_asm(num_parts: int, dtype: jnp.dtype) -> str:
    """PTX for a table of 4 num_parts values times a scale, float32 $(2 num_parts), each rounded once: lower bytes in $0 ..., then upper.

    Of four neighbouring threads, which have a row together, each has four of the values, float32, in the next operands: what others
    have too, if the table is shorter.
    """
    name, scale = _Magic.of(dtype).suffix, 2 * num_parts
    code = "{ .reg .b32 a, b, l, u; .reg .f32 f<4>;"
    for i in range(4):
        code += f" mul.rn.f32 f{i}, ${scale}, ${scale + 1 + i};"
    code += f" cvt.rn.{name}.f32 a, f1, f0; cvt.rn.{name}.f32 b, f3, f2; prmt.b32 l, a, b, 0x6420; prmt.b32 u, a, b, 0x7531;"
    for i in range(2 * num_parts):
        code += f" shfl.sync.idx.b32 ${i}, {'l' if i < num_parts else 'u'}, {i % num_parts}, 0x1c1f, 0xffffffff;"
    return code + " }"


def look_up_asm(half: int, lower: Sequence[str], upper: Sequence[str]) -> str:
    """PTX for what the codes of two words, $2, stand for: those of planes 2 half and 2 half + 1, in $0 and $1.

    PRMT takes four bytes of eight at once, by a selector of four codes: those of both words in both planes are two bytes of $2.

    Args:
        lower, upper: registers or constants with the bytes of the table, four each: 16 bytes; or 8, and those of codes from 8 on are the
            same with another sign, the upper ones' highest bit; or 4, lower ones that are all the same.
    """
    # In a selector the fourth bit would mean a byte's sign; so made a mask of it is what chooses between the halves of a table.
    selector, signs, masks = (0x20, 0x2604, 0xAE8C) if half == 0 else (0x31, 0x3715, 0xBF9D)
    code = "{ .reg .b32 s, t, l, m, u; and.b32 s, $2, 0x77777777; shl.b32 t, $2, 4;"
    code += f" prmt.b32 s, s, 0, 0x{selector:x}; prmt.b32 t, $2, t, 0x{masks if len(upper) == 4 else signs:x};"
    for name, table in (("l", lower), ("u", upper)):
        if len(table) == 1:
            code += f" mov.b32 {name}, {table[0]};"
            continue
        code += f" prmt.b32 {name}, {table[0]}, {table[1]}, s;"
        if len(table) == 4:
            code += f" prmt.b32 m, {table[2]}, {table[3]}, s; lop3.b32 {name}, {name}, m, t, 0xD8;"
    if len(upper) == 2:
        code += " lop3.b32 u, u, t, 0x80808080, 0x78;"
    return f"{code} prmt.b32 $0, l, u, 0x6240; prmt.b32 $1, l, u, 0x7351; }}"


def scale_pair_asm(dtype: jnp.dtype) -> str:
    """PTX for a float32 scale, $2, rounded to dtype, twice in $0, and what that lacks, twice in $1."""
    name = "bf16" if dtype == jnp.bfloat16 else "f16"
    return (
        f"{{ .reg .b16 h, u; .reg .f32 r; cvt.rn.{name}x2.f32 $0, $2, $2; mov.b32 {{h, u}}, $0; cvt.f32.{name} r, h; sub.f32 r, $2, r;"
        f" cvt.rn.{name}x2.f32 $1, r, r; }}"
    )


def addend_pair_asm(dtype: jnp.dtype) -> str:
    """PTX for the addend, twice in $0, of a zero, $1."""
    return f"mad.lo.u32 $0, $1, 0x10001, 0x{_Magic.of(dtype).less_base * 0x10001:08x};"


def _codes(words: jax.Array, plane: int) -> jax.Array:
    return (words >> jnp.uint16(4 * plane)) & jnp.uint16(15)


def table_numbers(words: jax.Array, plane: int, values: tuple[float, ...], dtype: jnp.dtype, interpret: bool) -> jax.Array:
    """What 16 codes stand for, bytes at a time: PRMT chooses among 8 bytes, so twice among the lower and twice among the upper bytes."""
    if interpret:
        codes = _codes(words, plane)
        numbers = jnp.zeros(codes.shape, jnp.float32)
        for code, value in enumerate(values):
            numbers = jnp.where(codes == code, value, numbers)
        return numbers.astype(dtype)
    numbers = np.asarray(values, np.dtype(jnp.bfloat16) if dtype == jnp.bfloat16 else np.dtype(np.float16)).view(np.uint8).reshape(16, 2)
    lower, upper = (np.ascontiguousarray(numbers[:, byte]).view(np.uint32) for byte in (0, 1))
    code = "{ .reg .b32 t, s, m, a<4>, b<4>;"
    for name, table in (("a", lower), ("b", upper)):
        code += "".join(f" mov.b32 {name}{i}, 0x{int(part):08x};" for i, part in enumerate(table))
    code += f" shr.u32 t, $1, {4 * plane}; and.b32 t, t, 0x000f000f; shr.u32 s, t, 12; or.b32 s, s, t; and.b32 s, s, 0x77;"
    code += " prmt.b32 a0, a0, a1, s; prmt.b32 a2, a2, a3, s; prmt.b32 b0, b0, b1, s; prmt.b32 b2, b2, b3, s;"
    code += " prmt.b32 a0, a0, b0, 0x5140; prmt.b32 a2, a2, b2, 0x5140;"
    # The code's highest bit chooses between the halves of the table.
    code += " shr.u32 m, t, 3; and.b32 m, m, 0x00010001; mul.lo.u32 m, m, 0xffff; lop3.b32 $0, a0, a2, m, 0xD8; }"
    return _asm(code, [words], dtype, 2)


def eight_bit_numbers(codes: jax.Array, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    """Codes float8_e4m3fn or int8 [N, C] in dtype, exactly; NaN becomes 480."""
    if interpret:
        return codes.astype(dtype)
    return _asm(eight_bit_asm(codes.dtype, dtype), [lax.bitcast_convert_type(codes, jnp.uint8)], dtype, 4)


def eight_bit_asm(codes_dtype: jnp.dtype, dtype: jnp.dtype) -> str:
    """PTX for the four codes, float8_e4m3fn or int8, of $2, in $0 and $1."""
    if codes_dtype == jnp.int8:
        return _int8_to_bfloat16() if dtype == jnp.bfloat16 else _int8_to_float16()
    magic = _Magic.of(dtype)
    # The byte goes to the upper half, its exponent and mantissa move right into place; the factor is the ratio of the biases.
    spread = 0x7F007F00 >> magic.float8_shift
    code = f"{{ .reg .b32 t, s, c, z; mov.b32 c, {_pair(magic.float8_factor, dtype)}; mov.b32 z, 0x80008000;"
    for result, order in enumerate(("0x1404", "0x3424")):
        code += f" prmt.b32 t, $2, 0, {order}; shr.b32 s, t, {magic.float8_shift}; and.b32 s, s, 0x{spread:08x};"
        code += f" lop3.b32 t, t, 0x80008000, s, 0xEA; fma.rn.{magic.suffix} ${result}, t, c, z;"
    return code + " }"


def _int8_to_bfloat16() -> str:
    """bfloat16's mantissa is too short for 8 bits: by way of float32, four bytes to two registers."""
    code = "{ .reg .b32 t, m; .reg .b32 b<4>; .reg .f32 f<4>; mov.b32 m, 0x4b000000; xor.b32 t, $2, 0x80808080;"
    for i in range(4):  # 2^23 + 128 + code
        code += f" prmt.b32 b{i}, t, m, 0x765{i}; mov.b32 f{i}, b{i}; sub.f32 f{i}, f{i}, 0f4B000080;"
    return code + " cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2; }"


def _int8_to_float16() -> str:
    code = "{ .reg .b32 t, o, z, m; xor.b32 t, $2, 0x80808080; mov.b32 m, 0x64646464; mov.b32 o, 0x3c003c00; mov.b32 z, 0xe480e480;"
    for result, order in enumerate(("0x4140", "0x4342")):  # 1024 + 128 + code
        code += f" prmt.b32 b, t, m, {order}; fma.rn.f16x2 ${result}, b, o, z;"
    return code.replace("m; xor", "m, b; xor") + " }"


def eight_bit_half_asm(codes_dtype: jnp.dtype) -> str:
    """PTX for the four codes, float8_e4m3fn or int8, of $2 in float16, in $0 and $1; for sm_89 and later."""
    if codes_dtype == jnp.int8:
        return _int8_to_float16()
    return "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"


def eight_bit_pair_asm(codes_dtype: jnp.dtype, dtype: jnp.dtype) -> str:
    """PTX for two codes, float8_e4m3fn or int8, the lower half of $1, in $0, exactly; for sm_90."""
    if codes_dtype == jnp.float8_e4m3fn:
        code = "{ .reg .b16 a, b; .reg .b32 t; .reg .f32 f, g; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 t, a;"
        if dtype == jnp.float16:
            return code + " mov.b32 $0, t; }"
        return code + " mov.b32 {a, b}, t; cvt.f32.f16 f, a; cvt.f32.f16 g, b; cvt.rn.bf16x2.f32 $0, g, f; }"
    code = "{ .reg .b32 t, s, b, o; prmt.b32 t, $1, 0, 0x4140;"
    if dtype == jnp.float16:  # 1024 + 128 + code
        code += " mov.b32 o, 0x3c003c00; mov.b32 s, 0xe480e480;"
        return code + " xor.b32 t, t, 0x64806480; fma.rn.f16x2 $0, t, o, s; }"
    # 128 + the lower seven bits, less 128 or, where the sign is set, less 256: that bit is the last of the exponent.
    code += " mov.b32 b, 0x43004300; mov.b32 o, 0xbf80bf80; lop3.b32 s, t, 0x00800080, b, 0xEA; lop3.b32 t, t, 0x007f007f, b, 0xEA;"
    return code + " fma.rn.bf16x2 $0, s, o, t; }"


UPPER_BASE = 2.0**15 + 128  # what the upper of two int8 codes becomes in a float32, more than it is


def scaled_eight_bit_asm(codes_dtype: jnp.dtype, dtype: jnp.dtype, zeros: bool) -> str:
    """As `eight_bit_pair_asm`, less a zero, times a float32 scale, $2, with the rounding of `dequantize`.

    With zeros the last operand is less the scale times the zero. Of int8 codes $3 is less the scale times UPPER_BASE with the zero added:
    where float32 does not hold that, every other number is up to a 512th of the scale off before it is rounded.
    """
    lower = f"fma.rn.f32 f, f, $2, {'$4' if codes_dtype == jnp.int8 else '$3'};" if zeros else "mul.f32 f, f, $2;"
    if codes_dtype == jnp.float8_e4m3fn:
        code = "{ .reg .b16 a, b; .reg .b32 t; .reg .f32 f, g; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 t, a; mov.b32 {a, b}, t;"
        code += f" cvt.f32.f16 f, a; cvt.f32.f16 g, b; {lower} {lower.replace('f, f,', 'g, g,')}"
    else:
        # The upper byte stays where it lies and gets an exponent by which its unit is one; with its sign turned it counts from -128.
        code = "{ .reg .b32 t, u; .reg .f32 f, g; mov.b32 u, 0x47008000; lop3.b32 t, $1, 0x0000ff00, u, 0x6A; mov.b32 g, t;"
        code += f" cvt.rn.f32.s8 f, $1; {lower} fma.rn.f32 g, g, $2, $3;"
    return code + f" cvt.rn.{'bf16' if dtype == jnp.bfloat16 else 'f16'}x2.f32 $0, g, f; }}"
