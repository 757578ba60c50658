"""Level 3 block by block, in bounded memory: every block on the inputs that the reference has.

The reference is the unsharded model in float64. A 16-bit model is compared in float32, too: a
mixture in 16 bits may route a token elsewhere by its own rounding, and then what is allowed there
is large; in float32 routes do not flip, and a wrong layout shows. If ranks alone route a few tokens
elsewhere in 16 bits, these are set aside there, and the report says how many.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from shardkit.checkpoint import Checkpoint
from shardkit.dtypes import torch_name
from shardkit.errors import CheckpointError, RanksError, RanksLost
from shardkit.output.available_memory import map_large_blocks
from shardkit.runtime.conversion import find_conversions, loaded_shapes
from shardkit.runtime.materialize import placements_by_parameter
from shardkit.runtime.model_runner import Tensors
from shardkit.shards import Manifest
from shardkit.verification.block_faults import (
    describe_block_fault,
    list_counterparts,
    list_padded,
)
from shardkit.verification.block_journal import BlockJournal
from shardkit.verification.block_notes import CheckNotes
from shardkit.verification.block_record import (
    PROVEN_IN,
    BlockComparison,
    BlockRecord,
    list_errors_by_block,
)
from shardkit.verification.block_runs import Action, BlockPass, TurnRanks, UnshardedModels
from shardkit.verification.cached_steps import CACHED_STEPS, make_cached_action
from shardkit.verification.divergence import (
    Divergence,
    describe_no_module,
    find_divergence,
    list_comparable,
)
from shardkit.verification.dummy_inputs import count_steps
from shardkit.verification.numerics_options import DEFAULT_NUMERICS, NumericsOptions
from shardkit.verification.report import Check, Verdict
from shardkit.verification.sampling import choose_skips, list_repeated
from shardkit.verification.streamed_weights import ByteCounts

REFERENCE = torch.float64
CACHED = "cached"  # the pass with a cache


def check_blocks(
    folder: Path,
    manifest: Manifest,
    source: Path,
    dtype: torch.dtype | None = None,
    options: NumericsOptions = DEFAULT_NUMERICS,
    journal: BlockJournal | None = None,
) -> Check:
    """Run the shards and the unsharded model, block by block, on the same inputs.

    Args:
        folder: The shard folder.
        manifest: Its manifest.
        source: The folder of the unsharded checkpoint.
        dtype: What to compute in; None means the checkpoint's own dtype.
        options: Which blocks the ranks run, and what shows progress.
        journal: Where what is done is noted, and what was done before.

    Raises:
        RanksError: The shards cannot run.
        CheckpointError: The source cannot run.
    """
    counts = ByteCounts()
    map_large_blocks()
    with ExitStack() as stack:
        ranks = [stack.enter_context(TurnRanks(folder, manifest, dtype, counts))]
        ranks[0].check_parts()
        own = ranks[0].dtype
        if (wider := PROVEN_IN.get(own)) is not None:
            ranks.insert(0, stack.enter_context(TurnRanks(folder, manifest, wider, counts)))
        checkpoint = stack.enter_context(Checkpoint(source))
        dtypes = [REFERENCE, *(each.dtype for each in ranks)]
        unsharded = UnshardedModels(checkpoint, dtypes, counts)
        notes = CheckNotes(counts, options.progress, unsharded.plain_blocks, journal)
        return BlockCheck(manifest, unsharded, ranks, own, options, notes).run()


@dataclass
class BlockCheck:
    """The models of one check, and the numbers so far."""

    manifest: Manifest
    unsharded: UnshardedModels
    ranks: Sequence[TurnRanks]
    own: torch.dtype
    options: NumericsOptions
    notes: CheckNotes
    numbers: dict[str, object] = field(default_factory=dict)
    unsampled: frozenset[str] = frozenset()
    reduce_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        whole, weights = self.ranks[0].whole, self.manifest.weights
        shapes, prefix = loaded_shapes(weights), self.manifest.plan.wrapper_prefix
        conversions = find_conversions(whole, shapes, prefix)
        self._placements = placements_by_parameter(whole, weights, conversions)
        self._padded = list_padded(self._placements)
        self._partial: set[str] = set()

    def run(self) -> Check:
        """Compare all blocks, without a cache and with one. Raises RanksError, CheckpointError."""
        inputs = self.unsharded.make_inputs()
        reference, calls = self.unsharded.reference, len(self.unsharded.blocks) + 1
        steps = count_steps(reference, inputs) if reference.can_generate() else 0
        runs = 1 + min(steps, CACHED_STEPS + 1)
        self.notes.total = runs * calls * (1 + len(self.ranks))
        forward = self._compare("forward", lambda runner: runner.forward(inputs))
        records, faults = [forward], self._describe_faults(forward, inputs)
        if not faults and steps:
            action = make_cached_action(inputs, steps)
            try:
                records.append(self._compare(CACHED, action))
                faults = self._describe_faults(records[1], inputs, action)
                self.numbers["cached_steps"] = "differ" if faults else "equal"
            except CheckpointError as error:  # a class that cannot generate what it says it can
                self.numbers["cached_steps"] = f"none unsharded: {error}"
        verdict: Verdict = "failed" if faults else "passed"
        return Check("numerics", verdict, self._summarize(records), (*faults,), self.numbers)

    def _compare(self, name: str, action: Action) -> BlockRecord:
        """Run all models in one pass; a fault counts only if none of them was at a disadvantage.

        What a layer uses of one that was skipped, besides its hidden states, might be missing; and
        a block of which ranks have parts was rounded in the reference alone.
        """
        notes, counts = self.notes, self.notes.counts
        first, start = f"{name} unsharded", (counts.read, counts.peak, notes.done)
        while True:
            is_resumed = notes.has_run(first)
            try:
                record = self._run_pass(name, action)
                if record.find_first_fault() is None:
                    return record
                if not is_resumed and record.parts <= self._partial:
                    return record
                self._partial |= record.parts
            except (CheckpointError, RanksError) as error:
                if not is_resumed or isinstance(error, RanksLost):
                    raise
            notes.forget_run(first)
            counts.read, counts.peak, notes.done = start

    def _run_pass(self, name: str, action: Action) -> BlockRecord:
        record = self._new_record()
        unsharded, model = self.unsharded, self.unsharded.reference
        notes = self.notes.start_run(f"{name} unsharded", record, None, name == CACHED)
        if not notes.is_done:
            skips = notes.list_skips(list_repeated(model, unsharded.blocks, unsharded.plain_blocks))
            unsharded.run(BlockPass(action, record, (), skips, notes.end_call))
            notes.end_run()
        repeated = list_repeated(model, unsharded.blocks, unsharded.plain_blocks)
        record.unsampled = self.unsampled = choose_skips(
            model, unsharded.blocks, unsharded.plain_blocks, self.options
        )
        unsampled = {call for call in record.expected if call.block in self.unsampled}
        for ranks in self.ranks:
            run = f"{name} {torch_name(ranks.dtype)}"
            notes = self.notes.start_run(run, record, ranks.dtype, name == CACHED)
            if not notes.is_done:
                skips = notes.list_skips(repeated) | unsampled
                block_pass = BlockPass(action, record, (), skips, notes.end_call)
                ranks.run(block_pass, unsharded.blocks)
                notes.end_run()
        record.forget_expected()
        return record

    def _new_record(self) -> BlockRecord:
        return BlockRecord(self.own, self._padded, {*self._partial}, sent_as=self.reduce_dtype)

    def _describe_faults(
        self, record: BlockRecord, inputs: Tensors, action: Action | None = None
    ) -> list[str]:
        """The first block that is too far off, and what in it is to blame."""
        fault = record.find_first_fault()
        if fault is None:
            size = self.manifest.tp_size
            return [
                line for each in self.ranks for line in record.list_uncompared(each.dtype, size)
            ]
        cached = action is not None
        text = f"{'cached decoding, ' if cached else ''}{describe_block_fault(fault)}"
        return [text, self._blame(fault, action or (lambda runner: runner.forward(inputs)))]

    def _blame(self, fault: BlockComparison, action: Action) -> str:
        """Run once more, to compare the modules inside of the block.

        And of blocks of which ranks have parts, which were not compared: it may have used them.
        What is wrong there may be wrong in the layers before, too, too little for what they output:
        then the first of them is named.
        """
        block = fault.call.block
        names = list_comparable(self.unsharded.reference, self.manifest.plan)
        blocks = tuple(f"{each}." for each in (block, *self._partial) if each)
        inside = [n for n in names if f"{n}.".startswith(blocks)]
        first = self._trace(fault, action, inside)
        if first is None:
            reason = describe_no_module(self.manifest.plan)
            return f"first diverging block: {fault.call}, on rank {fault.tp_rank}; {reason}"
        before = list_counterparts(first.module, block, names)
        return ((before and self._trace(fault, action, before)) or first).text

    def _trace(
        self, fault: BlockComparison, action: Action, traced: Sequence[str]
    ) -> Divergence | None:
        """The first of these modules that diverges in the fault's dtype."""
        record = self._new_record()
        block_pass = BlockPass(action, record, traced)
        models = self.unsharded.run(block_pass)
        ranks = next(each for each in self.ranks if each.dtype is fault.dtype)
        parts = ranks.run(block_pass, self.unsharded.blocks)
        rounded = models[self.unsharded.dtypes.index(fault.dtype, 1)]
        return find_divergence(self._placements, self.manifest.mesh, models[0], rounded, parts)

    def _summarize(self, records: Sequence[BlockRecord]) -> str:
        """The worst block of each dtype in one line; the numbers have the own dtype's."""
        texts = []
        for dtype in dict.fromkeys(each.dtype for each in self.ranks):
            worst = max(
                filter(None, (record.find_worst(dtype) for record in records)),
                key=lambda each: each.result.excess,
                default=None,
            )
            if worst is None:
                continue
            result = worst.result
            self.numbers |= {
                "dtype": torch_name(dtype),
                "block": str(worst.call),
                "error": asdict(result.sharded),
                "unsharded_error": asdict(result.unsharded),
                "allowed": asdict(result.allowed),
            }
            texts.append(
                f"{torch_name(dtype)} error {result.sharded.max:.2g} of {result.allowed.max:.2g}"
                f" allowed in {worst.call}"
            )
        self.numbers |= {
            "ranks": "turns",
            "reference_dtype": torch_name(REFERENCE),
            "block_count": len(self.unsharded.blocks),
            "by_block": {
                torch_name(each.dtype): list_errors_by_block(records, each.dtype)
                for each in self.ranks
            },
            "bytes_read": self.notes.counts.read,
            "peak_weight_bytes": self.notes.counts.peak,
        }
        steps = self.numbers.get("cached_steps")
        if aside := sum(each.rows_aside for record in records for each in record.comparisons):
            self.numbers["rows_set_aside"] = aside
            texts.append(f"{aside} rows in {torch_name(self.own)} set aside, as routed elsewhere")
        return f"{self._count_blocks()}, ranks in turns: {'; '.join(texts)}" + (
            f"; cached steps are {steps}" if steps in ("equal", "differ") else ""
        )

    def _count_blocks(self) -> str:
        """How many blocks were compared; of a sample, that it is one."""
        every, seed = len(self.unsharded.blocks), self.options.seed
        if self.options.sample is None:
            return f"{every} blocks"
        compared = every - len(self.unsampled)
        self.numbers["sample"] = {"blocks": compared, "of": every, "seed": seed}
        return f"a sample of {compared} of {every} blocks, by seed {seed}"
