"""What the unsharded model computes block by block, and how far others are from it: no I/O.

Every model gets the same inputs in every block: what a block outputs is replaced by what the
reference outputs. So errors do not compound, and each block is compared by itself. The first
output, the hidden states, is rounded to the narrowest dtype that is tested, in the reference, too.
Others may be states of which a rank has its own part: the reference keeps them as they are.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from shardkit.verification.blocks import WHOLE, BlockCall
from shardkit.verification.kept_outputs import KeptOutputs
from shardkit.verification.tolerance import (
    FEW_VALUES,
    Comparison,
    Error,
    allow_error,
    measure_error,
    measure_size,
    set_rows_aside,
)

# A dtype whose rounding may flip routes, and the one in which all rows are compared besides.
PROVEN_IN = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True, slots=True)
class BlockComparison:
    """One output of one block on one rank, in one dtype.

    `rows_aside` counts the rows that `result` leaves out: in a dtype that is proven in a wider one,
    a few tokens may be routed elsewhere.
    """

    call: BlockCall
    tp_rank: int
    dtype: torch.dtype
    result: Comparison
    rows_aside: int = 0


@dataclass
class BlockRecord:
    """One run of the unsharded models, and what was compared with it.

    Attributes:
        narrowest: The dtype that hidden states are rounded to.
        sent_as: What ranks round their summands to, if that is narrower than they compute in: so
            far off may they be, and as in 16 bits a few tokens may be routed elsewhere.
        expected: The reference's outputs of each call, in the order of the calls; none once all
            models have run.
        sizes: The largest and the root-mean-square value of each of them.
        rounding: The unsharded model's errors in each dtype, by call.
        comparisons: The sharded model's.
        skipped: Blocks whose outputs are neither compared nor replaced.
        partial: Blocks of whose output a rank has its own part, as far as known: no model's is
            replaced, so that all have what the reference has, unrounded.
        parts: Those of them that this run has met.
        unsampled: Blocks that ranks do not run: their outputs are replaced, and not compared.
        restored: Ranks' calls that were compared before, by dtype.
    """

    narrowest: torch.dtype
    skipped: Collection[str] = ()
    partial: Collection[str] = ()
    sent_as: torch.dtype | None = None
    expected: KeptOutputs = field(default_factory=KeptOutputs)
    sizes: dict[BlockCall, list[Error]] = field(default_factory=dict)
    rounding: dict[torch.dtype, dict[BlockCall, list[Error]]] = field(default_factory=dict)
    comparisons: list[BlockComparison] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)
    unsampled: Collection[str] = ()
    restored: set[tuple[torch.dtype, BlockCall]] = field(default_factory=set)

    def keep_expected(
        self, call: BlockCall, outputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Note the reference's outputs; what replaces them are they, rounded."""
        if call not in self.expected:
            self.restore_expected(call, [output.detach().clone() for output in outputs])
        return self.replace_outputs(call, outputs)

    def restore_expected(self, call: BlockCall, outputs: list[torch.Tensor]) -> None:
        """Note the reference's outputs, as they are."""
        self.expected[call] = outputs
        self.sizes[call] = [measure_size(output) for output in outputs]

    def forget_expected(self) -> None:
        """Keep of the reference's outputs only their sizes: every model has run."""
        self.expected.clear()

    def measure_rounding(
        self, dtype: torch.dtype, call: BlockCall, outputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Note how far the unsharded model is in a dtype; returns what replaces its outputs."""
        rounding = self.rounding.setdefault(dtype, {})
        if call not in rounding:
            rounding[call] = [
                measure_error(output, value) if output.shape == value.shape else Error(0.0, 0.0)
                for output, value in zip(outputs, self.expected.get(call, ()), strict=False)
            ]
        return self.replace_outputs(call, outputs)

    def compare_rank(
        self, dtype: torch.dtype, tp_rank: int, call: BlockCall, outputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Compare a rank's outputs; returns what replaces them. Rank-local ones are left."""
        if call.block in self.skipped:
            return [None] * len(outputs)
        if call.block in self.unsampled or (dtype, call) in self.restored:
            return self.replace_outputs(call, outputs)
        errors = self.rounding[dtype].get(call, [])
        typical = self.find_typical_rounding(dtype)
        sizes = self.sizes.get(call, [])
        for output, expected, error, size in zip(
            outputs, self.expected.get(call, ()), errors, sizes, strict=False
        ):
            if output.shape != expected.shape:
                self.parts.add(call.block)
                continue
            rounding = typical if output.numel() < FEW_VALUES else 0.0
            allowed = allow_error(error, size, self.sent_as or dtype, rounding)
            off, rows = measure_error(output, expected), 0
            if dtype in PROVEN_IN or self.sent_as:
                off, rows = set_rows_aside(output, expected, allowed)
            result = Comparison(off, error, allowed)
            self.comparisons.append(BlockComparison(call, tp_rank, dtype, result, rows))
        return self.replace_outputs(call, outputs)

    def find_typical_rounding(self, dtype: torch.dtype) -> float:
        """The largest error of an output of many values, as a share of its size."""
        if dtype not in self._typical:
            shares = [
                error.max / (size.max or 1.0)
                for call, errors in self.rounding[dtype].items()
                for error, expected, size in zip(
                    errors, self.expected[call], self.sizes[call], strict=False
                )
                if expected.numel() >= FEW_VALUES
            ]
            self._typical[dtype] = max(shares, default=0.0)
        return self._typical[dtype]

    def find_first_fault(self) -> BlockComparison | None:
        """The first block, in the order they run, that is too far off; of those, the worst rank."""
        order = {call: at for at, call in enumerate(self.sizes)}
        faults = [each for each in self.comparisons if not each.result.ok]
        return min(faults, key=lambda f: (order[f.call], -f.result.excess), default=None)

    def list_uncompared(self, dtype: torch.dtype, tp_size: int) -> list[str]:
        """Calls of the model of which a rank had no output to compare, in words.

        Blocks may output a rank's own part, which cannot be compared; a model's outputs are whole.
        """
        compared = {(c.call, c.tp_rank) for c in self.comparisons if c.dtype is dtype}
        return [
            f"{call}: rank {tp_rank} has no output of the reference's shape to compare"
            for call, sizes in self.sizes.items()
            for tp_rank in range(tp_size)
            if call.block == WHOLE and sizes and (call, tp_rank) not in compared
        ]

    def find_worst(self, dtype: torch.dtype) -> BlockComparison | None:
        """The comparison in a dtype that is nearest to what is allowed, or farthest beyond."""
        every = [each for each in self.comparisons if each.dtype is dtype]
        return max(every, key=lambda each: each.result.excess, default=None)

    def __post_init__(self) -> None:
        self._typical: dict[torch.dtype, float] = {}

    def replace_outputs(
        self, call: BlockCall, outputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """The reference's outputs, rounded, in the dtype of these; None where shapes differ."""
        expected = self.expected.get(call, [])
        if not outputs or len(expected) != len(outputs) or self._is_kept(call):
            return [None] * len(outputs)
        dtypes = [self.narrowest, *(output.dtype for output in outputs[1:])]
        return [
            round_values(value, dtype).to(output.dtype) if value.shape == output.shape else None
            for value, output, dtype in zip(expected, outputs, dtypes, strict=True)
        ]

    def _is_kept(self, call: BlockCall) -> bool:
        return call.block in self.partial or call.block in self.skipped


def round_values(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as a dtype can hold them, the finite ones finite."""
    limits = torch.finfo(dtype)
    bounded = values.clamp(limits.min, limits.max).where(values.isfinite(), values)
    return bounded.to(dtype)


def list_errors_by_block(
    records: Iterable[BlockRecord], dtype: torch.dtype
) -> list[dict[str, object]]:
    """Of each block, in the order they run, the worst error of any rank, call and output.

    `error` and `allowed` are shares of the largest value that the reference has there.
    """
    worst: dict[str, tuple[float, float, float, int]] = {}
    for record in records:
        for each in record.comparisons:
            if each.dtype is not dtype:
                continue
            size = max(size.max for size in record.sizes[each.call]) or 1.0
            result, block = each.result, each.call.block or "output"
            shares = result.excess, result.sharded.max / size, result.allowed.max / size
            worst[block] = max(worst.get(block, (-1.0, 0.0, 0.0, 0)), (*shares, each.tp_rank))
    return [
        {"block": block, "error": error, "allowed": allowed, "excess": excess, "tp_rank": rank}
        for block, (excess, error, allowed, rank) in worst.items()
    ]
