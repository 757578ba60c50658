"""Writes quantized checkpoints to the formats' specifications, to prove shardkit on.

The numbers are not a good quantization of a model; they are one whose every part matters.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shardkit.authoring.masked_sum import WEIGHT_FILE
from shardkit.dtypes import DTYPES
from shardkit.recipe.formats import Format, Scheme, StoredPart, find_schemes

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
TOTAL_SCALE = 0.125  # of a weight that has one for its blocks, too

Tensors = dict[str, torch.Tensor]


def quantize_folder(
    folder: Path,
    form: Format,
    statement: Mapping[str, Any],
    chooses: Callable[[str], bool],
    options: Collection[str] = (),
) -> None:
    """Quantize the weights of a checkpoint that are chosen by name, in place.

    Args:
        folder: A checkpoint of one safetensors file.
        form: The format.
        statement: What config.json is to say of it.
        chooses: Says of a tensor's name whether it is quantized.
        options: The suffixes of optional tensors that are written, too.
    """
    path = folder / WEIGHT_FILE
    schemes = find_schemes({"quantization_config": statement})
    scheme = next(scheme for scheme in schemes if scheme.format is form)
    tensors = load_file(path)
    stored: Tensors = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        is_named = form.codes.follows_parameter or name.endswith(".weight")
        if tensor.ndim == count_dims(form) and chooses(name) and is_named:
            generator = torch.Generator().manual_seed(number)
            stored |= quantize_weight(name, tensor.float(), scheme, generator, options)
        else:
            stored[name] = tensor
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(statement)
    (folder / "config.json").write_text(json.dumps(config))


def count_dims(form: Format) -> int:
    """How many dimensions a weight has that a format quantizes: a stack has one more."""
    return 3 if form.codes.follows_parameter else 2


def quantize_weight(
    name: str,
    weight: torch.Tensor,
    scheme: Scheme,
    generator: torch.Generator,
    options: Collection[str] = (),
) -> Tensors:
    """The tensors that store a weight, by name.

    Args:
        name: What the weight is called in 16 bits.
        weight: The weight as it is in 16 bits, in float32.
        scheme: The format and its numbers.
        generator: Of what is chosen at random: zero points, and the groups of inputs.
        options: The suffixes of optional tensors that are written, too.
    """
    form = scheme.format
    weight = weight.mT if form.transposed else weight
    is_parameter = form.codes.follows_parameter
    base = name if is_parameter else name.removesuffix(".weight")
    stored: Tensors = {}
    groups = None
    if form.group_index is not None and _is_written(form.group_index, options):
        per = _count_group(scheme) or weight.shape[-1]
        groups = torch.randperm(weight.shape[-1], generator=generator) // per
        stored[form.group_index.name_after(base)] = groups.to(torch.int32)
    factor = torch.ones_like(weight)
    for scale in reversed(form.scales):  # the one of the whole weight first
        value, spread = _make_scale(weight / factor, scale, scheme, groups)
        stored[scale.name_after(base)] = value
        factor = factor / spread if scale.divides else factor * spread
    codes, zero = weight / factor, torch.zeros(())
    if form.zero_point is not None and _is_written(form.zero_point, options):
        zero_point, zero = _make_zero_point(form.zero_point, weight, scheme, groups, generator)
        stored[form.zero_point.name_after(base)] = zero_point
    stored[form.codes.name_after(base)] = encode_numbers(codes + zero, form.codes, scheme)
    for other in form.others:
        stored[other.name_after(base)] = _make_other(other, weight, scheme)
    return {key: tensor.contiguous() for key, tensor in stored.items()}


def _is_written(tensor: StoredPart, options: Collection[str]) -> bool:
    return not tensor.optional or tensor.suffix in options


def _count_group(scheme: Scheme) -> int | None:
    """How many inputs have one scale; None for all."""
    axis = next(axis for axis in scheme.format.scales[0].axes if axis.axis == "in")
    return scheme.resolve(axis.per)


def count_codes(scheme: Scheme) -> float:
    """The largest number that codes of a scheme hold."""
    codes = scheme.format.codes
    if codes.element == "uint":
        return float(2 ** ((scheme.resolve(codes.bits) or 0) - 1) - 1)
    return float(FP4[-1]) if codes.element == "e2m1" else find_largest(codes.dtypes[0])


def find_largest(name: str) -> float:
    """The largest number of a dtype."""
    dtype = getattr(torch, DTYPES[name].torch_name)
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return float(info.max)


def _make_scale(
    weight: torch.Tensor, scale: StoredPart, scheme: Scheme, groups: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale as it is stored, and one for each element, as the stored one says."""
    most = count_codes(scheme)
    is_total = all(axis.per == "all" for axis in scale.axes)
    if is_total and len(scheme.format.scales) > 1:
        number = 1 / TOTAL_SCALE if scale.divides else TOTAL_SCALE
        value = torch.full((*weight.shape[:-2], 1) if weight.ndim > 2 else (1,), number)
        return value, torch.full_like(weight, number)
    pers = {axis.axis: scheme.resolve(axis.per) for axis in scale.axes}
    blocks = _reduce(weight.abs(), pers, groups).clamp_min(1e-4) / most
    name = scale.dtypes[0]
    if scale.element == "e8m0" or name == "F8_E8M0":
        exponent = blocks.log2().ceil().clamp(-127, 127)
        value = (exponent + 127).to(torch.uint8)
        blocks = torch.pow(2.0, exponent)
        value = blocks.to(torch.float8_e8m0fnu) if name == "F8_E8M0" else value
    else:
        value = blocks.to(getattr(torch, DTYPES[name].torch_name))
        blocks = value.float()
    spread = _spread(blocks, pers, weight.shape, groups)
    return _store_axes(value, scale), spread


