"""Runs the models of a block-by-block comparison: the unsharded ones together, then the ranks."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shardkit.checkpoint import Checkpoint
from shardkit.errors import (
    MODEL_ERRORS,
    CheckpointError,
    RanksError,
    RanksLost,
    ShardkitError,
    first_line,
)
from shardkit.output.available_memory import return_free_memory
from shardkit.runtime.config import read_shard_configs
from shardkit.runtime.distributed.rounded_group import round_sums
from shardkit.runtime.distributed.turns import TurnGroup, Turns
from shardkit.runtime.model_runner import ModelRunner, ModuleOutputs, Tensors
from shardkit.runtime.rank_shard import RankShard, build_on_meta
from shardkit.shards import Manifest
from shardkit.shards.integrity import RankReader
from shardkit.verification.block_record import BlockRecord
from shardkit.verification.blocks import (
    BlockCall,
    Visitor,
    find_plain_blocks,
    list_model_blocks,
    visit_blocks,
)
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.sampling import skip_calls
from shardkit.verification.streamed_models import (
    CPU,
    SourceTensors,
    StreamedModel,
    stream_rank,
    stream_unsharded,
)
from shardkit.verification.streamed_weights import ByteCounts

Outputs = Sequence[torch.Tensor | None]
Action = Callable[[ModelRunner], object]
"""Calls a model: the same call for each that is compared."""
OnCall = Callable[[BlockCall], object]
"""Is called as a call of a block is done by all models that run together."""
Note = Callable[[int, BlockCall, list[torch.Tensor]], Outputs]
"""Notes what a call output in the model of an index; returns what replaces it."""


def ignore_call(_call: BlockCall) -> None:
    """Note nothing."""


@dataclass(frozen=True)
class BlockPass:
    """One call of models that run together, block by block.

    Attributes:
        action: What calls a model.
        record: Where is noted what their blocks output; what it has already is kept.
        traced: The modules whose outputs are returned.
        skips: Calls that compute nothing, and output what the record expects.
        on_call: Called after each call of a block.
    """

    action: Action
    record: BlockRecord
    traced: Sequence[str] = ()
    skips: Collection[BlockCall] = ()
    on_call: OnCall = ignore_call


class UnshardedModels:
    """The unsharded model in several dtypes, the reference first.

    They run together, each block on all of them before the next, so that what it is made of is
    read once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtypes: Sequence[torch.dtype],
        counts: ByteCounts,
    ) -> None:
        """Prepare them. Raises CheckpointError."""
        self.dtypes = dtypes
        self.plain_blocks: set[str] = set()
        self._source = SourceTensors(checkpoint, len(dtypes), counts)
        self._models = [stream_unsharded(self._source, dtype) for dtype in dtypes]
        self.reference = self._models[0].model
        self.blocks = list_model_blocks(self.reference)

    def make_inputs(self) -> dict[str, torch.Tensor]:
        """What a forward pass needs, which may take the model's own towers to tell."""
        first = self._models[0]

        def visit(_call: BlockCall, outputs: list[torch.Tensor]) -> list[None]:
            first.weights.release()
            self._source.clear()
            return [None] * len(outputs)

        visiting = visit_blocks(first.model, self.blocks, visit)
        with first.promoting(), first.running(), visiting:
            inputs = make_inputs(first.model)
        self._source.clear()
        return inputs

    def run(self, block_pass: BlockPass) -> list[Tensors]:
        """Call each model, and note what its blocks output.

        Returns:
            What the traced modules output in each model.

        Raises:
            CheckpointError: A model cannot be run.
        """
        record = block_pass.record

        def note(index: int, call: BlockCall, outputs: list[torch.Tensor]) -> Outputs:
            if index == 0:
                return record.keep_expected(call, outputs)
            return record.measure_rounding(self.dtypes[index], call, outputs)

        turns, models = Turns(len(self._models)), self._models
        with find_plain_blocks(self.reference, self.blocks, self.plain_blocks):
            try:
                return run_models(turns, models, self.blocks, block_pass, note, self._source.clear)
            except RanksLost:
                raise
            except RanksError as error:
                if isinstance(error.__cause__, ShardkitError):
                    raise error.__cause__ from None
                reason = str(error).partition(": ")[2]
                folder = self._source.checkpoint.folder
                raise CheckpointError(f"{folder}: transformers cannot run it: {reason}") from None


