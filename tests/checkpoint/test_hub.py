"""A Hub id as a source: what is fetched, what is not, and how each failure reads.

Each fetch is a process of its own, as huggingface_hub reads its settings when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest

import shardkit
from shardkit.checkpoint.hub_cache import check_bytes
from shardkit.errors import CheckpointError
from tests.helpers.fake_hub import Hub, Repository, serving
from tests.helpers.fixture_checkpoints import small_checkpoint
from tests.helpers.raw_safetensors import CONFIG, INDEX, index_of, small_file
from tests.helpers.synthetic_checkpoints import contents

pytestmark = pytest.mark.hub

ROOT = Path(shardkit.__file__).resolve().parents[1]
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

OPEN = """
import json, sys
from shardkit.checkpoint import open_checkpoint
from shardkit.errors import CheckpointError

source, revision = json.loads(sys.argv[1])
try:
    with open_checkpoint(source, revision) as checkpoint:
        tensors = {}
        for spec in checkpoint.specs():
            data = bytearray(spec.nbytes)
            checkpoint.read_into(spec.name, 0, memoryview(data))
            tensors[spec.name] = data.decode()
        found = {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "folder": str(checkpoint.folder),
            "files": [file.name for file in checkpoint.files],
            "companions": [name for name, _ in checkpoint.companions()],
            "tensors": tensors,
        }
except CheckpointError as error:
    found = {"error": str(error)}
