"""Which stored tensors are one quantized weight: told by names, dtypes and shapes."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shardkit.dtypes import DTYPES
from shardkit.errors import RecipeError
from shardkit.recipe.formats.format import Scheme, StoredPart
from shardkit.recipe.formats.schemes import find_schemes
from shardkit.tensor import TensorSpec


@dataclass(frozen=True)
class QuantizedWeight:
    """One logical weight and what stores it.

    Attributes:
        name: What the weight would be called in 16 bits.
        scheme: How it is quantized.
        shape: Its shape `[..., out, in]`.
        parts: Its stored tensors, the codes first.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    parts: tuple[tuple[StoredPart, TensorSpec], ...]

    @property
    def axes(self) -> tuple[str, str]:
        """What its last two dimensions are in 16 bits."""
        return ("in", "out") if self.scheme.format.transposed else ("out", "in")

    def make_spec(self, dtype: str) -> TensorSpec:
        """The tensor that it would be in 16 bits."""
        *lead, out, inputs = self.shape
        sizes = (inputs, out) if self.scheme.format.transposed else (out, inputs)
        return TensorSpec(self.name, dtype, (*lead, *sizes))

    @property
    def codes(self) -> TensorSpec:
        """The tensor that holds its elements."""
        return self.parts[0][1]


