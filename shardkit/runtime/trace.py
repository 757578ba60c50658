"""Records what named modules put out, the first tensor of each, in the order they ran."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Trace:
    """Within a `with`, `outputs` fills with the first output of each named module, by name."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.outputs: dict[str, torch.Tensor] = {}
        modules = dict(model.named_modules())
        self._hooks = [
            modules[name].register_forward_hook(self._keep(name))
            for name in names
            if name in modules
        ]

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and name not in self.outputs:
                self.outputs[name] = first.detach().clone()

        return hook
