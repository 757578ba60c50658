"""Runs the models of a block-by-block comparison: the unsharded ones together, then the ranks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from shardkit.checkpoint import Checkpoint
from shardkit.errors import CheckpointError, RanksError, ShardkitError
from shardkit.planning.available_memory import return_free_memory
from shardkit.runtime.config import read_shard_configs
from shardkit.runtime.distributed.turns import TurnGroup, Turns
from shardkit.runtime.loader import RankShard, build_on_meta
from shardkit.runtime.model_runner import ModelRunner, ModuleOutputs, Tensors
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
from shardkit.verification.sampling import skip_blocks
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
OnBlock = Callable[[], object]
"""Is called as a block of all models that run together is done."""


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
        on_block: OnBlock,
    ) -> None:
        """Prepare them. Raises CheckpointError."""
        self.dtypes = dtypes
        self.plain_blocks: set[str] = set()
        self._on_block = on_block
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

    def run(self, action: Action, record: BlockRecord, traced: Sequence[str] = ()) -> list[Tensors]:
        """Call each model, and note what its blocks output.

        Returns:
            What the modules of these names output in each model.

        Raises:
            CheckpointError: A model cannot be run.
        """
        turns = Turns(len(self._models))

        def note(index: int, call: BlockCall, outputs: list[torch.Tensor]) -> Outputs:
            if index == 0:
                values = record.keep_expected(call, outputs)
            else:
                values = record.measure_rounding(self.dtypes[index], call, outputs)
            self._models[index].weights.release()
            turns.exchange(index, f"block {call}", None, self._end_block)
            return values

        tasks = [
            partial(_call_model, model, self.blocks, partial(note, index), traced, action)
            for index, model in enumerate(self._models)
        ]
        try:
            with find_plain_blocks(self.reference, self.blocks, self.plain_blocks):
                return turns.run(tasks)
        except RanksError as error:
            if isinstance(error.__cause__, ShardkitError):
                raise error.__cause__ from None
            reason = str(error).partition(": ")[2]
            folder = self._source.checkpoint.folder
            raise CheckpointError(f"{folder}: transformers cannot run it: {reason}") from None

    def _end_block(self, values: list[None]) -> list[None]:
        self._source.clear()
        return_free_memory()
        self._on_block()
        return values


class TurnRanks:
    """The ranks of a shard folder in one process, each with its own part, taking turns.

    To be used in a `with`, which keeps the ranks' files open.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        dtype: torch.dtype | None,
        counts: ByteCounts,
        on_block: OnBlock,
    ) -> None:
        """Prepare them. Raises ManifestError."""
        self._on_block = on_block
        configs, turns = read_shard_configs(folder, manifest), Turns(manifest.tp_size)
        shards = [RankShard(folder, manifest, configs, rank) for rank in manifest.mesh.ranks()]
        self.whole = build_on_meta(shards[0], dtype)
        self.dtype: torch.dtype = self.whole.dtype
        self._turns = turns
        self._stack = ExitStack()
        try:
            self._models = [self._prepare(shard, counts) for shard in shards]
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "TurnRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self,
        action: Action,
        record: BlockRecord,
        blocks: Sequence[str],
        traced: Sequence[str] = (),
        skips: frozenset[str] = frozenset(),
    ) -> list[Tensors]:
        """Call every rank's model, and compare what its blocks output with the record.

        Blocks in `skips` are not run: they output what the reference does.

        Returns:
            What the modules of these names output on each rank.

        Raises:
            RanksError: A rank cannot be run; the message names it.
        """

        def compare(rank: int, call: BlockCall, outputs: list[torch.Tensor]) -> Outputs:
            if call.block in skips:
                return record.replace_outputs(call, outputs)
            values = record.compare_rank(self.dtype, rank, call, outputs)
            self._models[rank].weights.release()
            self._turns.exchange(rank, f"block {call}", None, self._end_block)
            return values

        tasks = [
            partial(_call_model, model, blocks, partial(compare, rank), traced, action)
            for rank, model in enumerate(self._models)
        ]
        with ExitStack() as stack:
            for each in self._models:
                stack.enter_context(skip_blocks(each.model, skips, record.expected))
            return self._turns.run(tasks)

    def _end_block(self, values: list[None]) -> list[None]:
        return_free_memory()
        self._on_block()
        return values

    def _prepare(self, shard: RankShard, counts: ByteCounts) -> StreamedModel:
        rank, size = shard.rank.tp_rank, shard.manifest.tp_size
        reader = RankReader(shard.folder, shard.manifest, shard.rank, check_sha256=False)
        self._stack.enter_context(reader)
        group = TurnGroup(rank, size, CPU, turns=self._turns)
        return stream_rank(shard, group, reader, self.whole, counts)


def _call_model(
    streamed: StreamedModel,
    blocks: Sequence[str],
    visit: Visitor,
    traced: Sequence[str],
    action: Action,
) -> Tensors:
    """Call a model; what the traced modules output, before any of it is replaced."""
    with (
        streamed.promoting(),
        streamed.running(),
        ModuleOutputs(streamed.model, traced) as outputs,
        visit_blocks(streamed.model, blocks, visit),
    ):
        action(streamed.runner)
    return outputs.tensors
