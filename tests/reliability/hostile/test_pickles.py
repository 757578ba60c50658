"""Pickled weights: refused unless asked for, and then read apart, checked, and never run."""

import io
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardkit.checkpoint.pickled import sandbox as unpickle
from shardkit.checkpoint.pickled.archive import ArchiveError
from shardkit.checkpoint.pickled.convert import _convert_file
from shardkit.errors import SourceChanged
from tests.helpers.command_line import SHARDKIT, environment, run
from tests.helpers.fake_hub import Repository, serving
from tests.helpers.fixture_checkpoints import small_checkpoint
from tests.helpers.raw_safetensors import index_of
from tests.helpers.real_inputs import shared
from tests.reliability.hostile.archives import BAD, GOOD, code_running, saved, with_pickle
from tests.reliability.hostile.sandbox import MEGABYTES, apart

BIN = "pytorch_model.bin"


def convert(data: bytes, folder: Path) -> tuple[str, float]:
    """What the converter says of a file, in a forked child; nothing if it was converted."""
    (folder / BIN).write_bytes(data)

    def work() -> Any:
        source = os.open(folder / BIN, os.O_RDONLY)
        out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            unpickle.main(source, out)
        except Exception as error:
            foreign = "" if isinstance(error, ArchiveError) else "cannot be unpickled: "
            return foreign + unpickle._describe_error(error)
        return ""

    found: tuple[str, float] = apart(work)
    return found


@pytest.mark.parametrize("name", BAD)
def test_an_archive_that_is_not_plain_weights_is_refused(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    told, grown = convert(make(), tmp_path)
    assert told
    assert told.isprintable()
    for word in words:
        assert word in told
    assert grown < MEGABYTES
    assert sorted(os.listdir(tmp_path)) == ["out", BIN]


@pytest.mark.parametrize(
    ("name", "zipped"),
    [
        pytest.param(name, zipped, marks=() if at % 9 == 0 else pytest.mark.slow)
        for zipped in (False, True)
        for at, name in enumerate(code_running(""))
    ],
)
def test_a_pickle_that_would_run_code_does_not(name: str, zipped: bool, tmp_path: Path) -> None:
    payload = code_running(str(tmp_path / "marker"))[name]
    told, _ = convert(with_pickle(payload) if zipped else payload, tmp_path)
    assert ("cannot be unpickled" if zipped else "not the zip archive") in told
    assert sorted(os.listdir(tmp_path)) == ["out", BIN]


def test_the_format_before_zip_archives_is_refused_with_a_way_out(tmp_path: Path) -> None:
    data = io.BytesIO()
    torch.save({"a": torch.ones(4, 4)}, data, _use_new_zipfile_serialization=False)
    told, _ = convert(data.getvalue(), tmp_path)
    assert "torch before 1.6" in told
    assert "torch.load(weights_only=True), and save it again" in told


@pytest.mark.parametrize("name", GOOD)
def test_plain_weights_are_converted_to_the_same_tensors(name: str, tmp_path: Path) -> None:
    told, _ = convert(saved(GOOD[name]), tmp_path)
    assert told == ""
    found = load_file(tmp_path / "out")
    assert found.keys() == GOOD[name].keys()
    for key, tensor in GOOD[name].items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor.detach().resolve_conj())


def test_a_torch_that_reads_pickles_unsafely_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    told, _ = convert(saved(GOOD["plain"]), tmp_path)
    assert "2.9.1" in told
    assert "2.10 is needed" in told


@pytest.fixture
def apart_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "apart"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def pickled(source: Path, out: Path, files: int = 1) -> Path:
    """A copy of a checkpoint in one file, its weights pickled in one file or several."""
    shutil.copytree(source, out)
    held = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    if files == 1:
        (out / BIN).write_bytes(saved(held))
        return out
    names = {name: f"pytorch_model-0000{at % files + 1}.bin" for at, name in enumerate(held)}
    for file in set(names.values()):
        (out / file).write_bytes(saved({n: t for n, t in held.items() if names[n] == file}))
    (out / f"{BIN}.index.json").write_text(json.dumps(index_of(names)))
    return out


