"""What is noted as each call of a block is done: progress, counts, and the journal if there is one.

A pass without a cache resumes at the first call that was not done: repeated layers that were done
output what the reference did. A pass with a cache starts anew, for its cache is not kept.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from shardkit.verification.block_journal import BlockJournal
from shardkit.verification.block_record import BlockRecord
from shardkit.verification.blocks import BlockCall
from shardkit.verification.journal_entries import CallNotes
from shardkit.verification.numerics_options import BlockProgress
from shardkit.verification.streamed_weights import ByteCounts


@dataclass
class CheckNotes:
    """The notes of one check.

    Attributes:
        counts: The bytes of all its models.
        progress: Called as calls of blocks are done.
        plain_blocks: The blocks that output one tensor.
        journal: Where to note what is done, and what was done before.
        total: How many calls there will be, about.
        done: How many are done.
    """

    counts: ByteCounts
    progress: BlockProgress
    plain_blocks: set[str]
    journal: BlockJournal | None = None
    total: int = 0
    done: int = 0

    def start_run(
        self, name: str, record: BlockRecord, dtype: torch.dtype | None, has_cache: bool
    ) -> "RunNotes":
        """Begin a run, and restore to the record what was done of it before.

        Args:
            name: Which run it is, the same each time.
            record: What it computes.
            dtype: The ranks'; None for the unsharded models.
            has_cache: Whether its calls use what earlier ones have put into a cache.
        """
        journal = self.journal
        if journal is None:
            return RunNotes(self, name, record, dtype)
        if has_cache and name not in journal.ended:
            journal.forget_run(name)
        notes = RunNotes(self, name, record, dtype, name in journal.ended)
        for each in journal.calls.get(name, []):
            notes.restore(each)
        return notes

    def has_run(self, name: str) -> bool:
        """Whether some of a run was done before."""
        return self.journal is not None and name in self.journal.calls

    def forget_run(self, name: str) -> None:
        """Forget what was done of a run, and of those after it."""
        if self.journal is not None:
            self.journal.forget_run(name)


@dataclass
class RunNotes:
    """The notes of one run of models that run together.

    Attributes:
        check: Those of the check.
        name: Which run it is.
        record: What it has computed.
        dtype: The ranks'; None for the unsharded models.
        is_done: Whether it was done before, all of it.
    """

    check: CheckNotes
    name: str
    record: BlockRecord
    dtype: torch.dtype | None
    is_done: bool = False
    _restored: dict[BlockCall, CallNotes] = field(default_factory=dict)

    def restore(self, notes: CallNotes) -> None:
        """Take over what was noted of a call."""
        record, call = self.record, notes.call
        self._restored[call] = notes
        if notes.is_plain:
            self.check.plain_blocks.add(call.block)
        if self.dtype is None:
            record.restore_expected(call, list(notes.outputs))
        else:
            record.restored.add((self.dtype, call))
        for dtype, errors in notes.rounding.items():
            record.rounding.setdefault(dtype, {})[call] = errors
        record.comparisons += notes.comparisons
        if self.is_done:
            self.end_call(call)

    def list_skips(self, blocks: Collection[str]) -> frozenset[BlockCall]:
        """Of these blocks, the calls that were done before."""
        return frozenset(call for call in self._restored if call.block in blocks)

    def end_call(self, call: BlockCall) -> None:
        """Note that a call is done. Raises OutputError."""
        check, notes = self.check, self._restored.get(call)
        if notes is not None:
            check.counts.read, check.counts.peak = notes.read, notes.peak
        elif check.journal is not None:
            check.journal.append_call(self._describe_call(call))
        check.done += 1
        check.progress(check.done, max(check.total, check.done))

    def end_run(self) -> None:
        """Note that all calls are done. Raises OutputError."""
        if self.check.journal is not None and not self.is_done:
            self.check.journal.append_end(self.name)

    def _describe_call(self, call: BlockCall) -> CallNotes:
        record, counts, dtype = self.record, self.check.counts, self.dtype
        is_plain = call.block in self.check.plain_blocks
        if dtype is None:
            outputs = tuple(record.expected[call])
            rounding = {each: errors[call] for each, errors in record.rounding.items()}
            return CallNotes(
                self.name, call, is_plain, outputs, rounding, (), counts.read, counts.peak
            )
        compared = tuple(c for c in record.comparisons if c.call == call and c.dtype is dtype)
        return CallNotes(self.name, call, is_plain, (), {}, compared, counts.read, counts.peak)
