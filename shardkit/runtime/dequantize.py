"""Computes a weight from the tensors that store it, whole or a rank's part of each.

The arithmetic is that of the formats' files: `(codes - zero_point) * scales`. FP4 numbers are those
of the OCP Microscaling Formats 1.0 specification (E2M1), and so are powers of two in a byte (E8M0).
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from shardkit.recipe.formats import QuantizedWeight, Scheme, StoredAxis, StoredPart

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127

Tensors = Mapping[str, torch.Tensor]


def dequantize_weight(
    weight: QuantizedWeight, tensors: Tensors, dtype: torch.dtype
) -> torch.Tensor:
    """The weight `[..., out, in]`, or as its format has it in 16 bits.

    Args:
        weight: What is stored of it.
        tensors: The stored tensors by name: whole, or a rank's part of each.
        dtype: What to return it in; the arithmetic is in float32.
    """
    scheme, form = weight.scheme, weight.scheme.format
    parts = {id(tensor): tensors[part.name] for tensor, part in weight.parts}
    value = decode_numbers(form.codes, parts[id(form.codes)], scheme)
    value = orient_axes(form.codes, value)
    index = parts.get(id(form.group_index)) if form.group_index is not None else None
    if form.zero_point is not None and id(form.zero_point) in parts:
        value = value - _expand(form.zero_point, parts, scheme, value.shape, index)
    for scale in form.scales:
        factor = _expand(scale, parts, scheme, value.shape, index)
        value = value / factor if scale.divides else value * factor
    return (value.transpose(-1, -2).contiguous() if form.transposed else value).to(dtype)


def decode_numbers(tensor: StoredPart, stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The numbers that a stored tensor holds, in float32, packed ones side by side."""
    if tensor.element == "number":
        return stored.float()
    if tensor.element == "e8m0":
        if stored.dtype is not torch.uint8:
            return stored.float()
        return torch.exp2(stored.float() - E8M0_BIAS)
    if tensor.element == "e2m1":
        table = torch.tensor([*E2M1, *(-number for number in E2M1)], device=stored.device)
        pairs = stored.view(torch.uint8).int()
        return table[torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)]
    return _decode_integers(tensor, stored, scheme)


def _decode_integers(tensor: StoredPart, stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Unsigned integers out of words, the lowest bits first, along the axis that is packed."""
    bits = scheme.resolve(tensor.bits) or 0
    lead = stored.ndim - len(tensor.axes)
    dim = lead + next(at for at, axis in enumerate(tensor.axes) if axis.per == "packed")
    words = stored.movedim(dim, -1)
    shifts = torch.arange(0, stored.element_size() * 8, bits, device=stored.device)
    numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    if tensor.order:
        numbers = numbers[..., torch.tensor(tensor.order, device=stored.device).argsort()]
    offset = 1 << (bits - 1) if tensor.offset == "half" else int(tensor.offset)
    return (numbers.flatten(-2).movedim(-1, dim) - offset).float()


def orient_axes(tensor: StoredPart, value: torch.Tensor) -> torch.Tensor:
    """Decoded numbers as `[..., out, in]`: axes that follow none are the end of the one before."""
    axes: list[StoredAxis] = [*tensor.axes]
    while axes and not axes[-1].axis:
        value = value.flatten(-2)
        axes.pop()
    return value.transpose(-1, -2) if [axis.axis for axis in axes] == ["in", "out"] else value


def _expand(
    tensor: StoredPart,
    parts: Mapping[int, torch.Tensor],
    scheme: Scheme,
    shape: torch.Size,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """Scales or zero points, one for each element of a weight of this shape, or broadcast."""
    stored = parts[id(tensor)]
    if stored.numel() == 1:
        return decode_numbers(tensor, stored.reshape(()), scheme)
    if stored.ndim < len(shape):  # one for each of a stack
        return decode_numbers(tensor, stored, scheme)[(..., *[None] * (len(shape) - stored.ndim))]
    value = orient_axes(tensor, decode_numbers(tensor, stored, scheme))
    for dim, name in ((-2, "out"), (-1, "in")):
        axis = next(axis for axis in tensor.axes if axis.axis == name)
        per = None if axis.per == "packed" else scheme.resolve(axis.per)
        if name == "in" and index is not None and per != 1:
            value = value.index_select(-1, index.long())
        elif per and per > 1 and axis.per != "packed":
            value = value.repeat_interleave(per, dim).narrow(dim, 0, shape[dim])
    return value


def collect_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    weights_by_part: Mapping[str, QuantizedWeight],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as they are read, each quantized weight computed once all that stores it is there.

    Args:
        tensors: Names on disk and tensors, in any order.
        weights_by_part: For each stored tensor of a quantized weight, the weight.
        dtype: What to compute weights in.
    """
    incomplete: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if (weight := weights_by_part.get(name)) is None:
            yield name, tensor
            continue
        parts = incomplete.setdefault(weight.name, {})
        parts[name] = tensor
        if len(parts) == len(weight.parts):
            yield weight.name, dequantize_weight(weight, incomplete.pop(weight.name), dtype)
