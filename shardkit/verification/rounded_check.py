"""The shards with sums that are sent rounded, as far off as that rounding explains.

What is allowed follows from the rounding: where a float32 model may be off by so many of float32's
units in the last place, it may be off by as many of bfloat16's. It shows what the option costs, not
that the shards are right: that the level numerics has shown before, without it.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from shardkit.checkpoint import Checkpoint
from shardkit.dtypes import torch_name
from shardkit.output.available_memory import map_large_blocks
from shardkit.shards import Manifest
from shardkit.verification.block_check import REFERENCE, BlockCheck
from shardkit.verification.block_notes import CheckNotes
from shardkit.verification.block_record import PROVEN_IN
from shardkit.verification.block_runs import TurnRanks, UnshardedModels
from shardkit.verification.numerics_options import DEFAULT_NUMERICS, NumericsOptions
from shardkit.verification.report import Check
from shardkit.verification.streamed_weights import ByteCounts


def check_rounded_sums(
    folder: Path,
    manifest: Manifest,
    source: Path,
    reduce_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
    options: NumericsOptions = DEFAULT_NUMERICS,
) -> Check:
    """Run the shards with rounded sums, block by block, as far off as that rounding explains.

    In float32, if the dtype to compute in is no wider than that of the sums. The other arguments
    and errors are those of `check_blocks`.
    """
    counts = ByteCounts()
    map_large_blocks()
    with ExitStack() as stack:
        ranks = stack.enter_context(TurnRanks(folder, manifest, dtype, counts, reduce_dtype))
        if (wider := PROVEN_IN.get(ranks.dtype)) is not None:
            ranks = stack.enter_context(TurnRanks(folder, manifest, wider, counts, reduce_dtype))
        checkpoint = stack.enter_context(Checkpoint(source))
        unsharded = UnshardedModels(checkpoint, [REFERENCE, ranks.dtype], counts)
        notes = CheckNotes(counts, options.progress, unsharded.plain_blocks)
        check = BlockCheck(
            manifest, unsharded, [ranks], ranks.dtype, options, notes, reduce_dtype=reduce_dtype
        ).run()
    summary = f"sums sent in {torch_name(reduce_dtype)}: {check.summary}"
    numbers = {**check.numbers, "reduce_dtype": torch_name(reduce_dtype)}
    return replace(check, name="sums", summary=summary, numbers=numbers)
