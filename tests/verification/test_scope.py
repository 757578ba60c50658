"""verify in parts: what each reads, needs and finds, and what is said of the rest."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from shardkit.checkpoint import open_checkpoint
from shardkit.errors import LayoutError, UsageError
from shardkit.shards.manifest_json import read_manifest
from shardkit.verification import check_files, check_weights, verify
from shardkit.verification.scope import Scope
from tests.helpers.command_line import run
from tests.helpers.damage import Split, quiet, written
from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

RANKS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scope")
    write_source(folder / "source", llama_config(), specs_of(llama()))
    split_folder(folder / "source", folder / "shards", RANKS)
    return folder


@pytest.fixture
def split(base: Path, tmp_path: Path) -> Split:
    """A copy that a test may damage."""
    folder = Path(shutil.copytree(base / "shards", tmp_path / "shards"))
    return Split(folder, read_manifest(folder))


def last_byte(split: Split, tp_rank: int) -> tuple[Path, int, bytes]:
    """One flipped bit, at the end of a rank's file."""
    at, byte = split.flipped(tp_rank, 8 * len(split.sound[tp_rank]) - 1)
    return split.path(tp_rank), at, byte


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5, 8])
def test_the_parts_together_read_every_file_once(tp_size: int) -> None:
    for parts in range(1, tp_size + 1):
        read = [Scope(subset=(part, parts)).ranks_read(tp_size) for part in range(1, parts + 1)]
        assert sorted(chain.from_iterable(read)) == list(range(tp_size))
        assert max(map(len, read)) - min(map(len, read)) <= 1


@pytest.mark.parametrize("scope", [Scope(rank=4), Scope(subset=(1, 5)), Scope(subset=(5, 5))])
def test_a_part_that_there_is_not_is_refused(scope: Scope, split: Split) -> None:
    with pytest.raises(LayoutError, match=r"ranks 0 to 3|at most 4 subsets"):
        check_files(split.folder, quiet, scope)


def test_a_flipped_bit_is_found_by_the_part_that_reads_it_and_by_no_other(split: Split) -> None:
    with written(*last_byte(split, 2)):
        failed = {
            part
            for part in range(1, 5)
            if check_files(split.folder, quiet, Scope(subset=(part, 4))).verdict == "failed"
        }
        assert failed == {3}
        by_rank = [check_files(split.folder, quiet, Scope(rank=rank)).verdict for rank in range(4)]
        assert by_rank == ["passed", "passed", "failed", "passed"]
        assert check_files(split.folder, quiet, Scope(quick=True)).verdict == "passed"


def test_progress_counts_what_is_read(split: Split) -> None:
    data = [len(sound) - head for sound, head in zip(split.sound, split.headers, strict=True)]
    for scope, ranks in (
        (Scope(), range(4)),
        (Scope(quick=True), []),
        (Scope(rank=1), [1]),
        (Scope(subset=(2, 2)), [1, 3]),
        (Scope(rank=1, quick=True), []),
    ):
        counted: list[int] = []
        found = check_files(split.folder, counted.append, scope)
        assert sum(counted) == sum(data[rank] for rank in ranks)
        assert found.numbers["ranks_read"] == list(ranks)
        assert found.numbers["bytes"] == sum(len(split.sound[rank]) for rank in ranks)
        assert found.verdict == "passed"
        assert ("no data read" in found.summary) == (scope.quick or scope.subset is not None)
        assert ("not checked" in found.summary) == (scope.rank is not None)


def test_one_ranks_host_needs_no_other_ranks_file(split: Split) -> None:
    for rank in (0, 1, 3):
        split.path(rank).unlink()
    assert check_files(split.folder, quiet, Scope(rank=2)).verdict == "passed"
    assert check_files(split.folder, quiet, Scope(rank=1)).verdict == "failed"
    assert len(check_files(split.folder, quiet, Scope(subset=(3, 4))).faults) == 3
    assert len(check_files(split.folder, quiet, Scope(quick=True)).faults) == 3


def test_the_small_files_are_read_in_every_part(split: Split) -> None:
    (split.folder / "config.json").write_text("{}")
    for scope in (Scope(quick=True), Scope(rank=0), Scope(subset=(1, 4))):
        (fault,) = check_files(split.folder, quiet, scope).faults
        assert "config.json: not the file that was copied" in fault


def test_whatever_is_no_part_of_a_split_is_named_but_a_signature(split: Split) -> None:
    (split.folder / "model.sig").touch()
    assert check_files(split.folder, quiet).verdict == "passed"
    for name in (".gitattributes", "README.md", "rank-00004-of-00005.safetensors"):
        (split.folder / name).touch()
    (split.folder / "empty").mkdir()
    (split.folder / "folder.sig").mkdir()
    (split.folder / "link.sig").symlink_to("model.sig")
    (split.folder / "nowhere").symlink_to("nothing")
    os.mkfifo(split.folder / "pipe")
    faults = check_files(split.folder, quiet, Scope(quick=True)).faults
    told = [fault.removeprefix(f"{split.folder}/").partition(" that")[0] for fault in faults]
    assert told == [
        ".gitattributes: a file", "README.md: a file", "empty: a folder", "folder.sig: a folder",
        "link.sig: a link", "nowhere: a link", "pipe: a pipe",
        "rank-00004-of-00005.safetensors: a file",
    ]  # fmt: skip


