"""A stopped run is gone on with: what is proven on disk is kept, all else is written anew."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shardkit.checkpoint import Checkpoint
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.errors import OutputError, SourceChanged
from shardkit.output import writer as file_sink
from shardkit.output.destination import Destination
from shardkit.output.publish import JOURNAL
from shardkit.output.resume import (
    Journal,
    JournalEntry,
    parse_journal,
)
from shardkit.planning import make_plan
from shardkit.recipe.catalog import find_recipe
from tests.helpers.damage import flip, linked, piped, shorten
from tests.helpers.split_helpers import merge_folder, reshard_folder, shard_name, split_folder
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama,
    llama_config,
    specs_of,
    write_source,
)

BIG = {"vocab": 400, "ffn": 96}


@pytest.fixture(autouse=True)
def _notes_for_every_few_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_sink, "JOURNAL_INTERVAL", 2000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", llama_config(ffn=96), specs_of(llama(**BIG)))


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed split over two ranks writes."""
    split_folder(source, tmp_path / "whole", 2)
    found = contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    return found


def killed(run: Callable[..., object], *arguments: Any, notes: int) -> None:
    """A run in a process of its own, killed once its journal has so many notes."""
    pid = os.fork()
    if pid == 0:
        note, left = Journal.append, iter(range(notes - 1))

        def note_and_die(journal: Journal, entry: JournalEntry) -> None:
            note(journal, entry)
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.append = note_and_die  # type: ignore[method-assign, assignment]
        run(*arguments)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def stage(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> Path:
    """What a killed split has left."""
    killed(split_folder, source, tmp_path / "out", 2, notes=8)
    (found,) = Destination(tmp_path / "out").find_stages()
    assert len((found / JOURNAL).read_bytes().splitlines()) >= 9
    return found


def resumed(source: Path, out: Path, tp_size: int = 2) -> int:
    """Go on with a split; the bytes that were read of the source's tensors, samples left out."""
    with closing(CountingCheckpoint(source)) as checkpoint:
        checkpoint.fingerprint()
        sampled = checkpoint.read
        recipe = find_recipe(checkpoint.config)
        plan = make_plan(checkpoint.specs(), recipe, checkpoint.config, tp_size)
        split_checkpoint(checkpoint, plan, recipe, shard_destination(out, resume=True))
        return checkpoint.read - 2 * sampled


class CountingCheckpoint(Checkpoint):
    read = 0

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        self.read += len(view)
        super().read_into(name, offset, view)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def total(source: Path) -> int:
    with Checkpoint(source) as checkpoint:
        return sum(spec.nbytes for spec in checkpoint.specs())


def test_a_resumed_split_reads_only_what_is_missing_and_writes_the_same(
    source: Path, stage: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert 0 < resumed(source, tmp_path / "out") < total(source) / 2
    assert contents(tmp_path / "out") == whole
    assert names(tmp_path) == ["out", "source"]


def test_a_resumed_merge_and_a_resumed_reshard_write_the_same(source: Path, tmp_path: Path) -> None:
    split_folder(source, tmp_path / "shards", 2)
    for run, more in ((merge_folder, ()), (reshard_folder, (3,))):
        run(tmp_path / "shards", tmp_path / "whole", *more)
        killed(run, tmp_path / "shards", tmp_path / "out", *more, notes=6)
        assert [
            (stage / JOURNAL).exists() for stage in Destination(tmp_path / "out").find_stages()
        ] == [True]
        run(tmp_path / "shards", tmp_path / "out", *more, resume=True)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "whole")
    assert names(tmp_path) == ["shards", "source"]


def test_a_plain_run_removes_what_is_left_even_of_another_split(
    source: Path, stage: Path, tmp_path: Path
) -> None:
    split_folder(source, tmp_path / "out", 3)
    assert names(tmp_path) == ["out", "source"]


def test_resume_with_nothing_left_begins_anew(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert resumed(source, tmp_path / "out") == total(source)
    assert contents(tmp_path / "out") == whole


def test_a_small_output_has_no_journal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    seen: list[list[str]] = []

    def look(_: int) -> None:
        seen.extend(names(stage) for stage in Destination(tmp_path / "out").find_stages())

    split_folder(source, tmp_path / "out", 2, progress=look)
    assert seen
    assert not any(JOURNAL in found for found in seen)


def test_a_torn_line_is_dropped_wherever_it_was_torn(
    source: Path, stage: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    data = (stage / JOURNAL).read_bytes()
    record = parse_journal(data)
    last = len(data.splitlines(keepends=True)[-1])
    for length in range(len(data) - last, len(data)):
        torn = parse_journal(data[:length])
        assert (torn.run, torn.entries) == (record.run, record.entries[:-1])
        assert torn.nbytes == len(data) - last
        zeros = data[:length] + bytes(len(data) - length) + b"\n"  # made longer, not written
        assert parse_journal(zeros).nbytes == len(data) - last
    (stage / JOURNAL).write_bytes(data[:-7])
    resumed(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("length", [0, 9, 60])
def test_a_journal_whose_first_line_was_torn_is_begun_anew(
    length: int, source: Path, stage: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    os.truncate(stage / JOURNAL, length)
    assert resumed(source, tmp_path / "out") == total(source)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("where", ["header", "first tensor", "last byte noted"])
def test_a_file_that_is_not_what_was_noted_is_written_anew(
    where: str, source: Path, stage: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path = stage / shard_name(1, 2)
    base = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, {"header": 30, "first tensor": base, "last byte noted": base + 12000}[where])
    assert resumed(source, tmp_path / "out") > 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("change", [Path.unlink, shorten, piped])
def test_a_file_that_is_gone_short_or_no_file_is_written_anew(
    change: Any, source: Path, stage: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    change(stage / shard_name(0, 2))
    resumed(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_link_in_what_is_left_is_refused_and_not_written_through(
    source: Path, stage: Path, tmp_path: Path
) -> None:
    linked(stage / shard_name(0, 2))
    before = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(OutputError, match=r"symbolic links"):
        resumed(source, tmp_path / "out")
    assert (tmp_path / "elsewhere").read_bytes() == before


def left_alone(tmp_path: Path, source: Path, tp_size: int = 2) -> str:
    """What a resumed run says that is refused, and leaves all that was there."""
    (stage,) = Destination(tmp_path / "out").find_stages()
    before = contents(stage)
    with pytest.raises(OutputError) as caught:
        resumed(source, tmp_path / "out", tp_size)
    (stage,) = Destination(tmp_path / "out").find_stages()
    assert contents(stage) == before
    assert "\n" not in str(caught.value)
    assert "leave --resume out" in str(caught.value)
    return str(caught.value)


def test_the_journal_of_another_split_is_refused(source: Path, stage: Path, tmp_path: Path) -> None:
    assert "of another split" in left_alone(tmp_path, source, tp_size=4)


def test_the_journal_of_a_source_written_to_since_is_refused(
    source: Path, stage: Path, tmp_path: Path
) -> None:
    os.utime(source / "model.safetensors", (1, 1))
    assert "the source was written to since" in left_alone(tmp_path, source)


def test_a_merge_does_not_go_on_with_a_split(source: Path, tmp_path: Path) -> None:
    split_folder(source, tmp_path / "shards", 2)
    killed(split_folder, source, tmp_path / "out", 2, notes=5)
    with pytest.raises(OutputError, match="the source was written to since"):
        merge_folder(tmp_path / "shards", tmp_path / "out", resume=True)


@pytest.mark.parametrize("damage", [b"{}\n", b"\xff\n", b'{"file":1}\n', b"[" * 9000 + b"\n"])
def test_a_damaged_journal_is_refused_in_a_line(
    damage: bytes, source: Path, stage: Path, tmp_path: Path
) -> None:
    first, *rest = (stage / JOURNAL).read_bytes().splitlines(keepends=True)
    (stage / JOURNAL).write_bytes(first + damage + b"".join(rest))
    left_alone(tmp_path, source)


def test_a_huge_journal_is_refused(source: Path, stage: Path, tmp_path: Path) -> None:
    os.truncate(stage / JOURNAL, 1 << 40)
    with pytest.raises(OutputError, match="more than the"):
        resumed(source, tmp_path / "out")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OutputError("full"), SourceChanged("x")])
def test_only_a_run_that_was_to_resume_keeps_what_it_wrote_when_stopped(
    error: Any, resume: bool, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > total(source) * 0.8:
            raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        split_folder(source, tmp_path / "out", 2, progress=stop, resume=resume)
    kept = Destination(tmp_path / "out").find_stages()
    assert len(kept) == (resume and not isinstance(error, SourceChanged))
    if kept:
        assert resumed(source, tmp_path / "out") < total(source) / 2
        assert contents(tmp_path / "out") == whole


def test_what_is_left_counts_as_room(stage: Path, tmp_path: Path) -> None:
    def room(out: Path) -> float:
        with pytest.raises(OutputError, match="needs") as caught:
            Destination(out).check_space(1 << 60)
        found = re.search(r"has (\S+) GB free", str(caught.value))
        assert found is not None
        return float(found[1])

    os.truncate(stage / shard_name(0, 2), 0)
    with (stage / shard_name(0, 2)).open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 4 << 30)
    assert room(tmp_path / "out") - room(tmp_path / "other") == pytest.approx(4.3, abs=0.5)
