"""A user of a Hub on the loopback: a cache, a token, and what was asked for."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shardkit
from tests.helpers.fake_hub import Hub
from tests.helpers.raw_safetensors import CONFIG, INDEX, index_of, small_file

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
