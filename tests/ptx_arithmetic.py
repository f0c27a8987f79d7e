"""PTX that widens codes, on arrays of numpy: each register holds a word of many threads at once."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

_DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(jnp.bfloat16), "f32": np.dtype(np.float32)}


def run(text: str, operands: Sequence[np.ndarray], num_results: int = 1) -> list[np.ndarray]:
    """The result registers of one block of instructions, uint32 as the operands, $0 being the first result."""
    registers = {f"${num_results + i}": np.asarray(operand, np.uint32) for i, operand in enumerate(operands)}
    for line in text.strip(" {}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (part.strip() for part in re.findall(r"\{[^}]*\}|[^,\s]+", rest))
        result = _compute(name.split("."), [_value(source, registers) for source in sources])
        if target.startswith("{"):  # the lower half, the upper half
            for i, half in enumerate(target.strip("{}").split(",")):
                registers[half.strip()] = result >> np.uint32(16 * i) & np.uint32(0xFFFF)
        else:
            registers[target] = result
    return [registers[f"${i}"] for i in range(num_results)]


def _value(source: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    if source.startswith("0f"):
        return np.uint32(int(source[2:], 16))
    return registers[source] if source in registers else np.uint32(int(source, 0))


def _compute(kind: list[str], n: list[np.ndarray]) -> np.ndarray:
    match kind:
        case ["mov", "b32"]:
            return n[0]
        case ["and", "b32"]:
            return n[0] & n[1]
        case ["xor", "b32"]:
            return n[0] ^ n[1]
        case ["lop3", "b32"]:
            *bits, table = n
            result = np.uint32(0)
            for index in range(8):  # of the table: a bit for each of what three words' bits can be, the first one's the highest
                if int(table) >> index & 1:
                    a, b, c = (bit if index >> (2 - i) & 1 else ~bit for i, bit in enumerate(bits))
                    result = result | a & b & c
            return np.asarray(result, np.uint32)
        case ["prmt", "b32"]:
            return _permute(*n)
        case ["cvt", "rn", "f16x2", "e4m3x2"]:
            halves = [_floats((n[0] >> np.uint32(8 * i) & np.uint32(255)).astype(np.uint8).view(jnp.float8_e4m3fn)) for i in range(2)]
            return _pair(halves, _DTYPES["f16"])
        case ["cvt", "f32", "f16"]:
            return _words(_floats(n[0].astype(np.uint16).view(np.float16)))
        case ["cvt", "rn", ("bf16x2" | "f16x2") as pair, "f32"]:  # the first operand is the upper one
            return _pair([_float32(n[1]), _float32(n[0])], _DTYPES[pair.removesuffix("x2")])
        case [("sub" | "mul" | "fma") as name, *_, "f32"]:
            return _words(_arithmetic(name, [_float32(x) for x in n]))
        case ["fma", "rn", ("bf16x2" | "f16x2") as pair]:
            dtype = _DTYPES[pair.removesuffix("x2")]
            halves = [[_floats((x >> np.uint32(16 * i)).astype(np.uint16).view(dtype)) for x in n] for i in range(2)]
            return _pair([_arithmetic("fma", half) for half in halves], dtype)
    raise AssertionError(f"an instruction that is not known: {kind}")


def _arithmetic(name: str, n: list[np.ndarray]) -> np.ndarray:
    """In float64, which holds products of float32 exactly."""
    return n[0] - n[1] if name == "sub" else n[0] * n[1] + (n[2] if name == "fma" else 0)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | np.asarray(b, np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        which = int(selector) >> 4 * i & 15
        assert which < 8, "a byte's sign"
        result = result | (both >> np.uint64(8 * which) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * i)
    return result


def _floats(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _float32(words: np.ndarray) -> np.ndarray:
    return _floats(np.asarray(words, np.uint32).view(np.float32))


def _words(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.astype(np.float32)).view(np.uint32)


def _pair(halves: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    lower, upper = (np.asarray(half.astype(np.float32).astype(dtype)).view(np.uint16).astype(np.uint32) for half in halves)
    return lower | upper << np.uint32(16)
