"""Level 3 on real ranks if everything fits at once, and else on ranks that take turns."""

from dataclasses import replace
from pathlib import Path

import torch

from shardkit.output.available_memory import check_memory, choose_max_memory
from shardkit.runtime.engine.controller import RankController
from shardkit.shards import Manifest
from shardkit.verification.block_check import check_blocks
from shardkit.verification.block_record import PROVEN_IN
from shardkit.verification.memory import estimate_real_ranks, estimate_turns
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
from shardkit.verification.numerics_options import DEFAULT_NUMERICS, NumericsOptions
from shardkit.verification.report import Check


def choose_real_ranks(
    folder: Path,
    manifest: Manifest,
    options: NumericsOptions,
    dtype: str | None,
    device: str | None,
) -> bool:
    """Whether real ranks are to be started: if asked for, on a GPU, or if there is memory for all.

    Args:
        folder: The shard folder.
        manifest: Its manifest.
        options: The ranks asked for, and the memory allowed.
        dtype: What to compute in; None means the dtype that most weights are stored in.
        device: "cpu" or "cuda"; None means cuda if available.

    Raises:
        UsageError: What is chosen needs more memory than is allowed.
    """
    choice, limit = options.ranks, options.max_memory
    on_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    real, allowed = estimate_real_ranks(manifest, dtype), choose_max_memory(limit)
    is_real = choice == "real" or (choice == "auto" and (on_gpu or real <= allowed))
    if not is_real:
        check_memory(estimate_turns(folder, manifest), allowed, "verify with ranks in turns")
    elif limit is not None and not on_gpu:
        check_memory(real, limit, "verify with real ranks")
    return is_real


def check_on_ranks(
    folder: Path,
    manifest: Manifest,
    source: Path,
    dtype: torch.dtype | None,
    ranks: RankController,
    options: NumericsOptions = DEFAULT_NUMERICS,
) -> Check:
    """Compare the outputs of real ranks, and of a 16-bit model also its blocks in float32.

    What 16 bits allow can be wide: a mixture may route a token elsewhere by its own rounding.

    Raises:
        RanksError: The shards cannot run.
        CheckpointError: The source cannot run.
    """
    model = ShardedModel(ranks)
    check = check_numerics(folder, manifest, source, model, dtype)
    numbers = {**check.numbers, "ranks": "real"}
    proven_in = PROVEN_IN.get(getattr(torch, str(numbers["dtype"])))
    if check.verdict == "failed" or proven_in is None:
        return replace(check, numbers=numbers)
    blocks = check_blocks(folder, manifest, source, proven_in, options)
    summary = f"{check.summary}; {blocks.summary}"
    return replace(blocks, summary=summary, numbers={**blocks.numbers, **numbers})
