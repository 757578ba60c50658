"""Prompts: text, chat messages, token ids or a tokenizer's output, as token ids."""

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from shardkit.errors import ManifestError, RequestError, first_line

ChatMessage = Mapping[str, Any]  # of a chat: role and content
Prompt = (
    str
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[ChatMessage]
    | torch.Tensor
    | Mapping[str, Any]
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises ManifestError if it has none."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ManifestError(f"{folder}: no tokenizer; give token ids")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def is_chat(prompt: Prompt) -> TypeGuard[Sequence[ChatMessage]]:
    """Whether a prompt is a list of chat messages."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and bool(prompt) and all(isinstance(each, Mapping) for each in prompt)


def is_text(prompt: Prompt | None) -> bool:
    """Whether a prompt is text or a chat, so that what follows it is text, too."""
    return isinstance(prompt, str) or (prompt is not None and is_chat(prompt))


def encode_text(tokenizer: Any, prompt: Any) -> list[int]:
    """The token ids of a text, or of a chat. Raises RequestError for a chat without a template."""
    if not isinstance(prompt, str):
        return encode_chat(tokenizer, prompt)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids


def encode_chat(tokenizer: Any, messages: Sequence[ChatMessage]) -> list[int]:
    """A chat's token ids up to where the answer begins, by the tokenizer's own template.

    Raises RequestError if there is none, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("the folder's tokenizer has no chat template; give text or token ids")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise RequestError(f"the chat template refuses the messages: {first_line(error)}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def read_ids(prompt: Any) -> torch.Tensor:
    """Token ids `[B, T]`, int64, of a list, of lists of one length, or of a tensor.

    Raises:
        RequestError: It is nothing of that kind; the message says what it is.
    """
    if isinstance(prompt, torch.Tensor):
        if prompt.is_floating_point() or prompt.ndim not in (1, 2) or prompt.device.type == "meta":
            raise RequestError(
                f"prompt: a tensor {list(prompt.shape)} of {prompt.dtype}; token ids are integers"
                " [T] or [B, T]"
            )
        return _check_size(prompt.long() if prompt.ndim == 2 else prompt.long()[None])
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        raise RequestError(f"prompt: a {type(prompt).__name__}; give text or token ids")
    rows = prompt if prompt and isinstance(prompt[0], Sequence | torch.Tensor) else [prompt]
    if any(isinstance(row, str) for row in rows):
        raise RequestError("prompt: a list of texts; give one text for each request")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise RequestError(
            f"prompt: rows of {lengths[0]} and {lengths[-1]} token ids; submit each by itself, or"
            " give input_ids and attention_mask"
        )
    for row in rows:
        for value in row:
            if not isinstance(value, numbers.Integral | torch.Tensor) or isinstance(value, bool):
                raise RequestError(f"prompt: {value!r:.80} is no token id")
    return _check_size(torch.tensor([[int(value) for value in row] for row in rows]))


def _check_size(ids: torch.Tensor) -> torch.Tensor:
    if ids.numel() == 0:
        raise RequestError("prompt: it has no tokens")
    return ids
