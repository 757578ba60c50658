"""Tries every form in which checkpoints of a model are found, with transformers as the referee.

What transformers loads without a missing tensor must split, run over real ranks, and compute what
transformers computes.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.authoring.forms import UNKNOWN_CLASS, Form, ModelClassType, write_forms
from shardkit.authoring.samples import Sample
from shardkit.checkpoint import Checkpoint
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.errors import MODEL_ERRORS, ShardkitError, first_line
from shardkit.planning import plan_for
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.runtime.model_runner import ModelRunner, Tensors
from shardkit.runtime.models.registry import find_model_class
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.models import ShardedModel, select_float_outputs

MAX_ERROR = 1e-4  # relative to the largest output, in float32: a wrong or random tensor errs by 0.1


@dataclass(frozen=True, slots=True)
class FormResult:
    """What became of a form.

    Attributes:
        form: The form.
        loads: Whether transformers loads it without a missing tensor, and runs it.
        fault: What went wrong if it does; empty if the shards compute the same.
        note: Why transformers does not run what it loads; empty if it does.
    """

    form: Form
    loads: bool
    fault: str = ""
    note: str = ""


class UnshardedRunError(Exception):
    """transformers' own model does not run: there is nothing that shards could compute as well."""


@dataclass
class FormChecker:
    """Splits forms and runs them.

    Attributes:
        ranks: The ranks that run the shards.
        scratch: Where shards are written.
        runs: Of what was run: the class that saved it, the one that loaded it, and what was loaded.
            A second form of which the same tensors are loaded as the same class is not run again.
    """

    ranks: RankProcesses
    scratch: Path
    runs: set[tuple[str, str, frozenset[str]]] = field(default_factory=set)

    def check(self, form: Form, folder: Path, cls: ModelClassType) -> FormResult:
        """Let transformers load a form; if that leaves nothing out, split and run it."""
        try:
            model, report = cls.from_pretrained(folder, output_loading_info=True)
        except MODEL_ERRORS:
            return FormResult(form, loads=False)
        if report["missing_keys"] or report["mismatched_keys"]:
            return FormResult(form, loads=False)
        try:
            return FormResult(form, True, self._compare(model.eval(), folder, form))
        except UnshardedRunError as error:
            return FormResult(form, loads=False, note=str(error))
        except ShardkitError as error:
            return FormResult(form, True, str(error))
        except MODEL_ERRORS as error:
            return FormResult(form, True, f"{type(error).__name__}: {error}")

    def _compare(self, model: PreTrainedModel, folder: Path, form: Form) -> str:
        """Split a folder, run the shards, and say in what they differ from transformers' model.

        If the class is free to choose, the model is one of the class that was chosen.
        """
        shards = self.scratch / "shards"
        with Checkpoint(folder) as checkpoint:
            recipe, plan = plan_for(checkpoint, self.ranks.size)
            loaded = frozenset(p.spec.name for p in plan.placements if p.is_loaded)
            run = form.saved_as, plan.model_class or form.loaded_as, loaded
            if run in self.runs:
                return ""
            split_checkpoint(checkpoint, plan, recipe, shard_destination(shards, force=True))
        if form.loaded_as == UNKNOWN_CLASS and type(model).__name__ != plan.model_class:
            chosen: Any = find_model_class(plan.model_class)
            model, report = chosen.from_pretrained(folder, output_loading_info=True)
            if report["missing_keys"]:
                return f"{plan.model_class} was chosen, and lacks {min(report['missing_keys'])}"
        sharded = ShardedModel(self.ranks)
        sharded.load(shards, None)
        inputs = make_inputs(model)
        expected = run_unsharded(model.eval(), inputs)
        outputs = sharded.forward(inputs)
        if not (fault := describe_difference(outputs, expected)):
            self.runs.add(run)
        return fault


def run_unsharded(model: PreTrainedModel, inputs: Tensors) -> Tensors:
    """The outputs of transformers' own model. Raises UnshardedRunError if it fails."""
    try:
        return select_float_outputs(ModelRunner(model, torch.device("cpu")).forward(inputs))
    except Exception as error:  # whatever it is: the class and its config are given
        raise UnshardedRunError(f"{type(error).__name__}: {first_line(error)}") from error


def describe_difference(outputs: Tensors, expected: Tensors) -> str:
    """In what outputs differ from what is expected; empty if they are the same."""
    if expected and not expected.keys() & outputs.keys():  # a class's may all be nested
        return "no output in common"
    for name in expected.keys() & outputs.keys():
        error = (outputs[name] - expected[name]).abs().max() / expected[name].abs().max()
        if not error < MAX_ERROR:
            return f"{name} is off by {float(error):.1e}"
    return ""


def summarize_forms(sample: Sample, ranks: RankProcesses, scratch: Path) -> dict[str, Any]:
    """Try a sample in every form, and count as JSON values what became of them."""
    results = list(try_forms(sample, ranks, scratch))
    return {
        "sample": sample.name,
        "model_type": sample.model_type,
        "tried": len(results),
        "loaded": sum(result.loads for result in results),
        "not_run": sorted({f"{r.form.saved_as}: {r.note}" for r in results if r.note}),
        "faults": [
            f"{r.form.saved_as} {r.form.change}, loaded as {r.form.loaded_as}: {r.fault}"
            for r in results
            if r.fault
        ],
    }


def try_forms(
    sample: Sample, ranks: RankProcesses, scratch: Path, names: Collection[str] = ()
) -> Iterator[FormResult]:
    """Try a sample in every form.

    Args:
        sample: The sample.
        ranks: The ranks that run the shards.
        scratch: An empty folder.
        names: The classes to try; by default every one that transformers has for the type.
    """
    checker = FormChecker(ranks, scratch)
    for form, saved, cls in write_forms(sample, scratch / "models", names):
        yield checker.check(form, saved.folder, cls)
