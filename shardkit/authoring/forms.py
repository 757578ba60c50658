"""The forms in which checkpoints of a model are found.

A sample is saved as each class that transformers has for its type, under the older names that its
conversion table gives, changed as real checkpoints are changed, and to be loaded as each other
class, or as one that does not exist.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from shardkit.authoring.masked_sum import WEIGHT_FILE
from shardkit.authoring.model_classes import build_model, list_classes
from shardkit.authoring.samples import Sample, perturb
from shardkit.errors import MODEL_ERRORS
from shardkit.runtime.conversion import find_conversions

Tensors = dict[str, torch.Tensor]
ModelClassType = type[PreTrainedModel]

UNKNOWN_CLASS = "ModelOfAnotherLibrary"
END = 2  # the token that ends texts, where a sample has none


@dataclass(frozen=True, slots=True)
class Form:
    """One form of a sample: the class it is saved as and loaded as, and what was changed."""

    sample: str
    saved_as: str
    loaded_as: str
    change: str


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A sample saved as one class.

    Attributes:
        model_class: The class.
        model: The model.
        folder: Where it is saved.
        tensors: Its tensors, by the names in the file.
        others: What the other classes of the type save beside the base model, or as it.
    """

    model_class: ModelClassType
    model: PreTrainedModel
    folder: Path
    tensors: Tensors
    others: Sequence[Tensors]


def keep_names(saved: SavedModel) -> Tensors:
    """The tensors as they are saved."""
    return saved.tensors


def remove_prefix(saved: SavedModel) -> Tensors:
    """The names without the base model's prefix, as a base model saves them."""
    prefix = f"{saved.model.base_model_prefix}."
    return {name.removeprefix(prefix): tensor for name, tensor in saved.tensors.items()}


def store_ties(saved: SavedModel) -> Tensors:
    """Tied tensors stored under each of their names, as older versions did."""
    state = saved.model.state_dict()
    ties = (saved.model.all_tied_weights_keys or {}).keys()
    return {**{name: state[name].clone() for name in ties if name in state}, **saved.tensors}


def store_buffers(saved: SavedModel) -> Tensors:
    """Buffers stored that a model makes anew, as older versions stored them."""
    state = saved.model.state_dict()
    buffers = {n: b.clone() for n, b in saved.model.named_buffers() if n not in state and b.numel()}
    return {**buffers, **saved.tensors}


def add_heads(saved: SavedModel) -> Tensors:
    """The heads of the type's other classes stored too: what goes nowhere in this class.

    Of two heads that share a name and differ in shape, a checkpoint can have but one.
    """
    prefix = f"{saved.model.base_model_prefix}."
    plain = {name.removeprefix(prefix) for name in saved.tensors}
    stored = dict(saved.tensors)
    for tensors in saved.others:
        if any(stored[n].shape != t.shape for n, t in tensors.items() if n in stored):
            continue
        heads = {n: t for n, t in tensors.items() if n.removeprefix(prefix) not in plain}
        shapes = {name: tuple(tensor.shape) for name, tensor in heads.items()}
        conversions = find_conversions(saved.model, shapes)
        own = {name for conversion in conversions for name, _ in conversion.sources}
        stored = {**{name: heads[name] for name in heads.keys() - own}, **stored}
    return stored


# Loaded as every class of the type: what the others lack or leave out is known of every pair.
NAMES: Mapping[str, Callable[[SavedModel], Tensors]] = {
    "as saved": keep_names,
    "without the prefix": remove_prefix,
}
# Loaded as the class that saved it.
ADDITIONS: Mapping[str, Callable[[SavedModel], Tensors]] = {
    "ties stored": store_ties,
    "buffers stored": store_buffers,
    "other heads stored": add_heads,
}


def write_forms(
    sample: Sample, scratch: Path, names: Collection[str] = ()
) -> Iterator[tuple[Form, SavedModel, ModelClassType]]:
    """Write a sample in every form that is new: changes that change nothing are left out.

    Args:
        sample: The sample.
        scratch: An empty folder.
        names: The classes to try; by default every one that transformers has for the type.

    Yields:
        Each form, written over the one before it; what was saved; and the class that transformers
        is to load it as.
    """
    config = sample.make_config()
    if getattr(config, "eos_token_id", END) is None:
        config.eos_token_id = END  # which classifiers of texts look for
    classes = [c for c in list_classes(sample.model_type) if not names or c.__name__ in names]
    models = list(_save_classes(classes, config, scratch))
    for saved in models:
        for change, apply in {**NAMES, **ADDITIONS}.items():
            tensors = apply(saved)
            if change != "as saved" and tensors.keys() == saved.tensors.keys():
                continue
            save_file(tensors, saved.folder / WEIGHT_FILE, metadata={"format": "pt"})
            own = saved.model_class
            for cls in [each.model_class for each in models] if change in NAMES else [own]:
                yield _write_form(sample, saved, cls.__name__, change), saved, cls
            yield _write_form(sample, saved, UNKNOWN_CLASS, change), saved, own


def _save_classes(
    classes: Sequence[ModelClassType], config: Any, scratch: Path
) -> Iterator[SavedModel]:
    """Save a model of each class that the config suits."""
    models: list[tuple[PreTrainedModel, Path, Tensors]] = []
    for at, cls in enumerate(classes):
        try:
            model = _save(cls, deepcopy(config), scratch / str(at))  # which some classes change
            models.append((model, scratch / str(at), load_file(scratch / str(at) / WEIGHT_FILE)))
        except MODEL_ERRORS:
            continue  # a class that this config does not suit
    for model, folder, tensors in models:
        prefix = model.base_model_prefix
        others = [
            _remove_base(other, each.base_model_prefix, prefix)
            for each, _, other in models
            if each is not model
        ]
        yield SavedModel(type(model), model, folder, tensors, others)


def _remove_base(tensors: Tensors, prefix: str, usual: str) -> Tensors:
    """The tensors without those of a base model under another prefix than is usual."""
    inside = f"{prefix}."
    return {n: t for n, t in tensors.items() if prefix == usual or not n.startswith(inside)}


def _save(cls: ModelClassType, config: Any, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build_model(cls, config)
    perturb(model)
    model.save_pretrained(folder)
    return model


def _write_form(sample: Sample, saved: SavedModel, loaded_as: str, change: str) -> Form:
    path = saved.folder / "config.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "architectures": [loaded_as]}))
    return Form(sample.name, saved.model_class.__name__, loaded_as, change)
