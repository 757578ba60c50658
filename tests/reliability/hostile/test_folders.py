"""T2: damaged folders and configs against every command, and configs against a model's builder."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fixture_checkpoints import small_checkpoint
from tests.helpers.split_helpers import split_folder
from tests.reliability.hostile.damaged import CONFIGS, INERT, SHARDS, SOURCES, Damage
from tests.reliability.hostile.sandbox import (
    MEGABYTES,
    SECONDS,
    apart,
    check_told,
    commands,
    listing,
)


def some(table: dict[str, Damage], every: int) -> list[Any]:
    """All of the cases, of which only every so many are not slow."""
    quick = set(list(table)[::every])
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in table]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound shard folder of two ranks."""
    folder = tmp_path_factory.mktemp("sound")
    split_folder(small_checkpoint(folder / "source"), folder / "shards", 2)
    return folder / "shards"


def test_there_are_at_least_60_folders_and_60_configs() -> None:
    assert len(SOURCES) + len(SHARDS) >= 60
    assert len(CONFIGS) >= 60


@pytest.mark.parametrize(
    ("table", "name"),
    [
        pytest.param(table, *case.values, marks=case.marks, id=case.values[0])
        for table in (SOURCES, CONFIGS)
        for case in some(table, 9)
    ],
)
def test_a_damaged_source_is_refused(
    table: dict[str, Damage], name: str, sound: Path, tmp_path: Path
) -> None:
    case, source, out = table[name], tmp_path / "source", str(tmp_path / "out")
    case.lay(source)
    before = listing(tmp_path)
    (plan, split, verify), grown = commands(
        ["plan", str(source), "--tp", "2"],
        ["split", str(source), out, "--tp", "2"],
        ["verify", str(sound), "--against", str(source), "--level", "weights"],
    )
    assert grown < MEGABYTES
    for_companions = name.startswith("a tokenizer")  # which a split copies, and nothing else reads
    check_told(plan, 0 if for_companions else case.code, *case.words)
    check_told(split, case.code, *case.words)
    check_told(verify, 4 if for_companions or case.code != 3 else 3)
    assert (listing(tmp_path) == before) == bool(case.code)


@pytest.mark.parametrize("name", some(SHARDS, 6))
def test_a_damaged_shard_folder_is_refused(name: str, sound: Path, tmp_path: Path) -> None:
    from shardkit.errors import ManifestError
    from shardkit.runtime.rank_shard import open_rank_shard

    case, folder = SHARDS[name], shutil.copytree(sound, tmp_path / "shards")
    case.lay(folder)
    before = listing(tmp_path)
    (verify, merge, reshard), grown = commands(
        ["verify", str(folder), "--level", "files"],
        ["merge", str(folder), str(tmp_path / "out")],
        ["reshard", str(folder), str(tmp_path / "out"), "--tp", "1"],
    )
    assert grown < MEGABYTES
    check_told(verify, 4)
    check_told(merge, case.code, *case.words)
    check_told(reshard, case.code)
    assert listing(tmp_path) == before

    def load() -> Any:
        told = []
        for tp_rank in range(2):
            try:
                open_rank_shard(folder, tp_rank, 2)
            except ManifestError as error:
                told.append(str(error))
        return told

    told, grown = apart(load)
    assert bool(told) == (name != "a byte changed")  # which only a read of the data can tell
    assert grown < MEGABYTES


@pytest.mark.parametrize("name", some(CONFIGS, 12))
def test_a_config_reaches_no_builder_unbounded(name: str, tmp_path: Path) -> None:
    """The config of a shard folder whose digests are right: made by one who can write it all."""
    import time

    from shardkit import runtime
    from shardkit.errors import ShardkitError

    CONFIGS[name].lay(tmp_path / "source")
    try:
        split_folder(tmp_path / "source", tmp_path / "shards", 1)  # opens it unchecked
    except ShardkitError:
        return

    def load() -> Any:
        started = time.process_time()
        try:
            model = runtime.load(tmp_path / "shards")
        except ShardkitError as error:
            return [str(error), time.process_time() - started]
        made = model.config.to_dict()
        kept = {key for key in made if "auto_map" in key or made[key] == "evil/kernel"}
        return [sorted(kept), time.process_time() - started]

    (told, seconds), grown = apart(load)
    assert (told == []) if name in INERT and "layer types" not in name else isinstance(told, str)
    assert seconds < SECONDS + 1  # a model of two layers is built in a second of these
    assert grown < MEGABYTES
