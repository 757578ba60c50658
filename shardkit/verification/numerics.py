"""Level 3: the shards compute what the unsharded model computes, within its own rounding."""

from dataclasses import asdict
from pathlib import Path

import torch

from shardkit.errors import MODEL_ERRORS
from shardkit.shards.manifest import Manifest
from shardkit.verification.divergence import blame
from shardkit.verification.dummy_inputs import STEPS, make_inputs
from shardkit.verification.models import Sharded, Tensors, Unsharded
from shardkit.verification.report import Check
from shardkit.verification.tolerance import Judgement, agreement, divergence, judge, worst

WIDER = {torch.float64: torch.float64, torch.float32: torch.float64}


def check_numerics(
    folder: Path,
    manifest: Manifest,
    source: Path,
    sharded: Sharded,
    dtype: torch.dtype | None = None,
    beams: int = 0,
) -> Check:
    """Run both on the same inputs: outputs, and for a generator cached decoding and its choices.

    `dtype` None is the checkpoint's own.  `beams` also compares beam search, where a model has it.
    The reference is the unsharded model in float64, or in
    float32 for a 16-bit dtype.  Raises RanksError or CheckpointError where one cannot run at all.
    """
    dtype = sharded.load(folder, dtype)
    reference = Unsharded(source, WIDER.get(dtype, torch.float32))
    unsharded = Unsharded(source, dtype)
    inputs = make_inputs(reference.model)
    truth, own, ours = (m.forward(inputs) for m in (reference, unsharded, sharded))
    output, found = worst(ours, own, truth, dtype)
    numbers: dict[str, object] = {
        "dtype": _name(dtype),
        "reference_dtype": _name(reference.model.dtype),
        "output": output,
        **_shown(found),
    }
    faults = []
    if not found.good:
        faults = [_told(output, found), *blame(manifest, reference, unsharded, sharded, inputs)]
    elif reference.model.can_generate():
        mine, theirs = ours["logits"], truth["logits"]
        numbers |= {"kl_divergence": divergence(mine, theirs), "top1": agreement(mine, theirs)}
        faults = _decode(reference, unsharded, sharded, inputs, dtype, numbers)
        if beams and not faults:
            faults = _beam_search(unsharded, sharded, inputs, beams, numbers)
    summary = (
        f"{numbers['dtype']} error {found.sharded.max:.2g} against {numbers['reference_dtype']};"
        f" the unsharded model's own is {found.unsharded.max:.2g}, allowed {found.allowed.max:.2g}"
    )
    if "greedy" in numbers:
        summary += f"; greedy decoding is {numbers['greedy']}"
    return Check("numerics", "failed" if faults else "passed", summary, (*faults,), numbers)


def _decode(
    reference: Unsharded,
    unsharded: Unsharded,
    sharded: Sharded,
    inputs: Tensors,
    dtype: torch.dtype,
    numbers: dict[str, object],
) -> list[str]:
    """Greedy decoding with a cache: equal tokens, or a tie where they part."""
    their_ids, theirs = unsharded.generate(inputs, STEPS)
    our_ids, ours = sharded.generate(inputs, STEPS)
    try:
        true_ids, truth = reference.generate(inputs, STEPS)
    except (
        MODEL_ERRORS
    ):  # a class whose generate is for one dtype: then every token must be the same
        return _same_tokens(our_ids, their_ids, numbers)
    length = ours.shape[1]
    faults = []
    tied = False
    for row in range(len(ours)):
        same = _common(our_ids[row, -length:], their_ids[row, -length:])
        seen_alike = _common(true_ids[row, -length:], their_ids[row, -length:])
        upto = min(same + 1, seen_alike + 1, length)
        found = judge(ours[row, :upto], theirs[row, :upto], truth[row, :upto], dtype)
        if not found.good:
            faults.append(_told(f"cached decoding of sequence {row}", found))
        tied = tied or same < length
    numbers["greedy"] = "differs" if faults else "equal up to a tie" if tied else "equal"
    return faults


def _same_tokens(ours: torch.Tensor, theirs: torch.Tensor, numbers: dict[str, object]) -> list[str]:
    alike = torch.equal(ours, theirs)
    numbers["greedy"] = "equal" if alike else "differs"
    return [] if alike else ["cached decoding chooses other tokens"]


def _beam_search(
    unsharded: Unsharded, sharded: Sharded, inputs: Tensors, beams: int, numbers: dict[str, object]
) -> list[str]:
    """Beam search gives equal tokens; a model that has none is said to."""
    try:
        theirs = unsharded.search(inputs, STEPS, beams)
    except MODEL_ERRORS as error:
        numbers["beams"] = f"none unsharded: {type(error).__name__}"
        return []
    ours = sharded.search(inputs, STEPS, beams)
    numbers["beams"] = "equal" if torch.equal(ours, theirs) else "differ"
    return [] if numbers["beams"] == "equal" else [f"beam search over {beams} beams differs"]


def _common(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many leading tokens two sequences share."""
    different = (a != b).nonzero()
    return int(different[0]) if len(different) else len(a)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(found: Judgement) -> dict[str, object]:
    return {"error": asdict(found.sharded), "unsharded_error": asdict(found.unsharded),
            "allowed": asdict(found.allowed)}  # fmt: skip


def _told(what: str, found: Judgement) -> str:
    return (
        f"{what}: error {found.sharded.max:.3g} (rms {found.sharded.rms:.3g}), but the unsharded"
        f" model's rounding allows {found.allowed.max:.3g} (rms {found.allowed.rms:.3g})"
    )
