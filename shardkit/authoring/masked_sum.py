"""The masked-sum proof of a layout: transformers alone runs it, without this project's runtime.

For each rank the whole checkpoint is written, but zero outside of the rank's own spans, and loaded
and run by transformers. The outputs of the layers that end a parallel region (row-parallel layers,
and both ends of the vocabulary) must then sum over the ranks to the outputs of the unsharded model.
A round trip proves nothing of the kind: a wrong layout merges back bit for bit.

As it runs, each such layer's output is replaced by the unsharded model's, so that every region of
every rank starts from true inputs, whatever residuals and norms are between. So is the output of a
norm over a divided width: alone, a rank would normalize by its own part's mean. So is the output of
a recurrent layer, each step of which needs all ranks' units: only real ranks prove that.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from shardkit.authoring.hooks import Hook, first_output, run_with_hooks
from shardkit.checkpoint import Checkpoint
from shardkit.errors import VerifyError
from shardkit.layout import Style
from shardkit.layout.style import EXPERT
from shardkit.planning import Placement, Plan, Rank, make_plan
from shardkit.recipe.recipe import Recipe
from shardkit.runtime.config import read_source_config
from shardkit.runtime.conversion import find_conversions, loaded_shapes
from shardkit.runtime.layers.experts import choose_expert_kernel
from shardkit.runtime.materialize import placements_by_parameter
from shardkit.runtime.rank_shard import resolve_model_class
from shardkit.verification.dummy_inputs import make_inputs

WEIGHT_FILE = "model.safetensors"
Outputs = dict[str, list[torch.Tensor]]


def masked_sum_errors(
    source: Path, recipe: Recipe, tp_size: int, scratch: Path, expert_parallel: bool = False
) -> dict[str, float]:
    """The error of the masked sum of each layer that is summed over the ranks.

    Args:
        source: A small checkpoint of one file.
        recipe: The recipe to prove.
        tp_size: The number of ranks.
        scratch: An empty folder for each rank's masked checkpoint.
        expert_parallel: Whether each rank has whole experts.

    Returns:
        By module, the largest difference of the sum from the unsharded model's output, relative to
        that output's largest value.

    Raises:
        VerifyError: The model does not run a layer that has a weight to sum.
    """
    model, plan = load_reference(source), plan_folder(source, recipe, tp_size, expert_parallel)
    layers = find_owners(model, plan, lambda style: style.is_summed)
    names = [*layers, *find_owners(model, plan, lambda style: style.needs_full_width)]
    inputs = make_inputs(model)
    truth = record_outputs(model, inputs, names)
    if idle := sorted(set(layers.values()) - {layers[name] for name in truth if name in layers}):
        raise VerifyError(f"{source}: nothing ran {idle[0]}, so its layout is not proven")
    sums = {name: [torch.zeros_like(t) for t in truth[name]] for name in layers if name in truth}
    unshared = _record_without_experts(source, plan, scratch / "none", inputs, truth)
    for rank in plan.mesh.ranks():
        local = load_reference(write_masked(source, plan, rank, scratch / str(rank.index)))
        outputs = record_outputs(local, inputs, names, truth)
        for name, totals in sums.items():
            for at, (total, part) in enumerate(zip(totals, outputs[name], strict=True)):
                total += part - unshared[name][at] if rank.index and name in unshared else part
    return {name: max(map(relative_error, totals, truth[name])) for name, totals in sums.items()}


def _record_without_experts(
    source: Path, plan: Plan, folder: Path, inputs: Mapping[str, torch.Tensor], truth: Outputs
) -> Outputs:
    """What mixtures output without any expert's weights: the part of what passes through them.

    Rank 0 alone adds it; nothing if ranks share every expert.
    """
    if not plan.is_expert_parallel:
        return {}
    model = load_reference(write_masked(source, plan, None, folder))
    names = [n for n in find_owners(model, plan, lambda style: style is EXPERT) if n in truth]
    return record_outputs(model, inputs, names, truth)


def load_reference(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder, as transformers itself loads it."""
    config = read_source_config(folder)
    model = resolve_model_class(config).from_pretrained(folder, config=config)
    assert isinstance(model, PreTrainedModel)
    choose_expert_kernel(model)
    return model.eval()


def plan_folder(source: Path, recipe: Recipe, tp_size: int, expert_parallel: bool = False) -> Plan:
    """The plan of a checkpoint folder, from its headers and config alone."""
    with Checkpoint(source) as checkpoint:
        return make_plan(checkpoint.specs(), recipe, checkpoint.config, tp_size, expert_parallel)


def match_parameters(model: PreTrainedModel, plan: Plan) -> dict[str, Placement]:
    """The placement on disk of each of the model's parameters; tied ones by all their names."""
    stored = {p.spec.name: p for p in plan.placements}
    conversions = find_conversions(model, loaded_shapes(stored))
    placements = placements_by_parameter(model, stored, conversions)
    by_id = {id(model.get_parameter_or_buffer(name)): p for name, p in placements.items()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: by_id[id(tensor)] for name, tensor in named if id(tensor) in by_id}


def find_owners(
    model: PreTrainedModel, plan: Plan, wanted: Callable[[Style], bool]
) -> dict[str, str]:
    """The modules that own a weight of a wanted style, and that weight's name on disk."""
    return {
        name.rpartition(".")[0]: placement.spec.name
        for name, placement in match_parameters(model, plan).items()
        if wanted(placement.style)
        and (len(placement.spec.shape) > 1 or not placement.style.is_summed)
    }


def write_masked(source: Path, plan: Plan, rank: Rank | None, folder: Path) -> Path:
    """Write the checkpoint again with zeros wherever `rank` holds nothing. Returns `folder`.

    Without a rank, experts alone are zero.
    """
    tensors = load_file(source / WEIGHT_FILE)
    for placement in plan.placements:
        name = placement.spec.name
        tensors[name] = mask_tensor(tensors[name], placement, rank)
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    save_file(tensors, folder / WEIGHT_FILE, {"format": "pt"})
    return folder


def mask_tensor(tensor: torch.Tensor, placement: Placement, rank: Rank | None) -> torch.Tensor:
    """The tensor, zero outside the rank's spans; a row-parallel bias is only on rank 0."""
    if rank is None:
        return tensor * 0 if placement.style is EXPERT else tensor
    if placement.dim is None:
        is_absent = placement.is_loaded and not placement.spans(rank)
        is_added = placement.style.is_added_once and not rank.is_first
        return tensor * 0 if is_absent or is_added else tensor
    shape = [1] * tensor.ndim
    shape[placement.dim] = -1
    kept = torch.zeros(tensor.shape[placement.dim], dtype=torch.bool)
    for start, stop in placement.spans(rank):
        kept[start:stop] = True
    return tensor * kept.view(shape)


def record_outputs(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    names: Iterable[str],
    truth: Outputs | None = None,
) -> Outputs:
    """The outputs of the named modules, call by call; if `truth` is given, it replaces them."""
    outputs: Outputs = {}

    def make_hook(name: str) -> Hook:
        def record_output(_module: object, _args: object, output: Any) -> Any:
            calls = outputs.setdefault(name, [])
            calls.append(first_output(output).clone())  # models add residuals in place
            if truth is None:
                return None
            true_output = truth[name][len(calls) - 1].clone()
            return (true_output, *output[1:]) if isinstance(output, tuple) else true_output

        return record_output

    with torch.inference_mode():
        run_with_hooks(model, [(name, make_hook(name)) for name in dict.fromkeys(names)], inputs)
    return outputs


def relative_error(total: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the second's largest value."""
    return float((total - truth).abs().max() / truth.abs().max())
