"""Computes a weight from the tensors that store it, whole or a rank's part of each.

The arithmetic is that of the formats' files, in float32: `(codes - zero_point) * scales`. FP4
numbers are those of the OCP Microscaling Formats 1.0 specification (E2M1), and so are powers of two
in a byte (E8M0). A few rows are computed at a time, so that what lies between the stored numbers
and the weight stays small.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from shardkit.dtypes import BY_TORCH_NAME, torch_name
from shardkit.recipe.formats import QuantizedWeight, Scheme, StoredAxis, StoredPart
from shardkit.recipe.formats.format import PACKED, WHOLE

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127
CPU_ELEMENTS = 1 << 17  # to compute at a time: as float32 they fit into a core's cache
GPU_ELEMENTS = 1 << 25  # few launches, and a bounded part of the memory

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it is in memory: the stored tensors, or a rank's part of each.

    Attributes:
        scheme: How it is quantized.
        parts: The stored tensors that it is computed from, the codes first.
    """

    scheme: Scheme
    parts: tuple[tuple[StoredPart, torch.Tensor], ...]

    @property
    def codes(self) -> torch.Tensor:
        """The tensor that holds its elements."""
        return self.parts[0][1]

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes before `out` and `in`: of a stack."""
        return tuple(self.codes.shape[: self.codes.ndim - len(self.parts[0][0].axes)])

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as it would be in 16 bits."""
        sizes = {"out": 1, "in": 1}
        tensor, codes = self.parts[0]
        for axis, size in zip(tensor.axes, codes.shape[len(self.lead) :], strict=True):
            if axis.axis:
                sizes[axis.axis] = size * (self.count_per_index(tensor, axis, codes) or 1)
        names = ("in", "out") if self.scheme.format.transposed else ("out", "in")
        return (*self.lead, *(sizes[name] for name in names))

    def count_per_index(
        self, tensor: StoredPart, axis: StoredAxis, stored: torch.Tensor
    ) -> int | None:
        """How many of the weight's indices one stored index stands for; None for all of them."""
        dtype = BY_TORCH_NAME[torch_name(stored.dtype)].name
        return self.scheme.count_per_index(tensor, axis, dtype)

    def find(self, tensor: StoredPart | None) -> torch.Tensor | None:
        """One of its stored tensors; None if it has none of these."""
        return next((stored for each, stored in self.parts if each is tensor), None)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "StoredWeight":
        """It, with a function applied to each stored tensor."""
        return replace(self, parts=tuple((t, function(stored)) for t, stored in self.parts))

    def select(self, index: int) -> "StoredWeight":
        """One of a stack. A stored tensor is of a stack if it has more than its own axes, or one
        number for each; one number for all stays as it is."""
        return replace(
            self,
            parts=tuple(
                (tensor, stored[index] if self._is_stacked(tensor, stored) else stored)
                for tensor, stored in self.parts
            ),
        )

    def _is_stacked(self, tensor: StoredPart, stored: torch.Tensor) -> bool:
        is_total = all(axis.per == WHOLE for axis in tensor.axes)
        return stored.ndim > len(tensor.axes) or (is_total and stored.numel() == self.lead[0] > 1)

    def narrow(self, start: int, stop: int) -> "StoredWeight":
        """Rows `start` to `stop` of `out`: whole blocks of them, or some of one block."""
        return replace(
            self,
            parts=tuple(
                (tensor, self._narrow_part(tensor, stored, start, stop))
                for tensor, stored in self.parts
            ),
        )

    def may_cut(self, start: int, stop: int) -> bool:
        """Whether rows `start` to `stop` of the weight's first dimension are whole blocks."""
        if self.lead or self.scheme.format.transposed:
            return False
        step = math.lcm(1, *(per for per, _ in self._list_row_blocks()))
        return start % step == 0 and (stop % step == 0 or stop == self.shape[0])

    def _narrow_part(
        self, tensor: StoredPart, stored: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        at = next((at for at, axis in enumerate(tensor.axes) if axis.axis == "out"), None)
        if at is None or stored.ndim < len(tensor.axes) or stored.shape[at] == 1:
            return stored
        per = self.count_per_index(tensor, tensor.axes[at], stored)
        if per is None:
            return stored
        first = start // per
        return stored.narrow(at, first, -(-stop // per) - first)

    def iter_rows(self) -> Iterator[tuple[int, int]]:
        """The rows `(start, stop)` of `out` to compute at a time."""
        shape = self.shape[::-1] if self.scheme.format.transposed else self.shape
        rows, inputs = shape[-2:]
        elements = CPU_ELEMENTS if self.codes.device.type == "cpu" else GPU_ELEMENTS
        step = self._choose_step(max(elements // max(inputs, 1), 1))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def _choose_step(self, wanted: int) -> int:
        """About `wanted` rows: whole blocks, or a whole part of each block; words never cut."""
        pers = self._list_row_blocks()
        step = math.lcm(1, *(per for per, _ in pers))
        while step > wanted and all(step // 2 % per == 0 for per, packed in pers if packed):
            if step % 2 or any(per % (step // 2) and step // 2 % per for per, _ in pers):
                break
            step //= 2
        return step * max(1, wanted // step)

    def _list_row_blocks(self) -> set[tuple[int, bool]]:
        """How many rows of `out` one stored index stands for, and whether a word holds them."""
        return {
            (self.count_per_index(tensor, axis, stored) or 1, axis.per == PACKED)
            for tensor, stored in self.parts
            for axis in tensor.axes
            if axis.axis == "out"
        }


def store_weight(weight: QuantizedWeight, tensors: Tensors) -> StoredWeight:
    """A weight of the tensors that it is computed from, by name."""
    parts = tuple((tensor, tensors[part.name]) for tensor, part in weight.operands)
    return StoredWeight(weight.scheme, parts)


def write_weight(weight: StoredWeight, out: torch.Tensor) -> None:
    """Compute a weight into a tensor of its shape, of any floating-point dtype and strides."""
    if weight.lead:
        for index in range(weight.lead[0]):
            write_weight(weight.select(index), out[index])
        return
    rows = out.transpose(-1, -2) if weight.scheme.format.transposed else out
    for start, stop in weight.iter_rows():
        rows[start:stop].copy_(compute_rows(weight.narrow(start, stop)))


def compute_rows(weight: StoredWeight) -> torch.Tensor:
    """The weight `[out, in]` in float32, all rows at once."""
    form = weight.scheme.format
    value = orient_axes(form.codes, decode_numbers(form.codes, weight.codes, weight.scheme))
    index = weight.find(form.group_index)
    if form.zero_point is not None and (stored := weight.find(form.zero_point)) is not None:
        _apply(torch.Tensor.sub_, value, form.zero_point, stored, weight.scheme, index)
    for scale in form.scales:
        if (stored := weight.find(scale)) is not None:
            operation = torch.Tensor.div_ if scale.divides else torch.Tensor.mul_
            _apply(operation, value, scale, stored, weight.scheme, index)
    return value


def _apply(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    value: torch.Tensor,
    tensor: StoredPart,
    stored: torch.Tensor,
    scheme: Scheme,
    index: torch.Tensor | None,
) -> None:
    """Scale a weight `[out, in]`, or shift it, in place, by what is stored for its blocks."""
    if stored.numel() == 1:
        operation(value, decode_numbers(tensor, stored.reshape(()), scheme))
        return
    factor = orient_axes(tensor, decode_numbers(tensor, stored, scheme))
    pers = {axis.axis: axis.per for axis in tensor.axes}
    rows = None if pers["out"] == PACKED else scheme.resolve(pers["out"])
    if rows and rows > 1 and len(factor) > 1:
        factor = factor.repeat_interleave(rows, 0)[: len(value)]
    per = None if pers["in"] == PACKED else scheme.resolve(pers["in"])
    if index is not None and per != 1:
        operation(value, factor.index_select(-1, index.long()))
    elif per and per > 1 and factor.shape[-1] * per == value.shape[-1]:
        operation(torch.unflatten(value, -1, (-1, per)), factor.unsqueeze(-1))
    elif per and per > 1:
        operation(value, factor.repeat_interleave(per, -1)[:, : value.shape[-1]])
    else:
        operation(value, factor)


def decode_numbers(tensor: StoredPart, stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The numbers that a stored tensor holds, in new float32, packed ones next to each other."""
    if tensor.element == "uint":
        return _decode_integers(tensor, stored, scheme)
    if tensor.element == "e2m1":
        return _look_up("e2m1", torch.uint8, stored).flatten(-2)
    if tensor.element == "e8m0" and stored.dtype is torch.uint8:
        return _look_up("e8m0", torch.uint8, stored)
    if stored.is_floating_point() and stored.element_size() == 1:
        return _look_up("number", stored.dtype, stored)
    return stored.to(torch.float32, copy=True)


def _look_up(element: str, dtype: torch.dtype, stored: torch.Tensor) -> torch.Tensor:
    """The number of each byte; of two in a byte, in a further dimension."""
    table = _list_numbers(element, dtype, stored.device)
    places = stored.view(torch.uint8).reshape(-1).int()
    return table.index_select(0, places).view((*stored.shape, *table.shape[1:]))


@cache
def _list_numbers(element: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers in float32 that each byte holds, `[256]`, or `[256, 2]` of two."""
    with torch.inference_mode(False):
        codes = torch.arange(256, dtype=torch.uint8, device=device)
        if element == "e2m1":
            table = torch.tensor([*E2M1, *(-number for number in E2M1)], device=device)
            return torch.stack((table[codes.int() & 15], table[codes.int() >> 4]), -1)
        if element == "e8m0":
            return torch.exp2(codes.float() - E8M0_BIAS)
        return codes.view(dtype).float()


def _decode_integers(tensor: StoredPart, stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Unsigned integers out of words, the lowest bits first, along the axis that is packed."""
    bits = scheme.resolve(tensor.bits) or 0
    after = len(tensor.axes) - next(at for at, axis in enumerate(tensor.axes) if axis.per == PACKED)
    dim = stored.ndim - after
    wide = torch.int64 if stored.dtype is torch.int64 else torch.int32
    shifts = torch.arange(0, stored.element_size() * 8, bits, device=stored.device, dtype=wide)
    if tensor.order:
        shifts = shifts[torch.tensor(tensor.order, device=stored.device).argsort()]
    numbers = stored.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (after - 1))
    offset = 1 << (bits - 1) if tensor.offset == "half" else int(tensor.offset)
    numbers = numbers.bitwise_and_((1 << bits) - 1).sub_(offset)
    return numbers.flatten(dim, dim + 1).float()


def orient_axes(tensor: StoredPart, value: torch.Tensor) -> torch.Tensor:
    """Decoded numbers as `[..., out, in]`: axes that follow none are the end of the one before."""
    axes: list[StoredAxis] = [*tensor.axes]
    while axes and not axes[-1].axis:
        value = value.flatten(-2)
        axes.pop()
    return value.transpose(-1, -2) if [axis.axis for axis in axes] == ["in", "out"] else value
