"""Tries every form in which checkpoints of a model are found, with transformers' report as referee.

A sample is saved as each class that transformers has for its type, changed as real checkpoints are
changed, and loaded as each other class. What transformers loads without a missing tensor must
split, run over real ranks, and compute what transformers computes.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from shardkit.authoring.masked_sum import WEIGHT_FILE
from shardkit.authoring.model_classes import build_model, list_classes
from shardkit.authoring.samples import Sample, perturb
from shardkit.checkpoint import Checkpoint
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.errors import MODEL_ERRORS, ShardkitError
from shardkit.planning import plan_for
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.runtime.model_runner import ModelRunner
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.models import ShardedModel, select_float_outputs

Tensors = dict[str, torch.Tensor]
UNKNOWN_CLASS = "ModelOfAnotherLibrary"
MAX_ERROR = 1e-4  # relative to the largest output, in float32: a wrong or random tensor errs by 0.1


@dataclass(frozen=True, slots=True)
class Form:
    """One form of a sample: the class it is saved as and loaded as, and what was changed."""

    sample: str
    saved_as: str
    loaded_as: str
    change: str


@dataclass(frozen=True, slots=True)
class FormResult:
    """What became of a form.

    Attributes:
        form: The form.
        loads: Whether transformers loads it without a missing tensor.
        fault: What went wrong if it does; empty if the shards compute the same.
    """

    form: Form
    loads: bool
    fault: str = ""


def remove_prefix(tensors: Tensors, model: PreTrainedModel) -> Tensors:
    """The names without the base model's prefix, as a base model saves them."""
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def store_ties(tensors: Tensors, model: PreTrainedModel) -> Tensors:
    """Tied tensors stored under each of their names, as older versions did."""
    state = model.state_dict()
    ties = (model.all_tied_weights_keys or {}).keys()
    return {**{name: state[name].clone() for name in ties if name in state}, **tensors}


def keep_names(tensors: Tensors, model: PreTrainedModel) -> Tensors:
    """The tensors as they are saved."""
    return tensors


CHANGES: Mapping[str, Callable[[Tensors, PreTrainedModel], Tensors]] = {
    "as saved": keep_names,
    "without the prefix": remove_prefix,
    "ties stored": store_ties,
}


def try_forms(
    sample: Sample, ranks: RankProcesses, scratch: Path, names: Collection[str] = ()
) -> Iterator[FormResult]:
    """Try a sample in every form that is new: changes that change nothing are left out.

    Args:
        sample: The sample.
        ranks: The ranks that run the shards.
        scratch: An empty folder.
        names: The classes to try; by default every one that transformers has for the type.
    """
    config = sample.model_class.config_class(**sample.config)
    classes = [c for c in list_classes(type(config)) if not names or c.__name__ in names]
    for at, cls in enumerate(classes):
        folder = scratch / str(at)
        try:
            model = _save(cls, config, folder)
        except MODEL_ERRORS:
            continue  # a class that this config does not suit
        saved = load_file(folder / WEIGHT_FILE)
        for change, apply in CHANGES.items():
            tensors = apply(saved, model)
            if change != "as saved" and tensors.keys() == saved.keys():
                continue
            save_file(tensors, folder / WEIGHT_FILE, metadata={"format": "pt"})
            for loaded_as in (*classes, None):
                form = Form(sample.name, cls.__name__, _name_of(loaded_as), change)
                yield _try_form(form, loaded_as, cls, folder, ranks)


def _save(cls: type[PreTrainedModel], config: Any, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build_model(cls, config)
    perturb(model)
    model.save_pretrained(folder)
    return model


def _name_of(loaded_as: type[PreTrainedModel] | None) -> str:
    return UNKNOWN_CLASS if loaded_as is None else loaded_as.__name__


def _try_form(
    form: Form,
    loaded_as: type[PreTrainedModel] | None,
    saved_as: type[PreTrainedModel],
    folder: Path,
    ranks: RankProcesses,
) -> FormResult:
    """Let transformers load it; if that leaves nothing out, split and run it."""
    path = folder / "config.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "architectures": [form.loaded_as]}))
    try:
        model, report = (loaded_as or saved_as).from_pretrained(folder, output_loading_info=True)
    except MODEL_ERRORS:
        return FormResult(form, loads=False)
    if report["missing_keys"] or report["mismatched_keys"]:
        return FormResult(form, loads=False)
    try:
        return FormResult(form, True, _compare(model.eval(), folder, ranks, loaded_as is None))
    except ShardkitError as error:
        return FormResult(form, True, str(error))
    except MODEL_ERRORS as error:
        return FormResult(form, True, f"{type(error).__name__}: {error}")


def _compare(model: PreTrainedModel, folder: Path, ranks: RankProcesses, is_free: bool) -> str:
    """Split a folder, run the shards, and say in what they differ from transformers' model.

    If the class is free to choose, that it runs is enough.
    """
    shards = folder.parent / f"{folder.name}-shards"
    with Checkpoint(folder) as checkpoint:
        recipe, plan = plan_for(checkpoint, ranks.size)
        split_checkpoint(checkpoint, plan, recipe, shard_destination(shards, force=True))
    sharded = ShardedModel(ranks)
    sharded.load(shards, None)
    inputs = make_inputs(model)
    outputs = sharded.forward(inputs)
    if is_free:
        return ""
    runner = ModelRunner(model, torch.device("cpu"))
    expected = select_float_outputs(runner.forward(inputs))
    if not expected.keys() & outputs.keys():
        return "no output in common"
    for name in expected.keys() & outputs.keys():
        error = (outputs[name] - expected[name]).abs().max() / expected[name].abs().max()
        if not error < MAX_ERROR:
            return f"{name} is off by {float(error):.1e}"
    return ""
