"""Runs a model on the meta device: a weight comes when it is first used, and goes after its block.

So the memory that a model of any size takes is that of its largest block, and of a wide dtype that
of the largest module in it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

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
            for target, value in self._load(name).items():
                if target in self._tensors and target not in self._values:
                    value = value.to(self._tensors[target].dtype)
                    self._values[target] = value
                    self._counts.add(value.nbytes)
        return self._values[name]

    def _list_large_modules(self) -> Iterator[tuple[nn.Module, list[str]]]:
        for module in self._model.modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            known = [t for t in own if t is not None and id(t) in self._names]
            if sum(tensor.nbytes for tensor in known) > SMALL:
                yield module, [self._names[id(tensor)] for tensor in known]

    def _release_after(self, names: list[str], *_: Any) -> None:
        self.release(names)
