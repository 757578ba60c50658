"""What lies in the cache, against what the Hub said it is."""

import subprocess
import sys
from dataclasses import replace
from hashlib import sha1
from pathlib import Path

import pytest

from shardkit.checkpoint.hub_cache import check_bytes
from shardkit.errors import CheckpointError
from tests.helpers.fake_hub import Repository
from tests.helpers.fixture_checkpoints import small_checkpoint
from tests.helpers.hub_client import OLD, ROOT, Client, _json
from tests.helpers.raw_safetensors import CONFIG
from tests.helpers.synthetic_checkpoints import contents

pytestmark = pytest.mark.hub


def shardkit_run(client: Client, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a new process, with the client's Hub and cache."""
    return subprocess.run(
        [sys.executable, "-m", "shardkit", *map(str, arguments)],
        cwd=ROOT, env=client.env(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def model(client: Client, tmp_path: Path) -> str:
    """A repository of a small Llama in two files."""
    files = contents(small_checkpoint(tmp_path / "model")) | {"tokenizer.json": b"{}"}
    client.hub.repositories["org/model"] = Repository({OLD: files}, {"main": OLD})
    return "org/model"


def blob_of(client: Client, name: str) -> Path:
    """Where the cache has a file's bytes."""
    (link,) = client.home.glob(f"hub/*/snapshots/*/{name}")
    return link.resolve()


def flip(path: Path) -> None:
    """Change a bit in the middle of a file, and nothing else that can be seen from outside."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_sound_download_is_split_and_verified(client: Client, model: str, tmp_path: Path) -> None:
    done = shardkit_run(client, "split", model, tmp_path / "out", "--tp", 2)
    assert done.returncode == 0, done.stderr
    done = shardkit_run(
        client, "verify", tmp_path / "out", "--against", model, "--level", "weights"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_file_that_was_damaged_in_the_cache_is_refused(
    name: str, client: Client, model: str, tmp_path: Path
) -> None:
    assert shardkit_run(client, "split", model, tmp_path / "good", "--tp", 2).returncode == 0
    blob = blob_of(client, name)
    flip(blob)
    snapshot = str(next(client.home.glob("hub/*/snapshots/*")))
    for source in (model, snapshot):  # the cache's folder may be named as well
        done = shardkit_run(client, "split", source, tmp_path / "out", "--tp", 2)
        assert (done.returncode, done.stdout) == (3, "")
        last = done.stderr.splitlines()[-1]
        assert f"{name}: not the Hub's file" in last
        assert f"remove {blob}" in last
        assert not (tmp_path / "out").exists()
    blob.unlink()
    done = shardkit_run(client, "split", model, tmp_path / "out", "--tp", 2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


def test_a_body_that_was_damaged_on_its_way_is_refused(
    client: Client, model: str, tmp_path: Path
) -> None:
    client.hub.repositories[model] = replace(
        client.hub.repositories[model], damaged=frozenset({"model-00001-of-00002.safetensors"})
    )
    done = shardkit_run(client, "split", model, tmp_path / "out", "--tp", 2)
    assert done.returncode == 3
    assert "model-00001-of-00002.safetensors: not the Hub's file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_pickle_is_refused_before_it_is_looked_into(
    client: Client, tmp_path: Path
) -> None:
    files = {"config.json": _json(CONFIG), "pytorch_model.bin": b"never read"}
    client.hub.repositories["org/pickled"] = Repository(
        {OLD: files}, {"main": OLD}, damaged=frozenset({"pytorch_model.bin"})
    )
    done = shardkit_run(
        client, "split", "org/pickled", tmp_path / "out", "--tp", 2, "--allow-pickle"
    )
    assert done.returncode == 3
    assert "pytorch_model.bin: not the Hub's file" in done.stderr


def test_a_mirror_may_name_small_files_by_their_plain_sha1(tmp_path: Path) -> None:
    for digest in (sha1(b"{}"), sha1(b"blob 2\0{}")):
        check_bytes(tmp_path / "blobs" / digest.hexdigest(), "config.json", b"{}")
        with pytest.raises(CheckpointError, match="not the Hub's file"):
            check_bytes(tmp_path / "blobs" / digest.hexdigest(), "config.json", b"[]")


def test_shards_are_not_verified_against_a_damaged_download(
    client: Client, model: str, tmp_path: Path
) -> None:
    assert shardkit_run(client, "split", model, tmp_path / "out", "--tp", 2).returncode == 0
    flip(blob_of(client, "model-00001-of-00002.safetensors"))
    done = shardkit_run(
        client, "verify", tmp_path / "out", "--against", model, "--level", "weights"
    )
    assert done.returncode == 3
    assert "not the Hub's file" in done.stderr
