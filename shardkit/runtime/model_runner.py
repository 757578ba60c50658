"""What a model's forward pass takes, and the tensors it gives."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel


def uncached(model: PreTrainedModel) -> dict[str, object]:
    """The options of a forward pass without a cache; none for a model that never has one."""
    takes_it = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes_it else {}


def fitted(
    inputs: Mapping[str, torch.Tensor], model: PreTrainedModel, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inputs on a device, numbers (pixels, sound) in the model's own dtype."""
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output, by name; nested ones (caches, hidden states) left out."""
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {str(k): v for k, v in items if isinstance(v, torch.Tensor)}
