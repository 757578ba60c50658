"""The masked-sum proof of a layout: transformers alone runs it, without this project's runtime.

For each rank the checkpoint is written whole, zero outside the rank's own spans, and loaded and
run by transformers.  What the layers that end a parallel region put out (row-parallel ones, and
both ends of the vocabulary) must then sum over the ranks to what the whole model's put out.  A
round trip proves nothing of the kind: a wrong layout merges back bit for bit.

Each such layer's output is replaced by the whole model's as it runs, so every region of every rank
starts from true inputs, whatever residuals and norms lie between.  So is what a norm over a divided
width puts out, for a rank's own part: alone, it would normalise by that part's mean.  So, too, is
what an LSTM puts out, whose every step needs all ranks' units: real ranks alone prove it.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from shardkit.checkpoint import Checkpoint
from shardkit.errors import VerifyError
from shardkit.planning.plan import Placement, Plan, make_plan
from shardkit.recipe.recipe import Recipe
from shardkit.runtime.config import read_source_config
from shardkit.runtime.conversion import find_conversions
from shardkit.runtime.layers.experts import choose_expert_kernel
from shardkit.runtime.load import resolve_model_class
from shardkit.runtime.materialize import placements_by_parameter
from shardkit.runtime.model_runner import no_cache_options
from shardkit.verification.dummy_inputs import make_inputs

WEIGHTS = "model.safetensors"
SUMMED = ("row", "vocab")
GIVEN = ("norm", "gather")
Outputs = dict[str, list[torch.Tensor]]
Hook = Callable[[torch.nn.Module, object, Any], Any]


def misses(source: Path, recipe: Recipe, tp_size: int, scratch: Path) -> dict[str, float]:
    """By how much each summed layer of a model misses its output, relative to its largest value.

    `source` is a small checkpoint of one file.  Raises VerifyError for a weight that nothing runs.
    """
    model, plan = load(source), plan_of(source, recipe, tp_size)
    layers = owners(model, plan, SUMMED)
    given = [*owners(model, plan, GIVEN), *recurrent(model)]
    inputs = make_inputs(model)
    truth = record(model, inputs, [*layers, *given])
    if idle := sorted(set(layers.values()) - {layers[name] for name in truth if name in layers}):
        raise VerifyError(f"{source}: nothing ran {idle[0]}, so its layout is not proven")
    sums = {name: [torch.zeros_like(t) for t in truth[name]] for name in layers if name in truth}
    for tp_rank in range(tp_size):
        local = load(write_masked(source, plan, tp_rank, scratch / str(tp_rank)))
        found = record(local, inputs, [*layers, *given], truth)
        for name, totals in sums.items():
            for total, part in zip(totals, found[name], strict=True):
                total += part
    return {name: max(map(miss, totals, truth[name])) for name, totals in sums.items()}


def load(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder, as transformers itself loads it."""
    config = read_source_config(folder)
    model = resolve_model_class(config).from_pretrained(folder, config=config)
    assert isinstance(model, PreTrainedModel)
    choose_expert_kernel(model)
    return model.eval()


def plan_of(source: Path, recipe: Recipe, tp_size: int) -> Plan:
    """The plan of a checkpoint folder, from its headers and config alone."""
    with Checkpoint(source) as checkpoint:
        return make_plan(checkpoint.specs(), recipe, checkpoint.config, tp_size)


def placed_parameters(model: PreTrainedModel, plan: Plan) -> dict[str, Placement]:
    """Each of the model's parameters, tied ones by all their names, and its placement on disk."""
    stored = {p.spec.name: p for p in plan.placements if p.style != "ignore"}
    made = placements_by_parameter(model, stored, find_conversions(model, stored))
    by_tensor = {id(model.get_parameter_or_buffer(name)): p for name, p in made.items()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: by_tensor[id(tensor)] for name, tensor in named if id(tensor) in by_tensor}


def owners(model: PreTrainedModel, plan: Plan, styles: Iterable[str]) -> dict[str, str]:
    """The modules that own a weight of one of these styles, and its name on disk."""
    return {
        name.rpartition(".")[0]: placement.spec.name
        for name, placement in placed_parameters(model, plan).items()
        if placement.style in styles
        and (len(placement.spec.shape) > 1 or placement.style not in SUMMED)
    }


def recurrent(model: PreTrainedModel) -> list[str]:
    """The modules that gather what all ranks put out at every step."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.LSTM)]


def write_masked(source: Path, plan: Plan, tp_rank: int, folder: Path) -> Path:
    """Write the checkpoint again with zeros wherever `tp_rank` holds nothing.  Returns `folder`."""
    tensors = load_file(source / WEIGHTS)
    for placement in plan.placements:
        name = placement.spec.name
        tensors[name] = masked(tensors[name], placement, tp_rank, plan.tp_size)
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def masked(tensor: torch.Tensor, placement: Placement, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The tensor, zero outside the rank's spans; a row-parallel bias is rank 0's alone."""
    if placement.dim is None:
        return tensor * 0 if placement.style in ("row", "once") and tp_rank else tensor
    shape = [1] * tensor.ndim
    shape[placement.dim] = -1
    kept = torch.zeros(tensor.shape[placement.dim], dtype=torch.bool)
    for start, stop in placement.spans(tp_rank, tp_size):
        kept[start:stop] = True
    return tensor * kept.view(shape)


def record(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    layers: Iterable[str],
    truth: Outputs | None = None,
) -> Outputs:
    """What the named layers put out, call by call; `truth`, where given, takes its place."""
    found: Outputs = {}

    def hook_of(name: str) -> Hook:
        def hook(_module: object, _args: object, output: Any) -> Any:
            calls, first = found.setdefault(name, []), output
            if isinstance(output, tuple):
                first = output[0]
            calls.append(first.clone())  # models add residuals in place
            if truth is None:
                return None
            given = truth[name][len(calls) - 1].clone()
            return (given, *output[1:]) if isinstance(output, tuple) else given

        return hook

    with torch.inference_mode(), hooks(model, {name: hook_of(name) for name in layers}):
        model(**inputs, **no_cache_options(model))
    return found


@contextmanager
def hooks(model: PreTrainedModel, by_name: dict[str, Hook]) -> Iterator[None]:
    """Forward hooks on the named modules, for a while."""
    with ExitStack() as stack:
        for name, hook in by_name.items():
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def miss(total: torch.Tensor, whole: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the second's largest value."""
    return float((total - whole).abs().max() / whole.abs().max())