class TurnRanks:
    """The ranks of a shard folder in one process, each with its own part, taking turns.

    Their models are there only while they run: the modules of many ranks take memory, too, those
    of 16 ranks as much as a block. To be used in a `with`, which keeps the ranks' files open.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        dtype: torch.dtype | None,
        counts: ByteCounts,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        """Open their files. Raises ManifestError."""
        configs, self._turns = read_shard_configs(folder, manifest), Turns(manifest.tp_size)
        self._shards = [RankShard(folder, manifest, configs, r) for r in manifest.mesh.ranks()]
        self.whole = build_on_meta(self._shards[0], dtype)
        self.dtype: torch.dtype = self.whole.dtype
        self._counts, self._reduce_dtype = counts, reduce_dtype
        self._stack = ExitStack()
        try:
            self._readers = [self._open(shard) for shard in self._shards]
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "TurnRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check_parts(self) -> None:
        """Prepare each rank alone. Raises ManifestError, and RanksError if a part fits no model."""
        for shard, reader in zip(self._shards, self._readers, strict=True):
            self._prepare(shard, reader)

    def run(self, block_pass: BlockPass, blocks: Sequence[str]) -> list[Tensors]:
        """Call every rank's model, and compare what its blocks output with the record.

        Args:
            block_pass: How, and the record.
            blocks: The model's blocks.

        Returns:
            What the traced modules output on each rank.

        Raises:
            RanksError: A rank cannot be run; the message names it.
        """
        compare = partial(block_pass.record.compare_rank, self.dtype)
        models = [self._prepare(*each) for each in zip(self._shards, self._readers, strict=True)]
        return run_models(self._turns, models, blocks, block_pass, compare)

    def _open(self, shard: RankShard) -> RankReader:
        reader = RankReader(shard.folder, shard.manifest, shard.rank, check_sha256=False)
        return self._stack.enter_context(reader)

    def _prepare(self, shard: RankShard, reader: RankReader) -> StreamedModel:
        rank, size = shard.rank.tp_rank, shard.manifest.tp_size
        group = round_sums(TurnGroup(rank, size, CPU, turns=self._turns), self._reduce_dtype)
        try:
            return stream_rank(shard, group, reader, self.whole, self._counts)
        except ShardkitError:
            raise
        except MODEL_ERRORS as fault:  # as a rank of its own says it
            kind = type(fault).__name__
            raise RanksError(f"rank {rank}: {kind}: {first_line(fault)}") from fault


def run_models(
    turns: Turns,
    models: Sequence[StreamedModel],
    blocks: Sequence[str],
    block_pass: BlockPass,
    note: Note,
    on_end: Callable[[], None] = lambda: None,
) -> list[Tensors]:
    """Call models that take turns, each block on all of them before the next.

    Args:
        turns: The turns that they take.
        models, blocks: The models, and the blocks that they have.
        block_pass: How they are called.
        note: Notes what a block output in one of them.
        on_end: Called when a call of a block has ended in all of them.

    Returns:
        What the traced modules output in each model.

    Raises:
        RanksError: One cannot be run; the message has its number.
    """

    def visit(index: int, call: BlockCall, outputs: list[torch.Tensor]) -> Outputs:
        values = note(index, call, outputs)
        models[index].weights.release()
        turns.exchange(index, f"block {call}", None, partial(end_call, call))
        return values

    def end_call(call: BlockCall, values: list[None]) -> list[None]:
        on_end()
        return_free_memory()
        block_pass.on_call(call)
        return values

    tasks = [
        partial(_call_model, model, blocks, partial(visit, index), block_pass)
        for index, model in enumerate(models)
    ]
    skips = block_pass.skips, block_pass.record.expected
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(skip_calls(each.model, *skips))
        return turns.run(tasks)


def _call_model(
    streamed: StreamedModel, blocks: Sequence[str], visit: Visitor, block_pass: BlockPass
) -> Tensors:
    """Call a model; what the traced modules output, before any of it is replaced."""
    with (
        streamed.promoting(),
        streamed.running(),
        ModuleOutputs(streamed.model, block_pass.traced) as outputs,
        visit_blocks(streamed.model, blocks, visit),
    ):
        block_pass.action(streamed.runner)
    return outputs.tensors
