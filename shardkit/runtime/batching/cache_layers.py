"""Layers of transformers' caches whose rows can join and leave, aligned at their last token.

A batch's rows end at the same column; shorter ones have padding before them, which the attention
mask hides. So a layer of keys and values is padded or trimmed at its beginning, and a recurrent
state, which has no columns, is concatenated along the batch alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

# Exactly these: a class derived from one of them may have further tensors.
RECURRENT = {
    cache_utils.LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
}
JOINABLE = {DynamicLayer, DynamicSlidingWindowLayer, cache_utils.DummyLayer} | RECURRENT
STATES = ("conv_states", "recurrent_states")  # of a recurrent layer, by number


def find_unjoinable(layers: list[Any]) -> str:
    """The name of a layer class whose rows cannot join a running batch; "" if there is none."""
    return next((type(layer).__name__ for layer in layers if type(layer) not in JOINABLE), "")


def has_recurrent_state(layers: list[Any]) -> bool:
    """Whether a layer has a state that every token changes, padding included."""
    return any(type(layer) in RECURRENT for layer in layers)


def resize_layer(layer: Any, length: int) -> None:
    """Pad a layer at its beginning, or trim it there, to what `length` tokens would occupy."""
    if not (isinstance(layer, DynamicLayer) and layer.is_initialized):
        return
    columns = length
    if isinstance(layer, DynamicSlidingWindowLayer):
        columns = min(length, layer.sliding_window - 1)
        layer.cumulative_length = length
    change = columns - layer.keys.shape[-2]
    if change:
        layer.keys = F.pad(layer.keys, (0, 0, change, 0))
        layer.values = F.pad(layer.values, (0, 0, change, 0))


def append_rows(layer: Any, other: Any) -> None:
    """Append the rows of a layer of the same kind and length."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        layer.keys = torch.cat([layer.keys, other.keys])
        layer.values = torch.cat([layer.values, other.values])
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name in STATES:
            states, others = getattr(layer, name), getattr(other, name)
            for index, state in states.items():
                if state is not None:
                    states[index] = torch.cat([state, others[index]])


def select_rows(layer: Any, rows: torch.Tensor) -> None:
    """Keep these rows `[B]`, int64, of a layer."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name in STATES:
            states = getattr(layer, name)
            for index, state in states.items():
                if state is not None:
                    states[index] = state[rows]


def count_layer_bytes(layer: Any) -> int:
    """The bytes of a layer's tensors."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    tensors += [state for name in STATES for state in getattr(layer, name, {}).values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
