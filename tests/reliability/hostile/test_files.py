"""T1: crafted safetensors files, as a source and in place of a shard, against every command."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source
from tests.reliability.hostile.crafted import FILES
from tests.reliability.hostile.sandbox import MEGABYTES, apart, check_told, commands, listing

SHARD = "rank-00000-of-00002.safetensors"
ALONE = "rank-00000-of-00001.safetensors"
CONFIG = llama_config() | {"num_hidden_layers": 1}
EVERY = 12  # of the files, the rest are slow
QUICK = list(FILES)[::EVERY]
SLOW = [name for name in FILES if name not in QUICK]
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound shard folder of two ranks, and one of one."""
    folder = tmp_path_factory.mktemp("sound")
    source = write_source(folder / "source", CONFIG, specs_of(llama()))
    for tp_size in (1, 2):
        split_folder(source, folder / f"{tp_size}", tp_size)
    return folder


def test_there_are_at_least_120_files() -> None:
    assert len(FILES) >= 120


@pytest.mark.parametrize("name", CASES)
def test_a_crafted_file_is_refused_or_read_as_a_source(
    name: str, sound: Path, tmp_path: Path
) -> None:
    case = FILES[name]
    source, out = write_source(tmp_path / "source", CONFIG, []), tmp_path / "out"
    (source / "model.safetensors").write_bytes(case.data())
    before = listing(tmp_path)
    (plan, dry, verify), grown = commands(
        ["plan", str(source), "--tp", "2"],
        ["split", str(source), str(out), "--tp", "2", "--dry-run"],
        ["verify", str(sound / "2"), "--against", str(source), "--level", "weights"],
    )
    assert grown < MEGABYTES
    check_told(plan, case.code, *case.words)
    check_told(dry, case.code, *case.words)
    check_told(verify, 3 if case.code == 3 else 0 if name == "a model" else 4)
    assert listing(tmp_path) == before
    (split,), grown = commands(["split", str(source), str(out), "--tp", "2"])
    assert grown < MEGABYTES
    check_told(split, case.code, *case.words)
    assert (listing(tmp_path) == before) == bool(case.code)


@pytest.mark.parametrize("name", CASES)
def test_a_crafted_file_in_place_of_a_shard_is_refused(
    name: str, sound: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound / "2", tmp_path / "shards")
    (folder / SHARD).write_bytes(FILES[name].data())
    before = listing(tmp_path)
    (verify, merge, reshard), grown = commands(
        ["verify", str(folder), "--level", "files"],
        ["merge", str(folder), str(tmp_path / "out")],
        ["reshard", str(folder), str(tmp_path / "out"), "--tp", "1"],
    )
    assert grown < MEGABYTES
    check_told(verify, 4)
    check_told(merge, 3, SHARD)
    check_told(reshard, 3, SHARD)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", CASES)
def test_a_crafted_file_in_place_of_a_shard_is_not_loaded(
    name: str, sound: Path, tmp_path: Path
) -> None:
    from shardkit import runtime
    from shardkit.errors import ShardkitError

    folder = shutil.copytree(sound / "1", tmp_path / "shards")
    (folder / ALONE).write_bytes(FILES[name].data())

    def load() -> Any:
        try:
            runtime.load(folder)
        except ShardkitError as error:
            return str(error)
        return None

    told, grown = apart(load)
    assert ALONE in told
    assert grown < MEGABYTES
