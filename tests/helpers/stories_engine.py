"""Engines of the trained model of 260 000 parameters, and what it says by itself."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shardkit import runtime
from shardkit.authoring.pooled_engine import run_engine
from shardkit.authoring.rank_pool import RankPool
from tests.helpers.runtime_helpers import cut

STORY = [1, 403, 407, 261, 378]  # Once upon a time


@contextmanager
def run_stories(
    source: Path, folder: Path, rank_pool: RankPool, max_queue: int, chat_template: str = ""
) -> Iterator[runtime.Engine]:
    """An engine of two ranks of the pool, at most 16 sequences at once."""
    cut(source, folder, 2)
    if chat_template:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    limits = runtime.Limits(max_batch_size=16, max_queue=max_queue)
    with run_engine(rank_pool.of(2), folder, limits) as started:
        yield started


def continue_alone(reference: Any, ids: list[int], tokens: int, **options: Any) -> list[int]:
    """What the unsharded model generates after a prompt, by itself."""
    given = {"do_sample": False, **options}
    output = reference.generate(torch.tensor([ids]), max_new_tokens=tokens, **given)
    new: list[int] = output[0, len(ids) :].tolist()
    return new


def wait_until_idle(engine: runtime.Engine, seconds: float = 60.0) -> None:
    """Wait until nothing runs or waits; nothing may at the end."""
    end, status = time.monotonic() + seconds, engine.status()
    while (status.running or status.waiting) and time.monotonic() < end:
        time.sleep(0.01)
        status = engine.status()
    assert status.running == status.waiting == 0