@dataclass(frozen=True)
class Grouping:
    """A checkpoint's quantized weights.

    Attributes:
        weights: They, by the names of their codes.
        codes_by_part: Of each stored tensor of theirs, the name of the codes.
        constants: Tensors that every rank holds and nothing is computed with.
    """

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    codes_by_part: Mapping[str, str] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()

    @cached_property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes that some weight is of."""
        schemes: list[Scheme] = []
        for weight in self.weights.values():
            if not any(weight.scheme is each for each in schemes):
                schemes.append(weight.scheme)
        return tuple(schemes)


def is_plain(spec: TensorSpec) -> bool:
    """Whether a tensor is what models compute with, or at most one row of integers or flags.

    If all of them are, what a config says of quantization is of another form of the checkpoint.
    """
    dtype = DTYPES[spec.dtype]
    is_row = math.prod(spec.shape) == max(spec.shape, default=1)
    return dtype.is_compute or (dtype.kind in ("int", "bool") and is_row)


def group_quantized(specs: Sequence[TensorSpec], schemes: Iterable[Scheme]) -> Grouping:
    """Group the tensors of a checkpoint by the weights that they store.

    Raises:
        RecipeError: For a tensor whose shape is not what its scheme makes of its weight's, or for
            a quantized weight without what it takes to compute it.
    """
    schemes = tuple(schemes)
    if not schemes:
        return Grouping()
    by_name = {spec.name: spec for spec in specs}
    weights: dict[str, QuantizedWeight] = {}
    alike: dict[object, tuple[tuple[int, ...], str]] = {}
    for spec in specs:
        if DTYPES[spec.dtype].is_compute:
            continue
        if (weight := _find_weight(spec, by_name, schemes, alike)) is not None:
            weights[spec.name] = weight
    codes_by_part = {part.name: codes for codes, w in weights.items() for _, part in w.parts}
    suffixes = {suffix for scheme in schemes for suffix in scheme.format.constants}
    constants = {
        name
        for name in by_name
        if name.rpartition(".")[2] in suffixes and name not in codes_by_part
    }
    _check_unmatched(specs, codes_by_part, constants, schemes)
    return Grouping(weights, codes_by_part, frozenset(constants))


def group_checkpoint(specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> Grouping:
    """Group the tensors of a checkpoint by what its config says of quantization.

    A config that says something of plain weights is of another form of the checkpoint. Raises
    RecipeError as `find_schemes` and `group_quantized` do.
    """
    if all(map(is_plain, specs)):
        return Grouping()
    return group_quantized(specs, find_schemes(config))


def list_weights(specs: Sequence[TensorSpec], grouping: Grouping) -> tuple[TensorSpec, ...]:
    """The tensors of a checkpoint, each quantized weight as one, as it would be in 16 bits."""
    if not grouping.weights:
        return tuple(specs)
    dtype = find_plain_dtype(specs, grouping)
    weights: list[TensorSpec] = []
    for spec in specs:
        if spec.name in grouping.weights:
            weights.append(grouping.weights[spec.name].make_spec(dtype))
        elif spec.name not in grouping.codes_by_part and spec.name not in grouping.constants:
            weights.append(spec)
    return tuple(weights)


def find_plain_dtype(specs: Iterable[TensorSpec], grouping: Grouping) -> str:
    """The dtype that quantized weights would have: that of most tensors beside them."""
    stored = Counter(
        spec.dtype
        for spec in specs
        if spec.name not in grouping.codes_by_part and DTYPES[spec.dtype].is_compute
    )
    return max(stored, key=stored.__getitem__, default="BF16")


def _find_weight(
    spec: TensorSpec,
    by_name: Mapping[str, TensorSpec],
    schemes: Sequence[Scheme],
    alike: dict[object, tuple[tuple[int, ...], str]],
) -> QuantizedWeight | None:
    """The weight that a tensor holds the codes of, by the first scheme that its like fit.

    `alike` has the shape of a weight, and what is wrong, for parts of each dtype and shape.
    """
    fault = ""
    for number, scheme in enumerate(schemes):
        codes = scheme.format.codes
        tail = codes.name_after("")
        if spec.dtype not in codes.dtypes or not spec.name.endswith(tail):
            continue
        base = spec.name.removesuffix(tail)
        parts = _find_parts(base, by_name, scheme)
        if parts is None:
            continue
        key = (number, *((part.shape, part.dtype) for _, part in parts))
        name = base if codes.follows_parameter else f"{base}.weight"
        if key not in alike:
            shape = _find_shape(spec, codes, scheme)
            alike[key] = shape, _find_odd_shape(QuantizedWeight(name, scheme, shape, parts))
        shape, fault = alike[key]
        if not fault:
            return QuantizedWeight(name, scheme, shape, parts)
    if fault:
        raise RecipeError(fault)
    return None


def _find_parts(
    base: str, by_name: Mapping[str, TensorSpec], scheme: Scheme
) -> tuple[tuple[StoredPart, TensorSpec], ...] | None:
    """What is stored of a weight; None if something lacks, or is of another dtype."""
    parts: list[tuple[StoredPart, TensorSpec]] = []
    for each in scheme.format.tensors:
        part = by_name.get(each.name_after(base))
        if part is None:
            if each.optional:
                continue
            return None
        if each.dtypes and part.dtype not in each.dtypes:
            return None
        parts.append((each, part))
    return tuple(parts)


def _find_shape(spec: TensorSpec, codes: StoredPart, scheme: Scheme) -> tuple[int, ...]:
    """The shape `[..., out, in]` of the weight whose codes a tensor holds."""
    lead = len(spec.shape) - len(codes.axes)
    if lead < 0:
        raise RecipeError(
            f"{spec.name}: has {len(spec.shape)} dimensions, fewer than the {len(codes.axes)} of"
            f" {scheme.format.title}"
        )
    sizes = {"out": 1, "in": 1}
    for axis, size in zip(codes.axes, spec.shape[lead:], strict=True):
        if axis.axis:
            sizes[axis.axis] = size * (scheme.count_per_index(codes, axis, spec.dtype) or 1)
    return (*spec.shape[:lead], sizes["out"], sizes["in"])


def expect_shape(weight: QuantizedWeight, tensor: StoredPart, dtype: str) -> tuple[int, ...]:
    """The shape that a stored tensor of a weight has, all of its axes there."""
    sizes = dict(zip(("out", "in"), weight.shape[-2:], strict=True))
    shape = []
    for axis in tensor.axes:
        per = weight.scheme.count_per_index(tensor, axis, dtype)
        if axis.axis:
            shape.append(1 if per is None else math.ceil(sizes[axis.axis] / per))
        else:
            shape.append(per or 1)
    return tuple(shape)


def _find_odd_shape(weight: QuantizedWeight) -> str:
    """A part whose shape is not what the scheme makes of the weight's, in words; else empty."""
    for tensor, part in weight.parts:
        expected = expect_shape(weight, tensor, part.dtype)
        lead = weight.shape[:-2]
        if part.shape in (expected, (*lead, *expected)) or math.prod(part.shape) == 1:
            continue
        if math.prod(expected) == 1 and math.prod(part.shape) == math.prod(lead):
            continue  # one number for each of a stack
        return (
            f"{part.name}: has the shape {list(part.shape)}, but {weight.scheme.format.title}"
            f" makes {[*lead, *expected]} of a weight {list(weight.shape)}; correct"
            " quantization_config, or fetch the weights again"
        )
    return ""


def _check_unmatched(
    specs: Sequence[TensorSpec],
    codes_by_part: Mapping[str, str],
    constants: set[str],
    schemes: Sequence[Scheme],
) -> None:
    """Raise RecipeError for a quantized weight that lacks what it takes to compute it."""
    titles = " or ".join(dict.fromkeys(scheme.format.title for scheme in schemes))
    for spec in _list_unmatched(specs, codes_by_part, constants):
        for scheme in schemes:
            codes = scheme.format.codes
            tail = codes.name_after("")
            if spec.dtype in codes.dtypes and spec.name.endswith(tail) and len(spec.shape) > 1:
                base = spec.name.removesuffix(tail)
                needs = [t.name_after(base) for t in scheme.format.tensors[1:] if not t.optional]
                raise RecipeError(
                    f"{spec.name}: is {spec.dtype}, but there is no {' and '.join(needs)} of"
                    f" {titles} that fits; fetch the weights again"
                )


def _list_unmatched(
    specs: Sequence[TensorSpec], codes_by_part: Mapping[str, str], constants: set[str]
) -> Iterator[TensorSpec]:
    known = codes_by_part.keys() | constants
    for spec in specs:
        if not DTYPES[spec.dtype].is_compute and spec.name not in known:
            yield spec
