"""The command line where it works: help, results, JSON, terminals and signals."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from shardkit import __version__
from shardkit.cli import COMMANDS, main
from shardkit.tensor import TensorSpec
from tests.helpers.command_line import SHARDKIT, contents, environment, run
from tests.helpers.fixture_checkpoints import (
    SMALL_CONFIG,
    small_checkpoint,
    small_specs,
    sparse_file,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Llama in two files."""
    return small_checkpoint(tmp_path / "model")


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Path:
    """The small Llama over two ranks."""
    out = tmp_path / "shards"
    assert run("split", source, out, "--tp", "2").exit_code == 0
    return out


def load(name: str) -> click.Command:
    """A command of the group, imported."""
    module = COMMANDS[name].target.partition(":")[0]
    if find_spec(module) is None:
        pytest.skip(f"{module} does not exist")
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command


# Help


def test_help_lists_every_command_and_imports_none() -> None:
    program = (
        "import sys; from shardkit.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'tqdm', 'asyncio'} & set(sys.modules)\n"
        "ours = {m for m in sys.modules if m.startswith('shardkit.')}\n"
        "print(sorted(ours | heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert done.stderr == "['shardkit.cli', 'shardkit.errors', 'shardkit.strict_json']\n"
    for name, entry in COMMANDS.items():
        assert any(line.split() == [name, *entry.help.split()] for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_full_sentences_and_an_example(name: str) -> None:
    command = load(name)
    assert command.help is not None
    text = click.unstyle(run(name, "--help").stdout)
    assert run(name, "-h").stdout == text
    assert f"Example:\n    shardkit {name} " in text or f"Example:\n    shardkit {name}\n" in text
    assert command.help.partition("\n")[0] == COMMANDS[name].help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help is not None
            assert parameter.help.endswith("."), parameter.name


def test_version_is_the_package_s() -> None:
    assert run("--version").stdout == f"shardkit, version {__version__}\n"


# What is said when it works


def test_a_split_says_what_it_wrote_and_what_to_type_next(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "two words"
    result = run("split", source, out, "--tp", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"Wrote {out}: 3 ranks" in result.stdout
    assert "GB/s" in result.stdout
    assert "Replicated   1.66 kB stored more than once (1,664 bytes)" in result.stdout
    assert "Imbalance    1.0854: most on rank 0" in result.stdout
    assert result.stdout.endswith(
        "Next:\n"
        f"  shardkit verify '{out}' --against {source}\n"
        f"  shardkit generate '{out}' \"Once upon a time\"\n"
        "  torchrun --nproc-per-node 3 your_server.py\n"
    )


def test_split_reshard_and_merge_give_the_source_s_bytes_back(
    source: Path, shards: Path, tmp_path: Path
) -> None:
    resharded = run("reshard", shards, tmp_path / "four", "--tp", "4")
    merged = run("merge", tmp_path / "four", tmp_path / "again")
    assert [(r.exit_code, r.stderr) for r in (resharded, merged)] == [(0, "")] * 2
    assert merged.stdout.startswith(f"Wrote {tmp_path / 'again'}: 2 weights files, ")
    before, after = contents(source), contents(tmp_path / "again")
    index = "model.safetensors.index.json"
    assert json.loads(after.pop(index))["weight_map"] == json.loads(before.pop(index))["weight_map"]
    assert after == before


def test_json_is_the_whole_of_stdout_and_says_what_was_written(
    source: Path, tmp_path: Path
) -> None:
    split = json.loads(run("split", source, tmp_path / "out", "--tp", "2", "--json").stdout)
    for file in split["files"]:
        assert (tmp_path / "out" / file["name"]).stat().st_size == file["size"]
    assert split["bytes_written"] == sum(file["size"] for file in split["files"])
    stored = sum(rank["bytes"] for rank in split["ranks"])
    assert stored == split["bytes"] + split["replicated_bytes"]
    assert split["bytes"] == sum(spec.nbytes for spec in small_specs())
    reshard = run("reshard", tmp_path / "out", tmp_path / "four", "--tp", "4", "--json")
    assert json.loads(reshard.stdout)["tp_size"] == 4
    merge = run("merge", tmp_path / "out", tmp_path / "again", "--json")
    assert json.loads(merge.stdout)["bytes"] == split["bytes"]


def test_a_dry_run_says_what_a_split_would_hold_and_writes_nothing(
    source: Path, tmp_path: Path
) -> None:
    text = run("split", source, tmp_path / "out", "--tp", "2", "--dry-run")
    assert (text.exit_code, text.stderr) == (0, "")
    assert text.stdout.startswith(f"Would write {tmp_path / 'out'}: 2 ranks, ")
    dry = json.loads(
        run("split", source, tmp_path / "out", "--tp", "2", "--dry-run", "--json").stdout
    )
    assert sorted(tmp_path.iterdir()) == [source]
    real = json.loads(run("split", source, tmp_path / "out", "--tp", "2", "--json").stdout)
    assert dry["ranks"] == real["ranks"]


def test_a_shard_folder_is_inspected_file_by_file(shards: Path) -> None:
    found = json.loads(run("inspect", shards, "--json").stdout)
    assert (found["kind"], found["tp_size"], found["recipe"]["name"]) == ("shards", 2, "llama")
    assert found["source"]["tensors"] == len(small_specs())
    assert [rank["state"] for rank in found["ranks"]] == ["present", "present"]
    first, second = (shards / rank["file"] for rank in found["ranks"])
    first.unlink()
    os.truncate(second, 100)
    again = json.loads(run("inspect", shards, "--json").stdout)
    assert [rank["state"] for rank in again["ranks"]] == ["missing", "wrong size"]
    text = run("inspect", shards).stdout
    assert found["split_id"] in text
    assert all(rank["sha256"] in text for rank in found["ranks"])
    assert "MISSING" in text


def test_a_checkpoint_folder_is_inspected_for_what_could_serve_it(source: Path) -> None:
    found = json.loads(run("inspect", source, "--json").stdout)
    assert (found["kind"], found["model_type"], found["recipe"]) == ("checkpoint", "llama", "llama")
    assert found["bytes_by_dtype"] == {"F32": sum(spec.nbytes for spec in small_specs())}
    assert found["possible_tp"]["largest"] == 4
    assert found["possible_tp"]["blocked_by"] == "model.layers.0.self_attn.q_proj.weight"


def test_a_checkpoint_that_no_recipe_serves_can_be_inspected(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model", {"model_type": "unheard_of"})
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert (found["recipe"], found["possible_tp"]) == (None, None)
    assert "no recipe for it" in found["reason"]
    assert "Recipe    none: model_type 'unheard_of'" in run("inspect", folder).stdout


def test_an_encoder_is_not_offered_to_generate(minilm: Path, tmp_path: Path) -> None:
    result = run("split", minilm, tmp_path / "out", "--tp", "2")
    assert "shardkit verify" in result.stdout
    assert "shardkit generate" not in result.stdout


# Terminals and signals


def test_progress_is_a_bar_on_a_terminal_s_stderr_only(source: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.run(
        [*SHARDKIT, "split", source, tmp_path / "out", "--tp", "2"],
        stdout=subprocess.PIPE, stderr=theirs, env=environment(), check=True,
    )  # fmt: skip
    os.set_blocking(ours, False)
    bar = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert bar.startswith("\rsplit: ")
    assert "B/s" in bar
    assert bar.endswith("\r")  # cleared when it is done
    assert "\x1b[3" not in bar  # no colour
    assert b"split: " not in done.stdout


def test_an_interrupted_split_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    big = {"hidden_size": 1024, "vocab_size": 1 << 17}
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG | big))
    spec = TensorSpec("lm_head.weight", "F32", (1 << 17, 1024))
    sparse_file(folder / "model.safetensors", [spec])
    process = subprocess.Popen(
        [*SHARDKIT, "split", folder, tmp_path / "out", "--tp", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        # Where the tests run in the background, their children would inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(tmp_path.glob(".out.*/rank-*")):
        assert process.poll() is None, "it was done before it could be interrupted"
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "Error: interrupted\n")
    assert sorted(tmp_path.iterdir()) == [folder]
