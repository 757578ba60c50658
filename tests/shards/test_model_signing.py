"""A shard folder signed and verified by OpenSSF model signing, where that tool is installed.

It is the command `model_signing` of the package model-signing, which needs pyopenssl beside it.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.verification import check_files
from tests.helpers.command_line import run
from tests.helpers.damage import quiet
from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

SIGNATURE = "model.sig"


@pytest.fixture(scope="module")
def tool() -> str:
    found = shutil.which(
        "model_signing", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if found is None:
        pytest.skip("model_signing is not installed (pip install model-signing pyopenssl)")
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the key, is not installed")
    return found


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = write_source(tmp_path / "source", llama_config(), specs_of(llama()))
    (source / "tokenizer.json").write_text("{}")
    (source / "Zebra.txt").write_text("sorts before config.json by its bytes")
    split_folder(source, tmp_path / "shards", 3)
    return tmp_path / "shards"


def signed(tool: str, shards: Path) -> None:
    """Make a key pair beside the folder, and sign the folder."""
    key, public = (str(shards.with_name(name)) for name in ("key.pem", "public.pem"))
    for command in (
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key],
        ["openssl", "ec", "-in", key, "-pubout", "-out", public],
        [tool, "sign", "key", str(shards), "--private_key", key,
         "--signature", str(shards / SIGNATURE)],
    ):  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)


def accepted(tool: str, shards: Path) -> bool:
    done = subprocess.run(
        [tool, "verify", "key", str(shards), "--signature", str(shards / SIGNATURE),
         "--public_key", str(shards.with_name("public.pem"))],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "Verification " in done.stdout + done.stderr, done.stderr
    return done.returncode == 0


def subject(shards: Path) -> str:
    """The digest that was signed, as the signature has it."""
    envelope = json.loads((shards / SIGNATURE).read_bytes())["dsseEnvelope"]
    (found,) = json.loads(base64.b64decode(envelope["payload"]))["subject"]
    return str(found["digest"]["sha256"])


def test_a_signed_folder_is_accepted_and_inspect_prints_what_was_signed(
    tool: str, shards: Path
) -> None:
    before = json.loads(run("inspect", shards, "--json").stdout)["signing_sha256"]
    signed(tool, shards)
    assert accepted(tool, shards)
    assert check_files(shards, quiet).verdict == "passed"
    assert json.loads(run("inspect", shards, "--json").stdout)["signing_sha256"] == before
    assert subject(shards) == before
    assert before in run("inspect", shards).stdout


def test_each_files_change_is_refused_by_the_signature_and_by_verify(
    tool: str, shards: Path
) -> None:
    signed(tool, shards)
    names = sorted(path.name for path in shards.iterdir() if path.name != SIGNATURE)
    assert len(names) == 3 + 1 + 3
    for name in names:
        sound = (shards / name).read_bytes()
        (shards / name).write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
        assert not accepted(tool, shards), name
        assert check_files(shards, quiet).verdict == "failed", name
        (shards / name).unlink()
        assert not accepted(tool, shards), name
        assert check_files(shards, quiet).verdict == "failed", name
        (shards / name).write_bytes(sound)
    assert accepted(tool, shards)
    (shards / "extra").touch()
    assert not accepted(tool, shards)


def test_verify_finds_what_the_signature_does_not_cover(tool: str, shards: Path) -> None:
    signed(tool, shards)
    (shards / ".gitattributes").touch()
    (shards / "empty").mkdir()
    assert accepted(tool, shards)
    assert len(check_files(shards, quiet).faults) == 2
