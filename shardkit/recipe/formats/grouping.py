"""Which stored tensors are one quantized weight: told by names, dtypes and shapes."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from shardkit.dtypes import DTYPES
from shardkit.errors import RecipeError
from shardkit.recipe.formats.format import Scheme, StoredPart
from shardkit.recipe.formats.schemes import find_schemes
from shardkit.recipe.formats.weights import AlikeWeights, Grouping, WeightKind
from shardkit.tensor import AlikeTensors, TensorSpec, TensorTable


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
    schemes, table = tuple(schemes), TensorTable.of(specs)
    if not schemes:
        return Grouping()
    groups: dict[str, AlikeTensors] = {}
    for each in table.alike:
        groups |= dict.fromkeys(each.names, each)
    used = [scheme for scheme in schemes if _is_stored(scheme, table)]
    alike = [
        weights
        for each in table.alike
        if not DTYPES[each.dtype].is_compute
        for weights in _find_weights(each, groups, used)
    ]
    tails = tuple(f".{suffix}" for scheme in schemes for suffix in scheme.format.constants)
    parts = set[str]().union(*(part.names for each in alike for part in each.parts))
    named = (each.leave_out(parts) for each in table.alike if each.pattern.endswith(tails))
    grouping = Grouping(tuple(alike), tuple(each for each in named if each is not None))
    _check_unmatched(table, grouping, schemes)
    return grouping


def group_checkpoint(specs: Sequence[TensorSpec], config: Mapping[str, Any]) -> Grouping:
    """Group the tensors of a checkpoint by what its config says of quantization.

    A config that says something of plain weights is of another form of the checkpoint. Raises
    RecipeError as `find_schemes` and `group_quantized` do.
    """
    specs = TensorTable.of(specs)
    if all(map(is_plain, specs.examples)):
        return Grouping()
    return group_quantized(specs, find_schemes(config))


def list_weights(specs: Iterable[TensorSpec], grouping: Grouping) -> TensorTable:
    """The tensors of a checkpoint, each quantized weight as one, as it would be in 16 bits."""
    table = TensorTable.of(specs)
    if not grouping.alike:
        return table
    dtype = find_plain_dtype(table, grouping)
    plain = filter(None, map(grouping.leave_plain, table.alike))
    weights = (each.make_alike(dtype) for each in grouping.alike)
    return TensorTable.of_alike((*plain, *weights))


def find_plain_dtype(specs: Iterable[TensorSpec], grouping: Grouping) -> str:
    """The dtype that quantized weights would have: that of most tensors beside them."""
    stored: Counter[str] = Counter()
    for plain in filter(None, map(grouping.leave_plain, TensorTable.of(specs).alike)):
        if DTYPES[plain.dtype].is_compute:
            stored[plain.dtype] += len(plain.names)
    return max(stored, key=stored.__getitem__, default="BF16")


def _is_stored(scheme: Scheme, table: TensorTable) -> bool:
    """Whether there are tensors of all the names that a scheme needs."""
    tails = [each.name_after("") for each in scheme.format.tensors if not each.optional]
    return all(any(each.pattern.endswith(tail) for each in table.alike) for tail in tails)


def _find_weights(
    codes: AlikeTensors, groups: Mapping[str, AlikeTensors], schemes: Sequence[Scheme]
) -> Iterator[AlikeWeights]:
    """The weights that tensors hold the codes of, each by the first scheme that it fits.

    Raises RecipeError for a weight of which a shape is wrong, and that is of no other scheme.

    Args:
        codes: What may be codes.
        groups: For each tensor's name, those that it is alike.
        schemes: How weights may be quantized.
    """
    names, faults = codes.names, dict[str, str]()
    for scheme in schemes:
        tails = [each.name_after("") for each in scheme.format.tensors]
        first = scheme.format.codes
        if codes.dtype not in first.dtypes or not codes.pattern.endswith(tails[0]):
            continue
        bases = [name.removesuffix(tails[0]) for name in names]
        columns = [[groups.get(base + tail) for base in bases] for tail in tails]
        by_parts: dict[tuple[AlikeTensors | None, ...], list[str]] = {}
        for base, parts in zip(bases, zip(*columns, strict=True), strict=True):
            by_parts.setdefault(parts, []).append(base)
        names = []
        for parts, same in by_parts.items():
            kind = _find_kind(scheme, same[0], parts)
            if isinstance(kind, WeightKind):
                end = "" if first.follows_parameter else ".weight"
                stored = _name_parts(same, tails, parts)
                yield AlikeWeights(kind, [base + end for base in same], stored)
            else:
                others = [base + tails[0] for base in same]
                names += others
                faults |= dict.fromkeys(others, kind) if kind else {}
    if fault := next((faults[name] for name in names if name in faults), ""):
        raise RecipeError(fault)


def _name_parts(
    bases: Sequence[str], tails: Sequence[str], parts: Sequence[AlikeTensors | None]
) -> tuple[AlikeTensors, ...]:
    """What is stored of each weight, in the order of their names."""
    return tuple(
        part.with_names([base + tail for base in bases])
        for tail, part in zip(tails, parts, strict=True)
        if part is not None
    )


def _find_kind(
    scheme: Scheme, base: str, stored: Sequence[AlikeTensors | None]
) -> WeightKind | str:
    """The kind of a weight of which these are stored, None for one that is not.

    If it is of another scheme, the answer is empty; if a shape is wrong, it says which.
    """
    parts: list[tuple[StoredPart, TensorSpec]] = []
    for each, part in zip(scheme.format.tensors, stored, strict=True):
        if part is None and each.optional:
            continue
        if part is None or (each.dtypes and part.dtype not in each.dtypes):
            return ""
        parts.append((each, TensorSpec(each.name_after(base), part.dtype, part.shape)))
    codes, spec = parts[0]
    tensors = tuple(each for each, _ in parts)
    kind = WeightKind(scheme, _find_shape(spec, codes, scheme), tensors)
    return _find_odd_shape(kind, parts) or kind


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


def expect_shape(weight: WeightKind, tensor: StoredPart, dtype: str) -> tuple[int, ...]:
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


def _find_odd_shape(weight: WeightKind, parts: Iterable[tuple[StoredPart, TensorSpec]]) -> str:
    """A part whose shape is not what the scheme makes of the weight's, in words; else empty."""
    for tensor, part in parts:
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


def _check_unmatched(table: TensorTable, grouping: Grouping, schemes: Sequence[Scheme]) -> None:
    """Raise RecipeError for a quantized weight that lacks what it takes to compute it."""
    titles = " or ".join(dict.fromkeys(scheme.format.title for scheme in schemes))
    for each in table.alike:
        if DTYPES[each.dtype].is_compute or (plain := grouping.leave_plain(each)) is None:
            continue
        spec = plain.first
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
