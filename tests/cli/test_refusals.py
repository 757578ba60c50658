"""Every refusal: one line on stderr, an exit code, and nothing written."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shardkit.tensor import TensorSpec
from tests.helpers.command_line import SHARDKIT, contents, environment, run
from tests.helpers.fixture_checkpoints import small_checkpoint

WEIGHTS = "model-00001-of-00002.safetensors"
Refusal = tuple[list[str], int, str]
EXTRA = TensorSpec("model.layers.0.extra.weight", "F32", (4, 4))


def missing_folder(tmp: Path) -> Refusal:
    return ["split", f"{tmp}/absent/model", f"{tmp}/out", "--tp", "2"], 3, "absent/model"


def missing_config(tmp: Path) -> Refusal:
    (small_checkpoint(tmp / "model") / "config.json").unlink()
    return ["split", f"{tmp}/model", f"{tmp}/out", "--tp", "2"], 3, "config.json"


def missing_index(tmp: Path) -> Refusal:
    model = small_checkpoint(tmp / "model")
    (model / "model.safetensors.index.json").unlink()
    (model / WEIGHTS).rename(model / "weights.safetensors")  # not of a set by its name
    return ["split", f"{tmp}/model", f"{tmp}/out", "--tp", "2"], 3, "2 safetensors files"


def damaged_index(tmp: Path) -> Refusal:
    index = small_checkpoint(tmp / "model") / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes()[:-20])
    return ["split", f"{tmp}/model", f"{tmp}/out", "--tp", "2"], 3, "damaged index"


def missing_weights_file(tmp: Path) -> Refusal:
    (small_checkpoint(tmp / "model") / WEIGHTS).unlink()
    return ["split", f"{tmp}/model", f"{tmp}/out", "--tp", "2"], 3, WEIGHTS


def truncated_weights_file(tmp: Path) -> Refusal:
    os.truncate(small_checkpoint(tmp / "model") / WEIGHTS, 2000)
    return ["split", f"{tmp}/model", f"{tmp}/out", "--tp", "2"], 3, WEIGHTS


def unknown_model_type(tmp: Path) -> Refusal:
    small_checkpoint(tmp / "model", {"model_type": "unheard_of"})
    return ["split", f"{tmp}/model", f"{tmp}/out", "--tp", "2"], 1, "'unheard_of': no recipe"


def tensor_without_a_rule(tmp: Path) -> Refusal:
    small_checkpoint(tmp / "model", extra=[EXTRA])
    return ["split", f"{tmp}/model", f"{tmp}/out", "--tp", "2"], 1, EXTRA.name


def missing_recipe(tmp: Path) -> Refusal:
    model = small_checkpoint(tmp / "model")
    return ["plan", str(model), "--tp", "2", "--recipe", f"{tmp}/no.toml"], 1, "no.toml"


def too_many_ranks(tmp: Path) -> Refusal:
    model = small_checkpoint(tmp / "model")
    return (
        ["split", str(model), f"{tmp}/out", "--tp", "5"], 1,
        "q_proj.weight: 4 heads cannot be divided over tp_size 5;",
    )  # fmt: skip


def too_many_ranks_for_a_reshard(tmp: Path) -> Refusal:
    make_shards(tmp)
    return ["reshard", f"{tmp}/shards", f"{tmp}/out", "--tp", "5"], 1, "tp_size 1 to 4"


def existing_output(tmp: Path) -> Refusal:
    model = small_checkpoint(tmp / "model")
    (tmp / "out").mkdir()
    return ["split", str(model), f"{tmp}/out", "--tp", "2"], 5, "out: exists"


def existing_output_of_a_dry_run(tmp: Path) -> Refusal:
    arguments, code, text = existing_output(tmp)
    return [*arguments, "--dry-run"], code, text


def missing_parent_of_the_output(tmp: Path) -> Refusal:
    model = small_checkpoint(tmp / "model")
    return ["split", str(model), f"{tmp}/none/out", "--tp", "2"], 5, "none: no such folder"


def split_of_shards(tmp: Path) -> Refusal:
    make_shards(tmp)
    return ["split", f"{tmp}/shards", f"{tmp}/out", "--tp", "4"], 3, "use `shardkit reshard`"


def merge_of_an_unsharded_folder(tmp: Path) -> Refusal:
    model = small_checkpoint(tmp / "model")
    return ["merge", str(model), f"{tmp}/out"], 3, "no manifest.json"


def truncated_shard(tmp: Path) -> Refusal:
    path = make_shards(tmp) / "rank-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return ["merge", f"{tmp}/shards", f"{tmp}/out"], 3, f"{path.name}: truncated"


def missing_shard(tmp: Path) -> Refusal:
    (make_shards(tmp) / "rank-00001-of-00002.safetensors").unlink()
    return ["reshard", f"{tmp}/shards", f"{tmp}/out", "--tp", "4"], 3, "rank 1"


def flipped_bit(tmp: Path) -> Refusal:
    path = make_shards(tmp) / "rank-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return ["merge", f"{tmp}/shards", f"{tmp}/out"], 4, f"{path.name}: rank 1: "


def inspection_of_nothing(tmp: Path) -> Refusal:
    return ["inspect", f"{tmp}/absent"], 3, "absent: no such folder"


def make_shards(tmp: Path) -> Path:
    assert run("split", small_checkpoint(tmp / "model"), tmp / "shards", "--tp", "2").exit_code == 0
    return tmp / "shards"


REFUSALS = [
    missing_folder, missing_config, missing_index, damaged_index, missing_weights_file,
    truncated_weights_file, unknown_model_type, tensor_without_a_rule, missing_recipe,
    too_many_ranks, too_many_ranks_for_a_reshard, existing_output, existing_output_of_a_dry_run,
    missing_parent_of_the_output, split_of_shards, merge_of_an_unsharded_folder, truncated_shard,
    missing_shard, flipped_bit, inspection_of_nothing,
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_one_line_an_exit_code_and_nothing_written(
    refusal: Any, tmp_path: Path
) -> None:
    arguments, exit_code, text = refusal(tmp_path)
    before = contents(tmp_path), sorted(tmp_path.iterdir())
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert text in result.stderr
    assert (contents(tmp_path), sorted(tmp_path.iterdir())) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["splat"],
        ["split", "model"],
        ["split", "model", "out"],
        ["split", "model", "out", "--tp", "two"],
        ["split", "model", "out", "--tp", "0"],
        ["plan", "model", "--tp", "2", "--verbose"],
    ],
)
def test_wrong_usage_exits_2_and_points_to_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert "--help" in result.stderr


def test_a_refusal_in_a_real_process_has_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SHARDKIT, "merge", "absent", "out"],
        capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "Error: absent: no such folder\n"


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "line\nfeed \x1b[31m")
    assert result.stderr == f"Error: {tmp_path}/line\\nfeed \\x1b[31m: no such folder\n"


def test_folders_named_in_bytes_that_are_no_text_can_be_split_and_shown(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / os.fsdecode(b"mod\xff\xc3\xa8l"))
    done = subprocess.run(
        [*SHARDKIT, "split", os.fsencode(folder), "out", "--tp", "2"],
        capture_output=True, env=environment(PYTHONIOENCODING="ascii"), cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    shown = subprocess.run(
        [*SHARDKIT, "inspect", "out"],
        capture_output=True, env=environment(PYTHONIOENCODING="ascii"), cwd=tmp_path, check=True,
    )  # fmt: skip
    assert b"mod\\xff\\xe8l: llama" in shown.stdout
