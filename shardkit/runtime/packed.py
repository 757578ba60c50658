"""Parameters that stay in memory as they are stored, and are computed where they are used.

A `PackedTensor` has the shape, dtype and device that its weight has in 16 bits. Every operation
that takes it computes the weight, and nothing of it is kept, so no module need know of it. Taking
one of a stack, an expert, computes that one alone. An operation that would write to it is an error.

The weight is stored itself, or made of such ones by operations that only rearrange them, such as a
stack of experts; these, too, are run when it is computed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map_only

from shardkit.errors import ShardkitError
from shardkit.runtime.dequantize import StoredWeight, write_weight

aten = torch.ops.aten


@dataclass(frozen=True)
class Rearrangement:
    """An operation that only rearranges tensors, some of them packed, or changes their dtype."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class PackedTensor(torch.Tensor):
    """A weight that every operation computes anew, from what is stored of it: its `source`."""

    source: StoredWeight | Rearrangement
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        source: StoredWeight | Rearrangement,
        shape: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> "PackedTensor":
        """A tensor without memory of its own, of the shape that the source makes."""
        tensor: PackedTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=device
        )
        tensor.source = source
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on the computed weights. Raises ShardkitError if it writes to one."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PackedTensor):
            if func in (aten.detach.default, aten.alias.default):
                return _alias(first)
            if func is aten.clone.default:
                return map_stored(first, torch.clone)
            if func is aten._to_copy.default:
                return _move(first, kwargs.get("device"), kwargs.get("dtype"))
            if func is aten.select.int and args[1] % first.ndim == 0:
                return compute_tensor(select_first(first, _find_place(args[2], len(first))))
        if any(isinstance(arg, PackedTensor) for arg in _list_written(func, args, kwargs)):
            raise ShardkitError(
                f"{func} would write to a weight that is stored quantized; load the model with"
                ' dequantize="load"'
            )
        args, kwargs = tree_map_only(PackedTensor, compute_tensor, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        """It, of the same stored tensors."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Take another's source, as `model.to(device)` does. Raises ShardkitError without one."""
        if not isinstance(value, PackedTensor):
            raise ShardkitError('a quantized weight is set; load the model with dequantize="load"')
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.source = value.source

    def __setitem__(self, index: Any, value: Any) -> None:
        """Raises ShardkitError: what is indexed is computed, and to write to it changes nothing."""
        raise ShardkitError(
            'part of a quantized weight is set; load the model with dequantize="load"'
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedTensor":
        """A parameter of its own copies of the stored tensors."""
        clone: PackedTensor = torch.nn.Parameter(map_stored(self, torch.clone), False)  # type: ignore[assignment]
        memo[id(self)] = clone
        return clone

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Its shape and dtype; the numbers are not computed to be shown."""
        nbytes = sum(stored.nbytes for stored in iter_stored(self))
        return f"PackedTensor({list(self.shape)}, {self.dtype}, stored in {nbytes} bytes)"


def pack_weight(weight: StoredWeight, dtype: torch.dtype) -> PackedTensor:
    """A weight that stays as it is stored, and that operations take in `dtype`."""
    return PackedTensor(weight, weight.shape, dtype, weight.codes.device)


def record_operation(function: Any, *args: Any, **kwargs: Any) -> PackedTensor:
    """What an operation makes of tensors, at least one of them packed, to be computed later."""
    args, kwargs = tree_map_only(PackedTensor, _alias, (args, kwargs))  # data may be set later
    inputs = [each for each in tree_iter((args, kwargs)) if isinstance(each, PackedTensor)]
    like_args, like_kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
    like = function(*like_args, **like_kwargs)
    return PackedTensor(
        Rearrangement(function, args, kwargs), like.shape, like.dtype, inputs[0].device
    )


def compute_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The weight of a packed tensor, contiguous; another tensor as it is."""
    if not isinstance(tensor, PackedTensor):
        return tensor
    with torch.inference_mode(False):  # what is viewed, autograd counts versions of
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    _write(tensor, value)
    return value


def select_first(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """One along the first dimension, still packed where its part of a stack is known."""
    if not isinstance(tensor, PackedTensor):
        return tensor[index]
    source = tensor.source
    if isinstance(source, StoredWeight):
        if source.lead:
            return pack_weight(source.select(index), tensor.dtype)
        return compute_tensor(tensor)[index]
    return _select_inside(tensor, source, index)


def _select_inside(tensor: PackedTensor, source: Rearrangement, index: int) -> torch.Tensor:
    """One along the first dimension of what an operation made of packed tensors."""
    function, (inner, *dims) = source.function, source.args
    if function in (aten.stack.default, aten.cat.default, aten.transpose.int):
        dims = [dim % tensor.ndim for dim in dims] or [0]
    if function is aten.stack.default and dims == [0]:
        return inner[index]  # type: ignore[no-any-return]
    if function is aten.cat.default and dims[0] > 0:
        return _record_any(function, [select_first(each, index) for each in inner], dims[0] - 1)
    if function is aten.transpose.int and min(dims) > 0:
        return _record_any(function, select_first(inner, index), dims[0] - 1, dims[1] - 1)
    if function is aten.slice.Tensor and dims[0] > 0:
        return _record_any(function, select_first(inner, index), dims[0] - 1, *dims[1:])
    if function is aten._to_copy.default:
        return select_first(inner, index).to(tensor.dtype)
    return compute_tensor(tensor)[index]


def iter_stored(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors in memory that a tensor is made of: itself, if it is not packed."""
    if not isinstance(tensor, PackedTensor):
        yield tensor
    elif isinstance(tensor.source, StoredWeight):
        yield from (stored for _, stored in tensor.source.parts)
    else:
        for each in tree_iter((tensor.source.args, tensor.source.kwargs)):
            if isinstance(each, torch.Tensor):
                yield from iter_stored(each)


def map_stored(
    packed: PackedTensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> PackedTensor:
    """A packed tensor, a function applied to each of the tensors in memory that it is made of."""
    source = packed.source
    mapped: StoredWeight | Rearrangement
    if isinstance(source, StoredWeight):
        mapped = source.map(function)
    else:
        args, kwargs = tree_map_only(
            torch.Tensor,
            lambda t: map_stored(t, function) if isinstance(t, PackedTensor) else function(t),
            (source.args, dict(source.kwargs)),
        )
        mapped = Rearrangement(source.function, args, kwargs)
    device = next(
        iter_stored(PackedTensor(mapped, packed.shape, packed.dtype, packed.device))
    ).device
    return PackedTensor(mapped, packed.shape, packed.dtype, device)


def _alias(packed: PackedTensor) -> PackedTensor:
    return PackedTensor(packed.source, packed.shape, packed.dtype, packed.device)


def _find_place(index: int, length: int) -> int:
    """An index counted from the start. Raises IndexError if it is outside."""
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of bounds for a dimension of size {length}")
    return index % length


def _write(tensor: torch.Tensor, out: torch.Tensor) -> None:
    """Compute a tensor into another of its shape, piece by piece, so that little is there twice."""
    if not isinstance(tensor, PackedTensor) or tensor.dtype != out.dtype:
        out.copy_(compute_tensor(tensor))
        return
    source = tensor.source
    if isinstance(source, StoredWeight):
        write_weight(source, out)
        return
    inner, *dims = source.args
    if source.function is aten.stack.default:
        for index, each in enumerate(inner):
            _write(each, out.select((*dims, 0)[0], index))
    elif source.function is aten.cat.default:
        dim, start = (*dims, 0)[0], 0
        for each in inner:
            _write(each, out.narrow(dim, start, each.shape[dim]))
            start += each.shape[dim]
    elif source.function is aten.transpose.int:
        _write(inner, out.transpose(*dims))
    else:
        args, kwargs = tree_map_only(
            PackedTensor, compute_tensor, (source.args, dict(source.kwargs))
        )
        out.copy_(source.function(*args, **kwargs))


def _record_any(function: Any, inner: Any, *dims: int) -> torch.Tensor:
    """Record an operation, or run it if nothing that it takes is packed."""
    is_packed = any(isinstance(each, PackedTensor) for each in tree_iter(inner))
    result: torch.Tensor = (
        record_operation(function, inner, *dims) if is_packed else function(inner, *dims)
    )
    return result


def _move(
    packed: PackedTensor, device: torch.device | None, dtype: torch.dtype | None
) -> PackedTensor:
    moved = packed if device is None else map_stored(packed, lambda stored: stored.to(device))
    if dtype in (None, packed.dtype):
        return moved
    return record_operation(aten._to_copy.default, moved, dtype=dtype)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _list_written(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[torch.Tensor]:
    """The arguments that an operation writes to, by its schema."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from tree_iter(value)
