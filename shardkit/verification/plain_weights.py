"""A second way from stored tensors to a weight, for the reference that shards are compared with.

It shares nothing with the runtime's but the description of the formats: each element of the weight
looks up its own code, scale and zero point by its indices.
"""

import math
from collections.abc import Mapping

import torch

from shardkit.recipe.formats import Grouping, QuantizedWeight, StoredPart

EXPONENT_BIAS = 127
NO_AXIS = ""

Tensors = Mapping[str, torch.Tensor]


def compute_plain_weights(tensors: Tensors, grouping: Grouping) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, each quantized weight computed, in float32."""
    weights = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in grouping.codes_by_part and name not in grouping.constant_names
    }
    for weight in grouping.weights.values():
        value = compute_weight(weight, tensors)
        weights[weight.name] = value.mT.contiguous() if weight.axes == ("in", "out") else value
    return weights


def compute_weight(weight: QuantizedWeight, tensors: Tensors) -> torch.Tensor:
    """One weight `[..., out, in]` in float32, from its whole stored tensors."""
    form = weight.scheme.format
    stored = {tensor.suffix: tensors[part.name] for tensor, part in weight.parts}
    groups = None
    if form.group_index is not None and form.group_index.suffix in stored:
        groups = stored[form.group_index.suffix].long()
    value = _look_up(weight, form.codes, stored[form.codes.suffix], None)
    if form.zero_point is not None and form.zero_point.suffix in stored:
        value = value - _look_up(weight, form.zero_point, stored[form.zero_point.suffix], groups)
    for scale in form.scales:
        factor = _look_up(weight, scale, stored[scale.suffix], groups)
        value = value / factor if scale.divides else value * factor
    return value


def _look_up(
    weight: QuantizedWeight,
    tensor: StoredPart,
    stored: torch.Tensor,
    groups: torch.Tensor | None,
) -> torch.Tensor:
    """What a stored tensor has for each element of the weight, or for all of them alike."""
    *lead, num_out, num_in = weight.shape
    if stored.numel() == 1:
        return _read(weight, tensor, stored.reshape(1), torch.zeros(1, dtype=torch.int64))[0]
    if stored.numel() == math.prod(lead):
        whole = _read(weight, tensor, stored, torch.zeros(stored.shape, dtype=torch.int64))
        return whole.reshape(*lead, 1, 1)
    at = {"out": torch.arange(num_out)[:, None], "in": torch.arange(num_in)[None, :]}
    packed = weight.scheme.count_packed(tensor, _find_dtype(weight, tensor))
    places: list[torch.Tensor] = []
    element = torch.zeros((1, 1), dtype=torch.int64)
    for axis, before in zip(tensor.axes, (None, *tensor.axes), strict=False):
        if axis.axis == NO_AXIS and before is not None:  # bytes that go on where that axis ends
            inside = at[before.axis] % (weight.scheme.resolve(before.per) or 1)
            places.append(inside // packed)
            element = inside % packed
            continue
        index = at[axis.axis]
        per = packed if axis.per == "packed" else weight.scheme.resolve(axis.per)
        if axis.axis == "in" and groups is not None and per != 1:
            places.append(groups[None, :])
        else:
            places.append(torch.zeros_like(index) if per is None else index // per)
        element = index % packed if axis.per == "packed" else element
    raw = stored.float() if stored.is_floating_point() else stored
    raw = raw.view(torch.uint8) if raw.dtype is torch.int8 and packed > 1 else raw
    lead_places = tuple(
        torch.arange(size).reshape(-1, *[1] * (len(lead) - number + 1))
        for number, size in enumerate(lead)
    )
    chosen = raw[(*lead_places, *places)]
    return _read(weight, tensor, chosen, element)


def _read(
    weight: QuantizedWeight, tensor: StoredPart, stored: torch.Tensor, element: torch.Tensor
) -> torch.Tensor:
    """The numbers at places inside of stored values."""
    if tensor.element == "number" or (tensor.element == "e8m0" and stored.is_floating_point()):
        return stored.float()
    if tensor.element == "e8m0":
        return torch.pow(2.0, stored.double() - EXPONENT_BIAS).float()
    if tensor.element == "e2m1":
        return _read_fp4((stored.long() >> (4 * element)) & 0xF)
    bits = weight.scheme.resolve(tensor.bits) or 0
    place = element
    if tensor.order:
        place = torch.tensor([tensor.order.index(at) for at in range(len(tensor.order))])[element]
    number = (stored.long() >> (bits * place)) & ((1 << bits) - 1)
    return (number - (2 ** (bits - 1) if tensor.offset == "half" else int(tensor.offset))).float()


def _read_fp4(bits: torch.Tensor) -> torch.Tensor:
    """A sign, two bits of exponent and one of mantissa, as numbers."""
    sign = 1.0 - 2.0 * (bits >> 3).float()
    exponent, mantissa = ((bits >> 1) & 3).float(), (bits & 1).float()
    normal = torch.pow(2.0, exponent - 1) * (1 + mantissa / 2)
    return sign * torch.where(exponent == 0, mantissa / 2, normal)


def _find_dtype(weight: QuantizedWeight, tensor: StoredPart) -> str:
    return next(part.dtype for each, part in weight.parts if each is tensor)
