"""Where two models begin to differ: the first module that diverges, and the tensors it uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardkit.layout import Span
from shardkit.layout.style import COLUMN, EXPERT, PADDED, REPLICATE
from shardkit.planning import Mesh, Placement, Plan, Rank
from shardkit.runtime.conversion import find_conversions, loaded_shapes
from shardkit.runtime.materialize import placements_by_parameter
from shardkit.runtime.model_runner import Tensors
from shardkit.runtime.parallelize import find_modules
from shardkit.shards.manifest import Manifest
from shardkit.verification.models import ReferenceModel, ShardedModel
from shardkit.verification.tolerance import compare_outputs

MAX_LISTED = 6
NO_MODULE = "no single module diverges: the error grows too fast over all of them"


def describe_divergence(
    manifest: Manifest,
    reference: ReferenceModel,
    unsharded: ReferenceModel,
    sharded: ShardedModel,
    inputs: Tensors,
) -> str:
    """One line that names the first diverging module, in the order modules run, and its tensors."""
    names = list_comparable(reference.model, manifest.plan)
    expected = reference.trace(inputs, names)
    rounded = unsharded.trace(inputs, names)
    ranks = sharded.trace(inputs, list(expected))
    shapes = loaded_shapes(manifest.weights)
    conversions = find_conversions(unsharded.model, shapes, manifest.plan.wrapper_prefix)
    placements = placements_by_parameter(unsharded.model, manifest.weights, conversions)
    divergence = find_divergence(placements, manifest.mesh, expected, rounded, ranks)
    return describe_no_module(manifest.plan) if divergence is None else divergence.text


def describe_no_module(plan: Plan) -> str:
    """Why no module may have diverged, each of which summed for itself as they were compared."""
    joint = "; or `joint_sums` add up what the model does not just add" if plan.joint_sums else ""
    return f"{NO_MODULE}{joint}"


def list_comparable(model: nn.Module, plan: Plan) -> list[str]:
    """The modules whose outputs can be compared by their names, in the order the model has them.

    Not those without tensors: what they output follows from others, may be a rank's part, and is of
    another call if a class calls them in an order that each process draws anew. Nor those of a list
    of which a rank keeps its own, under other numbers.
    """
    cut = [
        f"{path}.{name}."
        for rule in plan.module_attributes
        for path, module in find_modules(model, rule.module)
        if isinstance(
            getattr(module, name := rule.attribute.removesuffix("?"), None), nn.ModuleList
        )
    ]
    return [
        name
        for name, module in model.named_modules()
        if name
        and next(module.parameters(), None) is not None
        and not f"{name}.".startswith((*cut,))
    ]


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first module that diverges, and a line about it that names the tensors to blame."""

    module: str
    text: str


def find_divergence(
    placements: Mapping[str, Placement],
    mesh: Mesh,
    expected: Tensors,
    rounded: Tensors,
    ranks: Sequence[Tensors],
) -> Divergence | None:
    """The first module whose output is too far off on a rank, if there is one.

    Args:
        placements: Of each of the model's tensors, what it is made of.
        mesh: The ranks.
        expected: What modules output in the reference, by name, in the order they ran.
        rounded: What they output in the unsharded model.
        ranks: What they output on each rank.
    """
    for name in expected:
        for tp_rank, outputs in enumerate(ranks):
            if name not in outputs or name not in rounded:
                continue
            if not outputs[name].is_floating_point():
                continue  # the numbers of experts, which follow from scores
            spans = _output_spans(placements.get(f"{name}.weight"), mesh.rank(tp_rank))
            parts = [_select_part(t[name], outputs[name], spans) for t in (rounded, expected)]
            if parts[0] is None or parts[1] is None or _is_partial(name, placements):
                continue
            result = compare_outputs(outputs[name], parts[0], parts[1], outputs[name].dtype)
            if not result.ok:
                text = (
                    f"first diverging module: {name}, on rank {tp_rank}: error"
                    f" {result.sharded.max:.3g}, allowed {result.allowed.max:.3g};"
                    f" tensors to blame: {_list_tensors(name, placements)}"
                )
                return Divergence(name, text)
    return None


def _is_partial(module: str, placements: Mapping[str, Placement]) -> bool:
    """Whether a rank's output of a module has zeros in the place of what other ranks have."""
    placement = placements.get(f"{module}.weight")
    if placement is not None and placement.style in (PADDED, EXPERT):
        return True
    outer = (module[:at] for at, c in enumerate(module) if c == ".")
    around = (placements.get(f"{name}.weight") for name in outer)
    if any(p is not None and p.style is not REPLICATE for p in around):
        return True  # a norm inside of an embedding is given this rank's rows alone
    leaf = module.rpartition(".")[2]
    return any(
        p.expert is not None and leaf in p.expert.module_names
        for name, p in placements.items()
        if name.startswith(f"{module}.")
    )


def _output_spans(placement: Placement | None, rank: Rank) -> Sequence[Span]:
    """Which columns of a column-parallel module's output a rank has; none for other modules."""
    if placement is None or placement.style is not COLUMN or placement.dim is None:
        return ()
    return placement.spans(rank)


def _select_part(
    output: torch.Tensor, local: torch.Tensor, spans: Sequence[Span]
) -> torch.Tensor | None:
    """What a rank's output should be; None if it is a part whose position is not known."""
    if output.shape == local.shape:
        return output
    if not spans or output.shape[:-1] != local.shape[:-1]:
        return None
    part = torch.cat([output[..., start:stop] for start, stop in spans], -1)
    return part if part.shape == local.shape else None


def _list_tensors(module: str, placements: Mapping[str, Placement]) -> str:
    """The sharded tensors on disk of a module, or of its block if it sums what others computed."""
    parent = module.rpartition(".")[0]
    used = [p for name, p in placements.items() if name.startswith(f"{module}.")]
    if not used or used[0].style.is_summed:
        used = [p for name, p in placements.items() if name.startswith(f"{parent}.")]
    names = sorted({f"{p.spec.name} ({p.style.name})" for p in used if p.style is not REPLICATE})
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or module) + more
