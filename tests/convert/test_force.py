"""`--force` replaces what shardkit wrote, in one step, and nothing else."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import OutputError
from shardkit.output import atomic as folders
from shardkit.shards.manifest import MANIFEST_NAME
from tests.helpers.command_line import run
from tests.helpers.split_helpers import merge_folder, reshard_folder, shard_name, split_folder
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama,
    llama_config,
    specs_of,
    write_source,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", llama_config(), specs_of(llama()))


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A shard folder over three ranks, in the way."""
    split_folder(source, tmp_path / "out", 3)
    return tmp_path / "out"


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder, links not followed: modes and bytes."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() and not path.is_symlink() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def test_a_shard_folder_is_replaced(source: Path, out: Path, tmp_path: Path) -> None:
    split_folder(source, out, 2, force=True)
    split_folder(source, tmp_path / "direct", 2, force=True)
    assert contents(out) == contents(tmp_path / "direct")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "out", "source"]


def missing(out: Path) -> None:
    (out / shard_name(1, 3)).unlink()


def damaged(out: Path) -> None:
    (out / shard_name(1, 3)).write_bytes(b"damaged")


@pytest.mark.parametrize("change", [missing, damaged])
def test_a_damaged_shard_folder_is_replaced(change: Any, source: Path, out: Path) -> None:
    change(out)
    split_folder(source, out, 2, force=True)
    assert shard_name(1, 2) in contents(out)
    assert shard_name(0, 3) not in contents(out)


def foreign(out: Path) -> None:
    (out / "notes.md").write_text("mine")


def signed(out: Path) -> None:
    (out / "model.sig").write_text("{}")


def inner(out: Path) -> None:
    (out / "more").mkdir()


def link(out: Path) -> None:
    path = out / shard_name(0, 3)
    path.rename(out.parent / "elsewhere")
    path.symlink_to(out.parent / "elsewhere")


def no_manifest(out: Path) -> None:
    (out / MANIFEST_NAME).unlink()


def other_manifest(out: Path) -> None:
    (out / MANIFEST_NAME).write_text('{"format": 1}')


def empty(out: Path) -> None:
    for path in out.iterdir():
        path.unlink()


def linked(out: Path) -> None:
    out.rename(out.parent / "elsewhere")
    out.symlink_to("elsewhere")


def file(out: Path) -> None:
    out.rename(out.parent / "elsewhere")
    out.write_text("mine")


CHANGES: dict[Callable[[Path], None], str] = {
    foreign: "'notes.md' is in it", signed: "'model.sig' is in it",
    inner: "'more' in it is not a plain file", link: "in it is not a plain file",
    no_manifest: "no manifest.json", other_manifest: "manifest", empty: "no manifest.json",
    linked: "is not a folder", file: "is not a folder",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_anything_else_is_refused_and_left(
    change: Any, source: Path, out: Path, tmp_path: Path
) -> None:
    change(out)
    split_folder(source, tmp_path / "shards", 2)
    before = tree(tmp_path)
    attempts: list[Callable[[], object]] = [
        lambda: split_folder(source, out, 2, force=True),
        lambda: reshard_folder(tmp_path / "shards", out, 4, force=True),
    ]
    for attempt in attempts:
        with pytest.raises(OutputError) as caught:
            attempt()
        assert CHANGES[change] in str(caught.value)
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_what_appears_in_the_old_folder_meanwhile_is_not_lost(
    source: Path, out: Path, tmp_path: Path
) -> None:
    before = contents(out)
    with pytest.raises(OutputError, match=r"'notes\.md' is in it"):
        split_folder(source, out, 2, progress=lambda _: foreign(out), force=True)
    assert contents(out) == before | {"notes.md": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_merge_replaces_a_folder_of_its_own_files_only(
    source: Path, out: Path, tmp_path: Path
) -> None:
    merge_folder(out, tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"damaged")
    merge_folder(out, tmp_path / "merged", force=True)
    assert contents(tmp_path / "merged") == contents(source)
    foreign(tmp_path / "merged")
    before = tree(tmp_path)
    for target, words in (("merged", "'notes.md' is in it"), ("out", "shardkit did not write")):
        with pytest.raises(OutputError, match=words):
            merge_folder(out, tmp_path / target, force=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="not a checkpoint that --force may replace"):
        merge_folder(out, tmp_path / "empty", force=True)
    (tmp_path / "empty").rmdir()
    assert tree(tmp_path) == before


def test_a_source_is_never_replaced_by_its_own_split(source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"no manifest.json"):
        split_folder(source, source, 2, force=True)
    assert tree(tmp_path) == before


def test_a_shard_folder_can_be_resharded_in_place(source: Path, out: Path, tmp_path: Path) -> None:
    reshard_folder(out, out, 2, force=True)
    split_folder(source, tmp_path / "direct", 2)
    assert contents(out) == contents(tmp_path / "direct")


def test_where_two_folders_cannot_be_exchanged_nothing_is_replaced(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_exchange(*_: object) -> None:  # as NFS answers; there is none here to try it on
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(folders, "exchange_folders", no_exchange)
    told: list[int] = []
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="atomic rename-exchange"):
        split_folder(source, out, 2, progress=told.append, force=True)
    assert told == [], "refused before the copy"
    assert tree(tmp_path) == before


def test_a_folder_named_by_dots_is_not_replaced(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "in").mkdir()
    monkeypatch.chdir(out / "in")
    with pytest.raises(OutputError, match="cannot be replaced by this name"):
        split_folder(source, Path(".."), 2, force=True)


def test_the_folder_one_is_in_can_be_resharded(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out)
    reshard_folder(Path("."), Path("."), 2, force=True)
    split_folder(source, tmp_path / "direct", 2)
    assert contents(out) == contents(tmp_path / "direct")


def test_the_commands_replace_only_when_told_to(source: Path, out: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    refused = run("split", source, out, "--tp", "2")
    assert refused.exit_code == 5
    assert "exists, and is replaced only with --force" in refused.stderr
    assert run("split", source, out, "--tp", "2", "--force", "--dry-run").exit_code == 0
    assert tree(tmp_path) == before
    commands: list[list[str | Path]] = [
        ["split", source, out, "--tp", "2", "--force"],
        ["reshard", out, out, "--tp", "4", "--force"],
        ["merge", out, tmp_path / "merged"],
        ["merge", out, tmp_path / "merged", "--force", "--resume"],
    ]
    for command in commands:
        assert run(*command).exit_code == 0
    assert contents(tmp_path / "merged") == contents(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "out", "source"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a filesystem that nobody may write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("a read-only disk cannot be tried: no mount command")
    if done.returncode:
        pytest.skip(f"a read-only disk cannot be tried: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("command", ["split", "merge", "reshard"])
def test_a_read_only_folder_is_refused_before_anything_is_read(
    command: str, source: Path, out: Path, read_only: Path
) -> None:
    """Damaged shards, and a source that is not there, would be errors of another kind."""
    with (out / shard_name(0, 3)).open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"?")
    first = {"split": source / "none", "merge": out, "reshard": out}[command]
    more = [] if command == "merge" else ["--tp", "2"]
    result = run(command, first, read_only / "out", *more)
    assert (result.exit_code, result.stderr) == (5, f"Error: {read_only}: not writable\n")
