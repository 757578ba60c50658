"""A reader that looks while a writer publishes: nothing, the whole old or the whole new output."""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from shardkit.checkpoint import Checkpoint
from shardkit.convert import shard_destination, split_checkpoint
from shardkit.errors import ManifestError, VerifyError
from shardkit.planning import make_plan
from shardkit.recipe.catalog import find_recipe
from shardkit.shards.integrity import check_ranks
from shardkit.shards.reader import ShardedCheckpoint
from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

RANKS = 3
FEW, MANY = 5, 50
Known = dict[str, dict[str, bytes]]


def serve(pipe: Connection) -> None:
    """A writer's process: splits `source` into `out`, again and again, until told to end."""
    while (job := pipe.recv()) is not None:
        source, out, force = job
        with Checkpoint(source) as checkpoint:
            recipe = find_recipe(checkpoint.config)
            plan = make_plan(checkpoint.specs(), recipe, checkpoint.config, RANKS)
            split_checkpoint(checkpoint, plan, recipe, shard_destination(out, force))
        pipe.send("done")


@contextmanager
def writer() -> Iterator[Callable[[Path, Path, bool], Connection]]:
    """Starts a split in another process; what it returns can be read from once that is done."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()

    def begin(source: Path, out: Path, force: bool) -> Connection:
        ours.send((source, out, force))
        return ours

    try:
        yield begin
        ours.send(None)
    finally:
        ours.close()
        process.join(60)
    assert process.exitcode == 0


def whole(shards: ShardedCheckpoint) -> dict[str, bytes]:
    """Every tensor, read from every rank's file."""
    held = {spec.name: bytearray(spec.nbytes) for spec in shards.specs()}
    for name, data in held.items():
        shards.read_into(name, 0, memoryview(data))
    return {name: bytes(data) for name, data in held.items()}


def look(out: Path, known: Known) -> str:
    """What a reader sees: "nothing", "refused", or which of the known outputs, every byte of it."""
    try:
        with ShardedCheckpoint(out) as shards:
            check_ranks(shards, lambda _: None)
            held = whole(shards)
    except (ManifestError, VerifyError) as error:
        return "nothing" if str(error).endswith("no such folder") else "refused"
    return next((name for name, tensors in known.items() if tensors == held), "a mix")


def watch(done: Connection, out: Path, known: Known) -> list[str]:
    """All that is seen until the writer is done, and once more; what is seen again left out."""
    seen = []
    while not done.poll():
        seen.append(look(out, known))
    done.recv()
    seen.append(look(out, known))
    return [name for name, _ in groupby(seen)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one layout: every byte of one is other than the other's."""
    base = tmp_path_factory.mktemp("races")
    specs = specs_of(llama())
    old = write_source(base / "old", llama_config(), specs)
    shutil.copytree(old, base / "new")
    data = (old / "model.safetensors").read_bytes()
    start = len(data) - sum(spec.nbytes for spec in specs)
    changed = data[:start] + bytes(255 - byte for byte in data[start:])
    (base / "new" / "model.safetensors").write_bytes(changed)
    return {"old": old, "new": base / "new"}


@pytest.fixture(scope="module")
def known(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Known:
    """The tensors of both."""
    base = tmp_path_factory.mktemp("known")
    tensors = {}
    for name, source in sources.items():
        split_folder(source, base / name, RANKS)
        with ShardedCheckpoint(base / name) as shards:
            tensors[name] = whole(shards)
    return tensors


def first_races(times: int, sources: dict[str, Path], known: Known, base: Path) -> None:
    with writer() as begin:
        for race in range(times):
            out = base / f"out-{race}"
            seen = watch(begin(sources["new"], out, False), out, known)
            assert seen in (["nothing", "new"], ["new"])


def replacing_races(times: int, sources: dict[str, Path], known: Known, base: Path) -> None:
    """A refusal is allowed where the exchange came between the manifest and the shards."""
    out = base / "out"
    split_folder(sources["old"], out, RANKS)
    with writer() as begin:
        for race in range(times):
            before, after = ("new", "old") if race % 2 else ("old", "new")
            seen = watch(begin(sources[after], out, True), out, known)
            assert [name for name in seen if name != "refused"] in ([before, after], [after])
            assert seen[-1] == after


def test_a_reader_sees_nothing_or_the_whole_output(
    sources: dict[str, Path], known: Known, tmp_path: Path
) -> None:
    first_races(FEW, sources, known, tmp_path)


def test_a_reader_sees_the_whole_old_or_the_whole_new_output(
    sources: dict[str, Path], known: Known, tmp_path: Path
) -> None:
    replacing_races(FEW, sources, known, tmp_path)


@pytest.mark.slow
def test_fifty_readers_see_nothing_or_the_whole_output(
    sources: dict[str, Path], known: Known, tmp_path: Path
) -> None:
    first_races(MANY, sources, known, tmp_path)


@pytest.mark.slow
def test_fifty_readers_see_the_whole_old_or_the_whole_new_output(
    sources: dict[str, Path], known: Known, tmp_path: Path
) -> None:
    replacing_races(MANY, sources, known, tmp_path)


def test_a_writer_that_copies_file_by_file_is_seen_half_done(
    sources: dict[str, Path], known: Known, tmp_path: Path
) -> None:
    split_folder(sources["old"], tmp_path / "shards", RANKS)
    out = tmp_path / "out"
    out.mkdir()
    seen = []
    for path in sorted((tmp_path / "shards").iterdir()):
        shutil.copy(path, out)
        seen.append(look(out, known))
    assert seen[0] == "refused"
    assert seen[-1] == "old"


def test_a_shard_of_another_model_is_no_whole_output(
    sources: dict[str, Path], known: Known, tmp_path: Path
) -> None:
    split_folder(sources["old"], tmp_path / "old", RANKS)
    split_folder(sources["new"], tmp_path / "new", RANKS)
    name = "rank-00001-of-00003.safetensors"
    shutil.copy(tmp_path / "new" / name, tmp_path / "old" / name)
    assert look(tmp_path / "old", known) == "refused"