def test_a_file_of_the_split_that_became_a_link_a_folder_or_a_pipe_is_named(split: Split) -> None:
    split.path(0).rename(split.folder.with_name("moved"))
    split.path(0).symlink_to(split.folder.with_name("moved"))
    split.path(1).unlink()
    split.path(1).mkdir()
    (split.folder / "config.json").unlink()
    os.mkfifo(split.folder / "config.json")
    for scope in (Scope(), Scope(quick=True)):
        faults = check_files(split.folder, quiet, scope).faults
        assert [fault.split(":")[0] for fault in faults] == [
            str(split.path(0)), str(split.path(1)), str(split.folder / "config.json"),
        ]  # fmt: skip


@pytest.mark.parametrize("rank", range(RANKS))
def test_with_the_source_every_damaged_tensor_is_named_to_the_byte(
    rank: int, base: Path, split: Split
) -> None:
    first, last = split.headers[rank], len(split.sound[rank]) - 1
    one, two = split.flipped(rank, 8 * first + 3), split.flipped(rank, 8 * last)
    names = sorted(split.manifest.ranks[rank].pieces.items(), key=lambda piece: piece[1].offset)
    with (
        written(split.path(rank), *one), written(split.path(rank), *two),
        open_checkpoint(str(base / "source")) as source,
    ):  # fmt: skip
        found = check_weights(split.folder, source, quiet, Scope(rank=rank))
        others = check_weights(split.folder, source, quiet, Scope(rank=(rank + 1) % RANKS))
    file = split.path(rank).name
    assert found.faults == (
        f"rank {rank}: {names[0][0]}: differs from the source at byte 0, byte {first} of {file}",
        f"rank {rank}: {names[-1][0]}: differs from the source at byte"
        f" {last - names[-1][1].offset}, byte {last} of {file}",
    )
    assert others.verdict == "passed"
    assert others.summary.endswith(f"on rank {(rank + 1) % RANKS}")


def test_a_damaged_folder_is_compared_with_its_source_all_the_same(
    base: Path, split: Split
) -> None:
    arguments = (
        "verify",
        split.folder,
        "--level",
        "weights",
        "--against",
        base / "source",
        "--json",
    )
    with written(*last_byte(split, 1)):
        done = run(*arguments)
    assert done.exit_code == 4
    checks = json.loads(done.stdout)["checks"]
    assert [check["verdict"] for check in checks] == ["failed", "failed"]
    assert "damaged between byte" in checks[0]["faults"][0]
    assert f"byte {len(split.sound[1]) - 1} of {split.path(1).name}" in checks[1]["faults"][0]
    split.path(1).unlink()
    done = run(*arguments)
    assert done.exit_code == 4
    checks = json.loads(done.stdout)["checks"]
    assert [check["verdict"] for check in checks] == ["failed", "not run"]


def test_a_source_that_cannot_be_read_is_told_before_the_shards_are(split: Split) -> None:
    with written(*last_byte(split, 1)):
        done = run("verify", split.folder, "--level", "weights", "--against", "/nowhere/at/all")
    assert done.exit_code == 3
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        (["--quick"], ["files"]),
        (["--quick", "--rank", "1"], ["files"]),
        (["--rank", "1"], ["files", "weights"]),
        (["--subset", "1/2"], ["files", "weights"]),
        (["--subset", "1/2", "--level", "files"], ["files"]),
    ],
)
def test_the_command_goes_as_deep_as_a_part_allows(
    options: list[str], levels: list[str], base: Path
) -> None:
    source = ["--against", str(base / "source")]
    done = run("verify", base / "shards", "--json", *options, *source)
    assert done.exit_code == 0
    checks = json.loads(done.stdout)["checks"]
    assert [(check["name"], check["verdict"]) for check in checks] == [
        (name, "passed") for name in levels
    ]


def test_without_the_source_the_command_says_what_was_shown_and_what_was_not(base: Path) -> None:
    lines = run("verify", base / "shards").stdout.splitlines()
    assert "are, by sha256, what the split wrote" in lines[0]
    assert all("not run" in line and "--against" in line for line in lines[1:])
    assert len(lines) == 3


@pytest.mark.parametrize(
    "options",
    [
        ["--subset", "0/2"],
        ["--subset", "3/2"],
        ["--subset", "half"],
        ["--subset", "1/2", "--rank", "0"],
        ["--subset", "1/2", "--quick"],
        ["--quick", "--level", "weights"],
        ["--rank", "0", "--level", "numerics"],
        ["--rank", "-1"],
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(options: list[str], base: Path) -> None:
    assert run("verify", base / "shards", *options).exit_code == 2


@pytest.mark.parametrize("options", [["--subset", "1/5"], ["--rank", "4"]])
def test_the_command_refuses_a_part_that_there_is_not(options: list[str], base: Path) -> None:
    done = run("verify", base / "shards", *options)
    assert (done.exit_code, done.stdout) == (1, "")


def test_verify_is_a_function_that_reports_its_progress(base: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(
        base / "shards",
        base / "source",
        level="weights",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert report is not None
    assert report.passed
    assert [check.name for check in report.checks] == ["files", "weights"]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1
    assert 0 < calls[-1][0] <= calls[-1][1]


@pytest.mark.parametrize(
    "options",
    [
        {"subset": (1, 2), "rank": 0},
        {"subset": (1, 2), "quick": True},
        {"quick": True, "level": "weights"},
        {"rank": 0, "level": "numerics"},
        {"level": "deepest"},
        {"dtype": "int8"},
    ],
)
def test_arguments_that_contradict_each_other_are_wrong_usage(
    options: dict[str, Any], base: Path
) -> None:
    with pytest.raises(UsageError) as error:
        verify(base / "shards", base / "source", **options)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("options", [{"rank": -1}, {"rank": 4}, {"subset": (0, 2)}])
def test_a_rank_or_subset_that_does_not_exist_is_refused(
    options: dict[str, Any], base: Path
) -> None:
    with pytest.raises(LayoutError):
        verify(base / "shards", **options)
