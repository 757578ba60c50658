"""Level 3: the shards compute what the unsharded model computes, within its own rounding."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from shardkit.runtime.model_runner import Generation, Tensors
from shardkit.shards.manifest import Manifest
from shardkit.verification.divergence import describe_divergence
from shardkit.verification.dummy_inputs import count_steps, make_inputs
from shardkit.verification.models import ReferenceModel, ShardedModel
from shardkit.verification.report import Check, Verdict
from shardkit.verification.tolerance import (
    Comparison,
    compare_outputs,
    kl_divergence,
    top1_agreement,
    worst_output,
)

WIDER = {torch.float64: torch.float64, torch.float32: torch.float64}
PLAIN_WEIGHTS = "the unsharded model's quantized weights are computed by a second implementation"
# What transformers raises if a class cannot do what it is asked for.
UNSUPPORTED = (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError)


def check_numerics(
    folder: Path,
    manifest: Manifest,
    source: Path,
    sharded: ShardedModel,
    dtype: torch.dtype | None = None,
    beams: int = 0,
) -> Check:
    """Run the shards and the unsharded model on the same inputs.

    Compares the outputs, and for a model that generates text also cached greedy decoding. The
    reference is the unsharded model in float64, or in float32 for a 16-bit dtype.

    Args:
        folder: The shard folder.
        manifest: Its manifest.
        source: The folder of the unsharded checkpoint.
        sharded: The ranks, which load `folder`.
        dtype: What to compute in; None means the checkpoint's own dtype.
        beams: Also compare beam search of this width, if the model has it; 0 means not.

    Raises:
        RanksError: The shards cannot run.
        CheckpointError: The source cannot run.
    """
    dtype = sharded.load(folder, dtype)
    reference = ReferenceModel(source, WIDER.get(dtype, torch.float32))
    inputs, quantized = make_inputs(reference.model), len(manifest.plan.grouping.weights)
    models = _Models(reference, ReferenceModel(source, dtype), sharded, dtype, quantized)
    expected, rounded, outputs = models.run(lambda model: model.forward(inputs))
    output, result = worst_output(outputs, rounded, expected, dtype)
    models.numbers |= {"output": output, **_comparison_numbers(result)}
    if not result.ok:
        cause = describe_divergence(manifest, reference, models.unsharded, sharded, inputs)
        faults = [_describe_excess(output, result), cause]
    elif reference.model.can_generate():
        logits = outputs["logits"], expected["logits"]
        models.numbers |= {"kl_divergence": kl_divergence(*logits), "top1": top1_agreement(*logits)}
        faults = models.compare_decoding(inputs)
        if beams and not faults:
            faults = models.compare_beam_search(inputs, beams)
    else:
        faults = []
    verdict: Verdict = "failed" if faults else "passed"
    return Check("numerics", verdict, models.summary(result), (*faults,), models.numbers)


@dataclass
class _Models:
    """The models of one check, how many weights are quantized, and the numbers so far."""

    reference: ReferenceModel
    unsharded: ReferenceModel
    sharded: ShardedModel
    dtype: torch.dtype
    quantized: int = 0
    numbers: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wider = self.reference.model.dtype
        self.numbers = {"dtype": _dtype_name(self.dtype), "reference_dtype": _dtype_name(wider)}
        self.numbers |= {"quantized_weights": self.quantized} if self.quantized else {}

    def run(
        self, action: Callable[[ReferenceModel | ShardedModel], Tensors]
    ) -> tuple[Tensors, Tensors, Tensors]:
        """The result of each model: the reference, the unsharded and the sharded one."""
        return action(self.reference), action(self.unsharded), action(self.sharded)

    def compare_decoding(self, inputs: Tensors) -> list[str]:
        """Greedy decoding with a cache: equal tokens, or a tie where they first differ."""
        steps = count_steps(self.reference.model, inputs)
        unsharded = self.unsharded.generate(inputs, steps)
        sharded = self.sharded.generate(inputs, steps)
        try:
            reference = self.reference.generate(inputs, steps)
        except UNSUPPORTED:  # a class that generates in one dtype only: tokens must be equal
            equal = torch.equal(sharded.ids, unsharded.ids)
            self.numbers["greedy"] = "equal" if equal else "differs"
            return [] if equal else ["cached decoding chooses other tokens"]
        faults = [
            _describe_excess(f"cached decoding of sequence {row}", result)
            for row in range(len(sharded.ids))
            if not (result := self._compare_row(row, sharded, unsharded, reference)).ok
        ]
        tied = not torch.equal(sharded.ids[:, -steps:], unsharded.ids[:, -steps:])
        self.numbers["greedy"] = "differs" if faults else "equal up to a tie" if tied else "equal"
        return faults

    def compare_beam_search(self, inputs: Tensors, beams: int) -> list[str]:
        """Beam search chooses equal tokens; a model that has none says so in the numbers."""
        steps = count_steps(self.reference.model, inputs)
        try:
            unsharded = self.unsharded.generate(inputs, steps, beams)
        except UNSUPPORTED as error:
            self.numbers["beams"] = f"none unsharded: {type(error).__name__}"
            return []
        equal = torch.equal(self.sharded.generate(inputs, steps, beams).ids, unsharded.ids)
        self.numbers["beams"] = "equal" if equal else "differ"
        return [] if equal else [f"beam search over {beams} beams differs"]

    def summary(self, result: Comparison) -> str:
        """The errors in one line."""
        greedy = self.numbers.get("greedy")
        return (
            f"{self.numbers['dtype']} error {result.sharded.max:.2g} against"
            f" {self.numbers['reference_dtype']}; the unsharded model's own is"
            f" {result.unsharded.max:.2g}, allowed {result.allowed.max:.2g}"
            + (f"; greedy decoding is {greedy}" if greedy else "")
            + (f"; {PLAIN_WEIGHTS}" if self.quantized else "")
        )

    def _compare_row(
        self, row: int, sharded: Generation, unsharded: Generation, reference: Generation
    ) -> Comparison:
        """One sequence's logits, up to the first step at which any of the models differs."""
        steps = _steps_of(sharded)
        chosen = [g.ids[row, -steps:] for g in (sharded, unsharded, reference)]
        equal = _count_equal(chosen[0], chosen[1]), _count_equal(chosen[2], chosen[1])
        stop = min(*equal, steps - 1) + 1
        logits = [_logits_of(g)[row, :stop] for g in (sharded, unsharded, reference)]
        return compare_outputs(logits[0], logits[1], logits[2], self.dtype)


def _logits_of(generation: Generation) -> torch.Tensor:
    assert generation.logits is not None
    return generation.logits


def _steps_of(generation: Generation) -> int:
    return _logits_of(generation).shape[1]


def _count_equal(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many leading steps two sequences share, each of one token or of several."""
    different = (a != b).reshape(len(a), -1).any(-1).nonzero()
    return int(different[0]) if len(different) else len(a)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _comparison_numbers(result: Comparison) -> dict[str, object]:
    return {
        "error": asdict(result.sharded),
        "unsharded_error": asdict(result.unsharded),
        "allowed": asdict(result.allowed),
    }


def _describe_excess(what: str, result: Comparison) -> str:
    return (
        f"{what}: error {result.sharded.max:.3g} (rms {result.sharded.rms:.3g}), but the unsharded"
        f" model's rounding allows {result.allowed.max:.3g} (rms {result.allowed.rms:.3g})"
    )
