"""What training wrappers do to tensors' names: a prefix before all of them, and parts of their own.

A wrapper holds the model as a module of its own, and so each name on disk begins with that
module's. Such a prefix says nothing of the model. Names that it takes more to undo are told apart
by one word in them.
"""

from collections.abc import Iterable, Sequence

from shardkit.strict_json import quote

# What wrappers call the model that they hold, or themselves.
WRAPPER_MODULES = (
    "_orig_mod",  # torch.compile
    "module",  # DistributedDataParallel, DataParallel, DeepSpeed's engine
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_forward_module",  # Lightning's strategies
    "base_model.model",  # a PEFT model whose adapter was merged into the weights
)
_ADAPTER = (
    "an adapter that was not merged",
    "merge it with PEFT's merge_and_unload(), then save_pretrained",
)
_TRAINER = (
    "a trainer's own copy of weights, not of a model",
    "have the trainer save the model itself, with save_pretrained",
)
_INNER = (
    "a wrapper around some modules only",
    "rename the tensors without the wrapper's word, and save them with safetensors",
)
# A word in a name that no prefix explains: what it is the mark of, and the way out.
MARKS = {
    **dict.fromkeys(
        ("base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B",
         "lora_magnitude_vector", "modules_to_save", "original_module"), _ADAPTER),
    **dict.fromkeys(("_fp32_params", "_flat_param"), _TRAINER),
    **dict.fromkeys(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"), _INNER),
}  # fmt: skip


def find_wrapper_prefix(names: Sequence[str]) -> str:
    """What wrappers put before all of these names, the last dot included; empty if nothing.

    Example:
        >>> find_wrapper_prefix(["_orig_mod.module.lm_head.weight"])
        '_orig_mod.module.'
    """
    prefix = ""
    while word := _find_wrapper(names, len(prefix)):
        prefix += word
    return prefix


def is_wrapper_prefix(text: str) -> bool:
    """Whether a text is the names of wrappers, each with its dot, and no more."""
    return bool(text) and find_wrapper_prefix([text + "x"]) == text


def describe_wrapper_mark(names: Iterable[str]) -> str:
    """The first name that shows what was saved is not a plain model: what it is, and the way out.

    Empty if none does.
    """
    marked = (
        f"{quote(name)} is of {MARKS[word][0]}; {MARKS[word][1]}"
        for name in names
        for word in name.split(".")
        if word in MARKS
    )
    return next(marked, "")


def _find_wrapper(names: Sequence[str], start: int) -> str:
    """The wrapper that every name has at this place, with its dot."""
    for module in WRAPPER_MODULES:
        word = f"{module}."
        if names and all(name.startswith(word, start) for name in names):
            return word
    return ""
