"""Every byte of the source and of the shards is read once in a pass over the blocks, no more."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shardkit.shards import Manifest
from shardkit.shards.integrity import RankReader
from shardkit.verification import streamed_models
from shardkit.verification.block_check import check_blocks
from shardkit.verification.streamed_models import SourceTensors
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut

WITHOUT_CACHE, WITH_CACHE = 1, 3  # a prompt, and two tokens from the cache
# The passes over all blocks: a model that generates is run with a cache, too.
GENERATES = WITHOUT_CACHE + WITH_CACHE
PASSES = {"llama": GENERATES, "mixtral": GENERATES, "bert": WITHOUT_CACHE}
# A weight that two blocks share is there for one block at a time, so it is read for each.
SHARED = {"bert.embeddings.word_embeddings.weight"}


def count_source_reads(patch: pytest.MonkeyPatch) -> Counter[str]:
    names: Counter[str] = Counter()
    read = SourceTensors._read

    def count(self: SourceTensors, name: str) -> Any:
        names[name] += 1
        return read(self, name)

    patch.setattr(SourceTensors, "_read", count)
    return names


def count_rank_reads(patch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    names: Counter[tuple[int, str]] = Counter()
    read = streamed_models._read_part

    def count(reader: RankReader, spec: Any, counts: Any) -> Any:
        names[id(reader), spec.name] += 1
        return read(reader, spec, counts)

    patch.setattr(streamed_models, "_read_part", count)
    return names


def list_loaded(manifest: Manifest) -> set[str]:
    return {p.spec.name for p in manifest.plan.weights if p.is_loaded}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_byte_is_read_once_in_a_pass(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(name, tmp_path / "source", dtype)
    manifest = cut(source, tmp_path / "shards", 2)
    from_source, from_ranks = count_source_reads(monkeypatch), count_rank_reads(monkeypatch)
    check = check_blocks(tmp_path / "shards", manifest, source)
    assert check.verdict == "passed", check.faults
    passes, dtypes = PASSES[name], 2 if dtype == "bfloat16" else 1
    times = {n: passes * (2 if n in SHARED else 1) for n in list_loaded(manifest)}
    assert from_source == times
    assert Counter(n for _, n in from_ranks) == {n: 2 * dtypes for n in times}
    assert all(count == times[n] for (_, n), count in from_ranks.items())
    loaded = [p for p in manifest.plan.weights if p.is_loaded]
    source_bytes = sum(times[p.spec.name] * p.spec.nbytes for p in loaded)
    rank_bytes = sum(
        times[p.spec.name] * part.nbytes
        for p in loaded
        for rank in manifest.mesh.ranks()
        if (part := p.shard_spec(rank))
    )
    assert check.numbers["bytes_read"] == source_bytes + dtypes * rank_bytes