def _reduce(
    values: torch.Tensor, pers: Mapping[str, int | None], groups: torch.Tensor | None
) -> torch.Tensor:
    """The largest of each block `[..., blocks of out, blocks of in]`."""
    if groups is not None:
        parts = [values[..., groups == at].amax(-1) for at in range(int(groups.max()) + 1)]
        return torch.stack(parts, -1)
    for dim, name in ((-2, "out"), (-1, "in")):
        per = pers.get(name, 1) or values.shape[dim]
        parts = [part.amax(dim) for part in torch.split(values, per, dim)]
        values = torch.stack(parts, dim)
    return values


def _spread(
    blocks: torch.Tensor,
    pers: Mapping[str, int | None],
    shape: torch.Size,
    groups: torch.Tensor | None,
) -> torch.Tensor:
    """One number for each element, of one for each block."""
    if groups is not None:
        return blocks[..., groups]
    for dim, name in ((-2, "out"), (-1, "in")):
        per = pers.get(name, 1) or shape[dim]
        at = torch.arange(shape[dim]) // per
        blocks = blocks.index_select(dim, at)
    return blocks


def _make_zero_point(
    zero_point: StoredPart,
    weight: torch.Tensor,
    scheme: Scheme,
    groups: torch.Tensor | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random zero points around the middle of the range, as stored, and one for each element."""
    bits = scheme.resolve(zero_point.bits) or 8
    pers = {axis.axis: scheme.resolve(axis.per) for axis in zero_point.axes if axis.per != "packed"}
    shape = _reduce(weight.abs(), pers, groups).shape
    middle = 0 if zero_point.offset == "half" or zero_point.element == "number" else 2 ** (bits - 1)
    numbers = torch.randint(middle - 2, middle + 3, shape, generator=generator).float()
    spread = _spread(numbers, pers, weight.shape, groups)
    return encode_numbers(numbers, zero_point, scheme), spread


def encode_numbers(values: torch.Tensor, tensor: StoredPart, scheme: Scheme) -> torch.Tensor:
    """Numbers `[..., out, in]` as a tensor stores them, each the nearest that it can be."""
    dtype = getattr(torch, DTYPES[tensor.dtypes[0]].torch_name)
    if tensor.element == "number":
        most = find_largest(tensor.dtypes[0])
        values = values.clamp(-most, most)
        whole = values if dtype.is_floating_point else values.round()
        return _store_axes(whole.to(dtype), tensor)
    if tensor.element == "e2m1":
        nearest = (values.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
        codes = (nearest + 8 * (values < 0)).to(torch.uint8)
        pairs = (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(dtype)
        tail = [axis.per for axis in tensor.axes if not axis.axis]
        return pairs.reshape(*pairs.shape[:-1], -1, int(tail[0])) if tail else pairs
    return _pack(_store_axes(values, tensor), tensor, scheme, dtype)


def _pack(
    values: torch.Tensor, tensor: StoredPart, scheme: Scheme, dtype: torch.dtype
) -> torch.Tensor:
    """Integers packed into words along the axis that says so, the first in the lowest bits."""
    bits = scheme.resolve(tensor.bits) or 0
    offset = 2 ** (bits - 1) if tensor.offset == "half" else int(tensor.offset)
    numbers = (values.round() + offset).clamp(0, 2**bits - 1).to(torch.int64)
    dim = next(at for at, axis in enumerate(tensor.axes) if axis.per == "packed") - len(tensor.axes)
    per = scheme.count_packed(tensor, tensor.dtypes[0])
    words = numbers.movedim(dim, -1)
    words = words.reshape(*words.shape[:-1], -1, per)
    order = tensor.order or tuple(range(per))
    packed = sum(words[..., element] << (bits * place) for place, element in enumerate(order))
    assert isinstance(packed, torch.Tensor)
    return packed.to(torch.int32 if dtype is torch.int32 else dtype).movedim(-1, dim)


def _store_axes(values: torch.Tensor, tensor: StoredPart) -> torch.Tensor:
    """`[..., out, in]` in the order in which a tensor has its axes."""
    names = [axis.axis for axis in tensor.axes if axis.axis]
    return values.mT if names == ["in", "out"] else values


def _make_other(other: StoredPart, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    dtype = getattr(torch, DTYPES[other.dtypes[0]].torch_name)
    if [axis.axis for axis in other.axes] == ["in"]:  # the group of each input, in order
        per = _count_group(scheme) or weight.shape[-1]
        return (torch.arange(weight.shape[-1]) // per).to(dtype)
    return torch.tensor(weight.shape[-2:], dtype=dtype)