print(json.dumps(found))
"""


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


SMALL = {
    "config.json": _json(CONFIG),
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"\0pieces",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
}
SURPLUS = {
    "README.md": b"# model",
    ".gitattributes": b"*.bin filter=lfs",
    "modeling_custom.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": small_file("z"),
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "original/model.safetensors": small_file("z"),
    "onnx/model.onnx": b"onnx",
}
INDEXED = {
    **SMALL,
    **SURPLUS,
    INDEX: _json(index_of({"c": TWO, "a": ONE, "b": ONE}, total_size=24)),
    ONE: small_file("a", "b"),
    TWO: small_file("c"),
    "adapter_model.safetensors": small_file("y"),
}
SINGLE = {
    **SMALL,
    **SURPLUS,
    "model.safetensors": small_file("a"),
    "model.fp16.safetensors": small_file("a"),
}


@dataclass(frozen=True)
class Client:
    """A user's machine: an address of a Hub, and a cache of its own."""

    hub: Hub
    home: Path

    def run(
        self, source: str, revision: str | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """A new process that calls `open_checkpoint` and prints what it found, or the error."""
        return subprocess.run(
            [sys.executable, "-c", OPEN, json.dumps([source, revision])],
            cwd=ROOT,
            env=self.env() | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def open(self, source: str, revision: str | None = None, **env: str) -> dict[str, Any]:
        """What `open_checkpoint` finds in a new process, its error's one line included."""
        done = self.run(source, revision, **env)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert found.get("error", "").isprintable()
        return found

    def error(self, source: str, revision: str | None = None, **env: str) -> str:
        """The one line with which `open_checkpoint` fails."""
        text: str = self.open(source, revision, **env)["error"]
        return text

    def env(self) -> dict[str, str]:
        """What a process is told of both."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        return mine | {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    repositories = {
        "org/indexed": Repository({OLD: INDEXED}, {"main": OLD}),
        "org/single": Repository(
            {OLD: SINGLE, NEW: SINGLE | {"model.safetensors": small_file("new")}},
            {"main": NEW, "v1": OLD},
        ),
        "org/gated": Repository({OLD: SINGLE}, {"main": OLD}, token="hf_right"),
        "org/short": Repository({OLD: SINGLE}, {"main": OLD}, short=frozenset(SINGLE)),
    }
    with serving(repositories) as hub:
        yield Client(hub, tmp_path / "home")


def test_an_indexed_repository_is_fetched_and_opened(client: Client) -> None:
    found = client.open("org/indexed")
    assert found["tensors"] == {"a": "a.......", "b": "b.......", "c": "c......."}
    assert found["files"] == [ONE, TWO]
    assert found["companions"] == sorted(SMALL)
    assert (found["name"], found["revision"]) == ("org/indexed", OLD)
    assert Path(found["folder"]).is_relative_to(client.home / "hub")


def test_only_what_a_split_reads_is_fetched(client: Client) -> None:
    client.open("org/indexed")
    assert client.hub.fetched() == {*SMALL, INDEX, ONE, TWO}


def test_a_single_file_is_fetched_without_its_variants(client: Client) -> None:
    assert client.open("org/single")["tensors"] == {"new": "new....."}
    assert client.hub.fetched() == {*SMALL, "model.safetensors"}


def test_a_second_run_offline_reads_the_cache_and_asks_nothing(client: Client) -> None:
    online = client.open("org/indexed")
    client.hub.requests.clear()
    assert client.open("org/indexed", HF_HUB_OFFLINE="1") == online
    assert client.hub.requests == []


def test_a_second_run_online_fetches_no_file_again(client: Client) -> None:
    online = client.open("org/indexed")
    client.hub.requests.clear()
    assert client.open("org/indexed") == online
    assert client.hub.fetched() == set()


def test_a_hub_that_is_down_leaves_the_cache_usable(client: Client) -> None:
    online = client.open("org/single")
    client.hub.down = True
    assert client.open("org/single") == online


@pytest.mark.parametrize(
    ("revision", "commit", "tensor"),
    [(None, NEW, "new"), ("main", NEW, "new"), ("v1", OLD, "a"), (OLD, OLD, "a")],
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    revision: str | None, commit: str, tensor: str, client: Client
) -> None:
    found = client.open("org/single", revision)
    assert found["revision"] == commit
    assert list(found["tensors"]) == [tensor]


def test_a_token_opens_a_gated_repository_and_without_it_the_way_in_is_said(
    client: Client,
) -> None:
    error = client.error("org/gated")
    assert "gated" in error
    assert f"{client.hub.endpoint}/org/gated" in error
    assert "HF_TOKEN" in error
    assert "HF_TOKEN" in client.error("org/gated", HF_TOKEN="hf_wrong")
    assert client.open("org/gated", HF_TOKEN="hf_right")["files"] == ["model.safetensors"]


def test_a_missing_repository_is_named_with_the_hub_that_was_asked(client: Client) -> None:
    error = client.error("org/absent")
    assert error.startswith("'org/absent': no such folder, and no such repository")
    assert client.hub.endpoint in error


def test_a_missing_revision_is_named(client: Client) -> None:
    error = client.error("org/single", "v9")
    assert "'org/single'" in error
    assert "no revision 'v9'" in error


def test_an_empty_revision_is_refused_and_not_taken_for_the_default(client: Client) -> None:
    assert "empty revision" in client.error("org/single", "")
    assert client.hub.requests == []


def test_progress_goes_to_stderr_alone(client: Client) -> None:
    done = client.run("org/single")
    assert "Fetching" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_offline_without_a_cache_says_how_to_download(client: Client) -> None:
    error = client.error("org/single", HF_HUB_OFFLINE="1")
    assert "'org/single'" in error
    assert "HF_HUB_OFFLINE is set" in error
    assert client.hub.requests == []


def test_offline_with_part_of_the_files_says_how_to_download(client: Client) -> None:
    folder = Path(client.open("org/indexed")["folder"])
    (folder / TWO).unlink()
    assert "HF_HUB_OFFLINE is set" in client.error("org/indexed", HF_HUB_OFFLINE="1")


def test_a_cache_without_a_listing_serves_offline(client: Client) -> None:
    online = client.open("org/indexed")
    for listing in client.home.rglob("trees/*.json"):
        listing.unlink()
    assert client.open("org/indexed", HF_HUB_OFFLINE="1") == online


def test_a_hub_that_refuses_connections_is_named(client: Client) -> None:
    error = client.error("org/single", HF_ENDPOINT="http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer" in error
    assert "refused" in error


def test_a_body_of_the_wrong_size_is_no_download(client: Client) -> None:
    error = client.error("org/short")
    assert "'org/short': not downloaded" in error
    assert "size" in error


# Changes to a sound repository (None takes a file away), and words its error must hold.
UNFIT: dict[str, tuple[dict[str, bytes | None], tuple[str, ...]]] = {
    "only pickles": (
        {INDEX: None, ONE: None, TWO: None, "adapter_model.safetensors": None,
         "consolidated.safetensors": None},
        ("only pickled weights",),
    ),
    "an index of a file that is not there": ({TWO: None}, (TWO, "missing")),
    "a damaged index": ({INDEX: b"<<<<<<< HEAD"}, (INDEX, "damaged index")),
    "an index that leads out": (
        {INDEX: _json(index_of({"a": "../../x.safetensors"}))}, ("../../x.safetensors",),
    ),
    "both a single file and an index": (
        {"model.safetensors": small_file("a")}, ("both", "model.safetensors", INDEX),
    ),
    "no config": ({"config.json": None}, ("no config.json",)),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_repository_is_refused_before_any_weights_are_fetched(
    case: str, client: Client
) -> None:
    changes, words = UNFIT[case]
    changed = {name: data for name, data in (INDEXED | changes).items() if data is not None}
    client.hub.repositories["org/indexed"].commits[OLD] = changed
    error = client.error("org/indexed")
    for word in words:
        assert word in error
    assert not [name for name in client.hub.fetched() if name.endswith(".safetensors")]


# What lies in the cache, against what the Hub said it is


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
