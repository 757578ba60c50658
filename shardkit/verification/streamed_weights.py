"""Runs a model on the meta device: a weight comes when it is first used, and goes after its block.

So the memory that a model of any size takes is that of its largest block, and of a wide dtype that
of the largest module in it; of a linear layer or an embedding, that of a few rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MAX_NORM = "max_norm"  # an argument of embedding
ROW_BYTES = 4 << 20  # of rows that are converted at a time
SMALL = 1 << 20  # bytes of a module's weights that stay until its block ends, if it is called again
ATTRIBUTES = ("dtype", "shape", "ndim", "layout", "nbytes", "requires_grad", "grad", "is_cuda",
              "is_sparse", "is_quantized")  # fmt: skip
METHODS = ("size", "stride", "dim", "numel", "nelement", "element_size", "is_floating_point",
           "is_complex", "is_contiguous")  # fmt: skip


def _find_getter(attribute: str) -> Any:
    """What a TorchFunctionMode is given when an attribute of a tensor is read."""
    return getattr(torch.Tensor, attribute).__get__


# What is asked of a tensor without using its values.
METADATA = {
    *map(_find_getter, ATTRIBUTES),
    *(getattr(torch.Tensor, name) for name in METHODS),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
DEVICE, IS_META = _find_getter("device"), _find_getter("is_meta")


def multiply_by_rows(
    x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` by a weight `[N, K]` in a wider dtype, a part of its rows after another.

    A part stays in the processor's cache until it is used, so this is faster, too.
    """
    count = max(1, ROW_BYTES // (weight.shape[1] * dtype.itemsize))
    buffer = torch.empty(min(count, len(weight)), weight.shape[1], dtype=dtype)
    outputs = []
    for start in range(0, len(weight), count):
        rows = weight[start : start + count]
        part = None if bias is None else bias[start : start + count]
        outputs.append(functional.linear(x, buffer[: len(rows)].copy_(rows), part))
    return torch.cat(outputs, -1)


def embed_by_rows(
    ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`embedding` of a weight in a wider dtype: only the rows that are taken are converted."""
    max_norm = kwargs.get(MAX_NORM, args[1] if len(args) > 1 else None)
    if max_norm is not None:  # it changes the weight
        return functional.embedding(ids, weight.to(dtype), *args, **kwargs)
    return functional.embedding(ids, weight, *args, **kwargs).to(dtype)


# Functions that need not have all of a wide weight at once.
BY_ROWS: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    functional.linear: multiply_by_rows,
    functional.embedding: embed_by_rows,
}


@dataclass
class ByteCounts:
    """How many bytes of weights there are now and were at most, and how many were read.

    Models that run together share one.
    """

    now: int = 0
    peak: int = 0
    read: int = 0

    def add(self, nbytes: int) -> None:
        """Count bytes that came, or with a negative number went."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)


class StreamedWeights(TorchFunctionMode):
    """In a `with`, a model computes as if it had its weights.

    Every torch function that is given one of the model's tensors gets the tensor with its values
    instead. `release` lets values go; hooks do so when a module with large weights has run.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        load: Callable[[str], Mapping[str, torch.Tensor]],
        counts: ByteCounts,
    ) -> None:
        """Run a model.

        Args:
            model: The model.
            tensors: Its tensors on the meta device that are to come, by name.
            load: Returns, for one of these names, the tensors that are made together with it.
            counts: Where to count what there is.
        """
        super().__init__()
        self._model = model
        self._tensors = dict(tensors)  # kept, so that no other tensor gets the identity of one
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._load = load
        self._counts = counts
        self._values: dict[str, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, its arguments filled in."""
        if func == DEVICE and id(args[0]) in self._names:
            return torch.device("cpu")
        if func == IS_META and id(args[0]) in self._names:
            return False
        if func in METADATA:
            return func(*args, **(kwargs or {}))
        if func in BY_ROWS and (name := self._find_large(args)) is not None:
            weight = self._load_narrow(name)
            if weight is not None:
                return self._compute_by_rows(func, name, weight, args, kwargs or {})
        kwargs = {name: self._fill(value) for name, value in (kwargs or {}).items()}
        return func(*(self._fill(value) for value in args), **kwargs)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let the values of these tensors go, or of all."""
        for name in list(self._values) if names is None else names:
            value = self._values.pop(name, None)
            if value is not None:
                self._counts.add(-value.nbytes)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The `with` in which the model may be called."""
        hooks = [
            module.register_forward_hook(partial(self._release_after, names))
            for module, names in self._list_large_modules()
        ]
        try:
            with self:
                yield
        finally:
            self.release()
            for hook in hooks:
                hook.remove()

    def _fill(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = self._names.get(id(value))
            return value if name is None else self._find_value(name)
        if type(value) in (list, tuple):
            return type(value)(self._fill(item) for item in value)
        return value

    def _find_value(self, name: str) -> torch.Tensor:
        if name not in self._values:
            self._keep(self._load(name))
        return self._values[name]

    def _keep(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Convert tensors to what the model computes in, and keep them."""
        for target, value in tensors.items():
            if target in self._tensors and target not in self._values:
                value = value.to(self._tensors[target].dtype)
                self._values[target] = value
                self._counts.add(value.nbytes)

    def _find_large(self, args: Sequence[Any]) -> str | None:
        """The large weight that a function of `BY_ROWS` is given, if it has no value yet."""
        name = self._names.get(id(args[1])) if len(args) > 1 else None
        if name is None or name in self._values or self._tensors[name].nbytes <= SMALL:
            return None
        return name

    def _load_narrow(self, name: str) -> torch.Tensor | None:
        """A weight as it is stored, if it is to be converted; else it is kept, and None."""
        tensors = dict(self._load(name))
        value = tensors[name]
        if value.dtype == self._tensors[name].dtype:
            self._keep(tensors)
            return None
        del tensors[name]
        self._keep(tensors)
        return value

    def _compute_by_rows(
        self,
        func: Callable[..., torch.Tensor],
        name: str,
        weight: torch.Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        """A function of a weight of which only some rows are converted at a time."""
        x, *rest = (self._fill(value) for value in (args[0], *args[2:]))
        dtype, kwargs = self._tensors[name].dtype, {k: self._fill(v) for k, v in kwargs.items()}
        nbytes = weight.nbytes + min(ROW_BYTES, self._tensors[name].nbytes)
        self._counts.add(nbytes)
        try:
            return BY_ROWS[func](x, weight, dtype, *rest, **kwargs)
        finally:
            self._counts.add(-nbytes)

    def _list_large_modules(self) -> Iterator[tuple[nn.Module, list[str]]]:
        for module in self._model.modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            known = [t for t in own if t is not None and id(t) in self._names]
            if sum(tensor.nbytes for tensor in known) > SMALL:
                yield module, [self._names[id(tensor)] for tensor in known]

    def _release_after(self, names: list[str], *_: Any) -> None:
        self.release(names)
