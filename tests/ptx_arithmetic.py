"""PTX that widens codes, on arrays of numpy: each register holds a word of many threads at once."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

_DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(jnp.bfloat16)}


def run(text: str, operands: Sequence[np.ndarray], num_results: int = 1) -> list[np.ndarray]:
    """The result registers of one block of instructions, uint32 as the operands, $0 being the first result."""
    registers = {f"${num_results + i}": np.asarray(operand).view(np.uint32) for i, operand in enumerate(operands)}
    for line in text.strip(" {}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (part.strip() for part in re.findall(r"\{[^}]*\}|[^,\s]+", rest))
        values = [_value(source, registers) for source in sources]
        result = _compute(name.split("."), list(np.broadcast_arrays(*values, registers[f"${num_results}"]))[: len(values)])
        if target.startswith("{"):  # the lower half, the upper half
            for i, half in enumerate(target.strip("{}").split(",")):
                registers[half.strip()] = result >> np.uint32(16 * i) & np.uint32(0xFFFF)
        else:
            registers[target] = result
    return [registers[f"${i}"] for i in range(num_results)]


def _value(source: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    if source in registers:
        return registers[source]
    return np.asarray(int(source[2:], 16) if source.startswith("0f") else int(source, 0), np.uint32)


def _compute(kind: list[str], n: list[np.ndarray]) -> np.ndarray:
    match kind:
        case ["mov", "b32"]:
            return n[0]
        case ["and", "b32"]:
            return n[0] & n[1]
        case ["xor", "b32"]:
            return n[0] ^ n[1]
        case ["shl", "b32"]:
            return n[0] << n[1]
        case ["shr", ("b32" | "u32")]:
            return n[0] >> n[1]
        case ["mad", "lo", "u32"]:
            return n[0] * n[1] + n[2]
        case ["lop3", "b32"]:
            *bits, table = n
            result = np.zeros_like(n[0])
            for index in range(8):  # of the table: a bit for each of what three words' bits can be, the first one's the highest
                if int(table.flat[0]) >> index & 1:
                    a, b, c = (bit if index >> (2 - i) & 1 else ~bit for i, bit in enumerate(bits))
                    result = result | a & b & c
            return result
        case ["prmt", "b32"]:
            return _permute(*n)
        case ["shfl", "sync", "idx", "b32"]:  # within segments of four threads
            assert set(n[2].flat) == {0x1C1F} and set(n[3].flat) == {0xFFFFFFFF}
            return n[0][np.arange(len(n[0])) // 4 * 4 + n[1]]
        case ["cvt", "rn", "f16x2", "e4m3x2"]:
            return _pair([_floats((n[0] >> np.uint32(8 * i)).astype(np.uint8).view(jnp.float8_e4m3fn)) for i in range(2)], _DTYPES["f16"])
        case ["cvt", "f32", ("bf16" | "f16") as half]:
            return _words(_floats(n[0].astype(np.uint16).view(_DTYPES[half])))
        case ["cvt", "rn", "f32", "s8"]:
            return _words(n[0].astype(np.uint8).view(np.int8))
        case ["cvt", "rn", ("bf16x2" | "f16x2") as pair, "f32"]:  # the first operand is the upper one
            return _pair([_float32(n[1]), _float32(n[0])], _DTYPES[pair.removesuffix("x2")])
        case [("add" | "sub" | "mul" | "fma") as name, *_, "f32"]:
            return _words(_arithmetic(name, [_float32(x) for x in n]))
        case [("add" | "mul" | "fma") as name, "rn", ("bf16x2" | "f16x2") as pair]:
            dtype = _DTYPES[pair.removesuffix("x2")]
            halves = [[_floats((x >> np.uint32(16 * i)).astype(np.uint16).view(dtype)) for x in n] for i in range(2)]
            return _pair([_arithmetic(name, half) for half in halves], dtype)
    raise AssertionError(f"an instruction that is not known: {kind}")


def _arithmetic(name: str, n: list[np.ndarray]) -> np.ndarray:
    """In float64, which holds products of float32 exactly."""
    if name in ("add", "sub"):
        return n[0] + n[1] if name == "add" else n[0] - n[1]
    return n[0] * n[1] + (n[2] if name == "fma" else 0)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Any four of eight bytes; a selector's fourth bit means its sign, eight times."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        which = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> np.uint64(8) * (which & np.uint32(7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(which & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        result = result | byte << np.uint32(8 * i)
    return result


def _floats(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _float32(words: np.ndarray) -> np.ndarray:
    return _floats(np.ascontiguousarray(words).view(np.float32))


def _words(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.astype(np.float32)).view(np.uint32)


def _pair(halves: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    lower, upper = (_rounded(half, dtype).view(np.uint16).astype(np.uint32) for half in halves)
    return lower | upper << np.uint32(16)


def _rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 rounded once, which by way of float32 it would not be."""
    info = jnp.finfo(dtype)
    exponent = np.maximum(np.frexp(x)[1] - 1, int(info.minexp)) - int(info.nmant)  # of the last place's unit
    return np.ldexp(np.round(np.ldexp(x, -exponent)), exponent).astype(dtype)
