"""Checkpoints of compressed-tensors (llm-compressor): groups of modules, each with its format, and a list of modules left dense."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import regex

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.models.fields import Fields
from jaxserve.models.formats.fp8 import read_scales, scale_tensors, stored_fp8
from jaxserve.models.formats.mxfp4 import mxfp4_scheme
from jaxserve.models.formats.packed_integers import read_packed, signed
from jaxserve.models.formats.quantization import HEAD, LINEAR, Quantization, Rule, compiled, names_of
from jaxserve.models.formats.scheme import WORDS, Scheme, Tensors, Unpacked, cut_groups, sorted_columns
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import Layout

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized")
_LINEAR, _EXPRESSION = "Linear", "re:"
_MOST_REPEATED = 10_000


def read_compressed_tensors(fields: Fields) -> Quantization:
    """What a quantization_config of compressed-tensors says; one of a KV cache alone nothing of weights.

    Names go before expressions, and these before classes, whichever group they are in (compressed_tensors.utils.match.match_targets).

    Raises:
        UnsupportedModel: an option that no code here serves; one line that names it.
    """
    for name in ("sparsity_config", "transform_config"):
        if (value := fields.values.get(name)) and not (isinstance(value, Mapping) and value.get("format", "") == "dense"):
            raise UnsupportedModel(f"{fields.file}: {name} is not supported")
    groups = fields.values.get("config_groups")
    if groups == {} and fields.values.get("kv_cache_scheme") is not None:
        return Quantization()
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise UnsupportedModel(f"{fields.file}: config_groups must be an object with groups in it")
    rules = [Rule(_pattern(name), -1) for name in names_of(fields, "ignore")]
    targets: list[tuple[str, int]] = []
    schemes: list[Scheme] = []
    for name, group in groups.items():
        part = Fields(group, f"{fields.file}: {name:.80}")
        targets += [(target, len(schemes)) for target in names_of(part, "targets")]
        schemes.append(_scheme(part, str(group.get("format") or fields.values.get("format"))))
    rules += [Rule(_pattern(target), scheme) for target, scheme in sorted(targets, key=lambda one: _generality(one[0]))]
    return Quantization("compressed-tensors", tuple(schemes), tuple(rules))


def _generality(target: str) -> int:
    """0: a name; 1: an expression; 2: a class."""
    return 2 if target == _LINEAR else int(target.startswith(_EXPRESSION))


def _pattern(target: str) -> str:
    """A regular expression for a target: a class of modules, a regular expression, a module's name or one that it is in."""
    if target == _LINEAR:
        return f"{LINEAR}|{HEAD}"
    if not target.startswith(_EXPRESSION):
        return rf"(.*\.)?{re.escape(target)}"
    pattern = f"(?:{target[3:]}).*"
    # `regex` writes out what is counted, {1000} of {1000} too.
    if math.prod(int((most or least or "1")[:9]) or 1 for least, most in re.findall(r"\{(\d*),?(\d*)\}", pattern)) > _MOST_REPEATED:
        raise UnsupportedModel(f"config.json: quantization_config: {target[3:]!r:.80} repeats too much")
    try:
        compiled(target[3:])
        compiled(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise UnsupportedModel(f"config.json: quantization_config: {target[3:]!r:.80} is no regular expression: {error}") from None
    return pattern


def _scheme(group: Fields, form: str) -> Scheme:
    if form not in _FORMATS:
        raise UnsupportedModel(f"{group.file}: format {form:.80} is not supported ({', '.join(_FORMATS)} are)")
    weights = Fields(_object(group, "weights"), f"{group.file}: weights")
    bits, kind, strategy = weights.integer("num_bits"), weights.values.get("type"), weights.values.get("strategy")
    if form == "mxfp4-pack-quantized":
        if (bits, kind, weights.integer("group_size", 32)) != (4, "float", 32):
            raise UnsupportedModel(
                f"{weights.file}: format {form} is 4 bits of type 'float' in groups of 32, and nothing else is supported"
            )
        return mxfp4_scheme("packed")
    known = {"float-quantized": [("float", 8)], "naive-quantized": [("float", 8), ("int", 8)], "int-quantized": [("int", 8)]}
    if (kind, bits) not in known.get(form, [("int", 4), ("int", 8)]):
        raise UnsupportedModel(f"{weights.file}: {bits} bits of type {kind!r:.80} in format {form} are not supported")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise UnsupportedModel(f"{weights.file}: strategy {strategy!r:.80} is not supported (tensor, channel, group and block are)")
    size = weights.integer("group_size", 128) if strategy == "group" else 0
    order = weights.values.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic", True):
        raise UnsupportedModel(f"{weights.file}: actorder {order!r:.80} is not supported")
    rounded, static = _activations(group, kind)
    if kind == "float":
        if not weights.boolean("symmetric", True):
            raise UnsupportedModel(f"{weights.file}: zero points of floats are not supported (symmetric: false)")
        block = weights.values.get("block_structure")
        if strategy == "block" and not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise UnsupportedModel(f"{weights.file}: block_structure must be two sizes. Given: {block!r:.80}")
        rows, columns = (block[0], block[1]) if strategy == "block" and isinstance(block, list) else (1, size)
        scheme = stored_fp8("block" if strategy == "group" else strategy, static=static, block=(rows, columns))
        return scheme if rounded else Scheme(scheme.stored, Layout("fp8", columns), columns, scheme.group_rows, variant=scheme.variant)
    if strategy == "block":
        raise UnsupportedModel(f"{weights.file}: strategy block is not supported for integers")
    correction = "none" if weights.boolean("symmetric", True) else "zero"
    eight = bits == 8
    if not eight and size % 2:
        raise UnsupportedModel(f"{weights.file}: group_size {size} is not supported (even ones are: two codes of 4 bits make a byte)")
    layout = Layout("int8" if eight else "int4", size, correction, "float16", "int8" if rounded and eight else "", static and eight)
    ordered = order not in ("group", "dynamic", True) or not size
    stored = "packed" if form == "pack-quantized" else "int8"
    return Scheme(stored, layout, size, 0 if strategy == "tensor" else 1, ordered, "weight_scale")


def _activations(group: Fields, kind: Any) -> tuple[bool, bool]:
    """Whether products may round activations as the weights are, and whether the checkpoint has their scale."""
    if group.values.get("input_activations") is None:
        return False, False
    given = Fields(_object(group, "input_activations"), f"{group.file}: input_activations")
    # Where activations are not rounded as ours would be, they are left as they are, which is more exact.
    rounded = given.values.get("num_bits") == 8 and given.values.get("type") == kind and given.boolean("symmetric", True)
    dynamic = given.values.get("dynamic") in (True, "local")
    return rounded, rounded and not dynamic and given.values.get("strategy", "tensor") == "tensor"


def _object(fields: Fields, name: str) -> Mapping[str, Any]:
    value = fields.values.get(name)
    if not isinstance(value, Mapping):
        raise UnsupportedModel(f"{fields.file}: {name} must be an object. Given: {value!r:.80}")
    return value


class PackedStorage:
    """Integers of 4 or 8 bits: `weight_packed` int32 [n, k / (32 / bits)], `weight_scale` [n, groups], `weight_zero_point` int32, whose
    words pack rows."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        count, groups = 32 // scheme.layout.bits, -(-k // (scheme.group or k))
        return (
            Stored(f"{module}.weight_packed", (n, -(-k // count)), WORDS),
            *scale_tensors(scheme, module, n, k),
            Stored(f"{module}.weight_zero_point", (-(-n // count), groups), WORDS, optional=scheme.layout.correction == "none"),
            Stored(f"{module}.weight_shape", (2,), ("I64", "I32"), optional=True),
            Stored(f"{module}.weight_g_idx", (k,), WORDS, optional=scheme.ordered),
        )

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        bits = scheme.layout.bits
        part = read_scales(scheme, tensors, module, rows, columns)
        part["codes"] = signed(np.ascontiguousarray(read_packed(tensors, f"{module}.weight_packed", columns, rows, bits, axis=1)), bits)
        if scheme.layout.correction == "zero":
            name = f"{module}.weight_zero_point"
            zeros = read_packed(tensors, name, rows, slice(0, tensors.shapes[name][1]), bits, axis=0)
            part["zeros"] = cut_groups(zeros.T.astype(np.int16) - np.int16(2 ** (bits - 1)), columns, scheme)
        order = sorted_columns(scheme, tensors, f"{module}.weight_g_idx")
        if order is not None:
            part |= {"codes": part["codes"][:, order], "permutation": order}
        return part


def check_packed(scheme: Scheme, tensors: Tensors, module: str, n: int, k: int) -> None:
    """Compare what the tensors of a module tell with the configuration.

    Raises:
        WeightsError: `weight_shape` is another one, or there are zero points that are not zero in spite of "symmetric".
    """
    name = f"{module}.weight_shape"
    if name in tensors.shapes and (told := tensors.read(name, (slice(0, 2),)).tolist()) != [n, k]:
        raise WeightsError(f"{name} is {told}, not {[n, k]}")
    # A word of zero points that are zero: each is stored with half of the range added to it.
    _check_zeros(scheme, tensors, f"{module}.weight_zero_point", -0x77777778 if scheme.layout.bits == 4 else -0x7F7F7F80)


def check_int8(scheme: Scheme, tensors: Tensors, module: str, n: int, k: int) -> None:
    """As `check_packed`; activations with a static scale have no zero point either."""
    del n, k
    _check_zeros(scheme, tensors, f"{module}.weight_zero_point", 0)
    if scheme.layout.static:
        _check_zeros(replace(scheme, layout=replace(scheme.layout, correction="none")), tensors, f"{module}.input_zero_point", 0)


def _check_zeros(scheme: Scheme, tensors: Tensors, name: str, zero: int) -> None:
    if scheme.layout.correction != "none" or name not in tensors.shapes:
        return
    if (tensors.read(name, tuple(slice(0, size) for size in tensors.shapes[name])) != zero).any():
        raise WeightsError(f"{name} is not zero, though quantization_config says symmetric")


class Int8Storage:
    """Integers of 8 bits: `weight` int8 [n, k], `weight_scale`, `weight_zero_point` int8 of the same shape."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        scales, *others = scale_tensors(scheme, module, n, k)
        zeros = Stored(f"{module}.weight_zero_point", scales.shape, ("I8",), optional=scheme.layout.correction == "none")
        # Of static activations with zero points, which are not rounded here.
        input_zeros = Stored(f"{module}.input_zero_point", (), ("I8",), optional=True)
        return (Stored(f"{module}.weight", (n, k), ("I8",)), scales, *others, zeros, input_zeros)

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        part = {"codes": tensors.read(f"{module}.weight", (rows, columns)), **read_scales(scheme, tensors, module, rows, columns)}
        if scheme.layout.correction == "zero":
            name = f"{module}.weight_zero_point"
            zeros = tensors.read(name, tuple(slice(0, size) for size in tensors.shapes[name])).reshape(
                -1, (tensors.shapes[name] or (1,))[-1]
            )
            whole = np.broadcast_to(zeros.astype(np.int16), (rows.stop, zeros.shape[1])) if zeros.shape[0] == 1 else zeros.astype(np.int16)
            part["zeros"] = cut_groups(whole[rows], columns, scheme)
        return part
