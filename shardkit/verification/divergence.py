"""Where two models first part: the first module that diverges, and the tensors to blame."""

from collections.abc import Sequence

import torch

from shardkit.layout.spans import Span
from shardkit.layout.style import COLUMN, REPLICATE
from shardkit.planning.mesh import Mesh
from shardkit.planning.placement import Placement
from shardkit.runtime.conversion import find_conversions
from shardkit.runtime.materialize import placements_by_parameter
from shardkit.shards.manifest import Manifest
from shardkit.verification.models import Sharded, Tensors, Unsharded
from shardkit.verification.tolerance import judge

SHOWN = 6


def blame(
    manifest: Manifest,
    reference: Unsharded,
    unsharded: Unsharded,
    sharded: Sharded,
    inputs: Tensors,
) -> list[str]:
    """One line naming the first diverging module, in the order modules run, and its tensors."""
    names = [name for name, _ in reference.model.named_modules() if name]
    truth, own = reference.trace(inputs, names), unsharded.trace(inputs, names)
    ranks = sharded.trace(inputs, list(truth))
    placed = placements_by_tensor(manifest, unsharded)
    for name in truth:
        for tp_rank, outputs in enumerate(ranks):
            if name not in outputs or name not in own:
                continue
            spans = _held(placed.get(f"{name}.weight"), tp_rank, manifest.tp_size)
            expected = [_part(t, outputs[name], spans) for t in (own[name], truth[name])]
            if expected[0] is None or expected[1] is None:
                continue
            found = judge(outputs[name], expected[0], expected[1], outputs[name].dtype)
            if not found.good:
                return [
                    f"first diverging module: {name}, on rank {tp_rank}: error"
                    f" {found.sharded.max:.3g}, allowed {found.allowed.max:.3g};"
                    f" tensors to blame: {_tensors(name, placed)}"
                ]
    return ["no single module diverges: the error grows too fast over all of them"]


def placements_by_tensor(manifest: Manifest, unsharded: Unsharded) -> dict[str, Placement]:
    """The placement on disk that each of the model's own tensors is made of."""
    loaded = [n for n, p in manifest.placements.items() if p.style.is_loaded]
    return placements_by_parameter(
        unsharded.model, manifest.placements, find_conversions(unsharded.model, loaded)
    )


def _held(placement: Placement | None, tp_rank: int, tp_size: int) -> Sequence[Span]:
    if placement is None or placement.style is not COLUMN or placement.dim is None:
        return ()
    return placement.spans(Mesh(tp_size).rank(tp_rank))


def _part(whole: torch.Tensor, local: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor | None:
    """What a rank's output should be; None where it is a part nothing says the place of."""
    if whole.shape == local.shape:
        return whole
    if not spans or whole.shape[:-1] != local.shape[:-1]:
        return None
    part = torch.cat([whole[..., start:stop] for start, stop in spans], -1)
    return part if part.shape == local.shape else None


def _tensors(module: str, placed: dict[str, Placement]) -> str:
    """The sharded tensors on disk of a module, or of its block where it sums what others made."""
    parent = module.rpartition(".")[0]
    own = [p for name, p in placed.items() if name.startswith(f"{module}.")]
    if not own or own[0].style.is_summed:
        own = [p for name, p in placed.items() if name.startswith(f"{parent}.")]
    names = sorted({f"{p.spec.name} ({p.style.name})" for p in own if p.style is not REPLICATE})
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or module) + more