@pytest.mark.parametrize("files", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_shards_of_pickled_weights_are_those_of_the_same_safetensors(
    files: int, tmp_path: Path, apart_folder: Path
) -> None:
    source = shared("models/stories260K")
    folder = pickled(source, tmp_path / "model", files)
    refused = run("split", folder, tmp_path / "out", "--tp", "2")
    assert refused.exit_code == 3
    assert "--allow-pickle" in refused.stderr
    assert not (tmp_path / "out").exists()
    made = run("split", folder, tmp_path / "out", "--tp", "2", "--allow-pickle")
    assert (made.exit_code, made.stderr) == (0, "")
    checks = run("verify", tmp_path / "out", "--against", source, "--level", "weights")
    assert checks.exit_code == 0
    again = run(
        "verify", tmp_path / "out", "--against", folder, "--level", "weights", "--allow-pickle"
    )
    assert again.exit_code == 0
    assert not list(apart_folder.iterdir())


def test_a_pickle_is_refused_by_split_with_nothing_run_or_left(
    tmp_path: Path, apart_folder: Path
) -> None:
    folder = small_checkpoint(tmp_path / "model")
    for path in folder.glob("model*"):
        path.unlink()
    payload = code_running(str(tmp_path / "marker"))["os.system"]
    (folder / BIN).write_bytes(with_pickle(payload))
    before = sorted(tmp_path.rglob("*"))
    result = run("split", folder, tmp_path / "out", "--tp", "2", "--allow-pickle")
    assert result.exit_code == 3
    assert BIN in result.stderr
    assert "cannot be unpickled" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pickle_written_to_while_it_is_converted_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / BIN
    path.write_bytes(saved(GOOD["plain"]))
    convert_file = subprocess.run

    def run_and_touch(*arguments: Any, **options: Any) -> Any:
        done = convert_file(*arguments, **options)
        os.utime(path, ns=(0, 0))
        return done

    monkeypatch.setattr(subprocess, "run", run_and_touch)
    with pytest.raises(SourceChanged, match="changed while it was read"):
        _convert_file(path, BIN, tmp_path / "out")


def test_safetensors_are_read_where_there_are_any(tmp_path: Path, apart_folder: Path) -> None:
    folder = small_checkpoint(tmp_path / "model")
    (folder / BIN).write_bytes(b"never opened")
    assert run("plan", folder, "--tp", "2", "--allow-pickle").exit_code == 0


@pytest.mark.hub
@pytest.mark.slow
def test_a_hub_repository_of_pickles_is_fetched_only_where_they_are_allowed(tmp_path: Path) -> None:
    folder = pickled(shared("models/stories260K"), tmp_path / "model")
    commit = "0" * 40
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serving({"org/name": Repository({commit: files}, {"main": commit})}) as hub:
        env = environment(
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0",
            NO_PROXY="127.0.0.1", TMPDIR=str(tmp_path),
        )  # fmt: skip
        refused, made = (
            subprocess.run(
                [*SHARDKIT, "split", "org/name", "out", "--tp", "2", *flags],
                capture_output=True, text=True, env=env, cwd=tmp_path, check=False,
            )
            for flags in ([], ["--allow-pickle"])
        )  # fmt: skip
        assert (refused.returncode, "--allow-pickle" in refused.stderr) == (3, True)
        assert made.returncode == 0, made.stderr
        assert BIN in hub.fetched()
    record = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["source"]
    assert (record["id"], record["revision"]) == ("org/name", commit)


def test_a_conversion_that_takes_more_memory_than_is_allowed_is_refused(
    tmp_path: Path, apart_folder: Path
) -> None:
    folder = pickled(shared("models/stories260K"), tmp_path / "model")
    options = ("--tp", "2", "--allow-pickle", "--max-memory", "200M")
    refused = run("split", folder, tmp_path / "out", *options)
    assert refused.exit_code == 2
    assert "to convert its pickled weights takes 302 MB" in refused.stderr
    assert not list(apart_folder.glob("*/*"))
    assert not (tmp_path / "out").exists()
