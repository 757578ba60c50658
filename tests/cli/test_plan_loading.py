"""What `shardkit plan` says of tensors that the model's class does not load."""

import json
from pathlib import Path
from typing import Any

import pytest

from shardkit.tensor import TensorSpec
from tests.helpers.command_line import run
from tests.helpers.fixture_checkpoints import sparse_file

EMBEDDINGS, ENCODER = "bert.embeddings", "bert.encoder.layer.0"
SHAPES: dict[str, tuple[int, ...]] = {
    f"{EMBEDDINGS}.word_embeddings.weight": (40, 16),
    f"{EMBEDDINGS}.position_embeddings.weight": (32, 16),
    **{f"{ENCODER}.attention.self.{part}.weight": (16, 16) for part in ("query", "key", "value")},
    f"{ENCODER}.attention.output.dense.weight": (16, 16),
    f"{ENCODER}.intermediate.dense.weight": (32, 16),
    f"{ENCODER}.output.dense.weight": (16, 32),
    "bert.pooler.dense.weight": (16, 16),
    "cls.predictions.bias": (40,),
    "cls.predictions.transform.dense.weight": (16, 16),
    "cls.seq_relationship.weight": (2, 16),
}
NOT_LOADED = ["bert.pooler.dense.weight", "cls.seq_relationship.weight"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT with both heads of its pretraining and a pooler, and a hole for its weights."""
    specs = (TensorSpec(name, "F32", shape) for name, shape in SHAPES.items())
    sparse_file(tmp_path / "model.safetensors", specs)
    write_config(tmp_path, "BertForMaskedLM")
    return tmp_path


def write_config(folder: Path, model_class: str) -> None:
    config: dict[str, Any] = {
        "model_type": "bert", "architectures": [model_class], "hidden_size": 16, "vocab_size": 40,
        "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1,
        "max_position_embeddings": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_what_the_class_does_not_load_is_listed(folder: Path) -> None:
    planned = json.loads(run("plan", folder, "--tp", "2", "--json").stdout)
    assert (planned["not_loaded"], planned["model_class"]) == (NOT_LOADED, None)
    text = run("plan", folder, "--tp", "2").stdout
    assert "Not loaded   2 tensors that the model's class has no place for" in text
    assert f"kept for a merge: {NOT_LOADED[0]}, ..." in text


def test_the_class_is_said_if_config_json_names_none_that_exists(folder: Path) -> None:
    write_config(folder, "BertOfLongAgo")
    planned = json.loads(run("plan", folder, "--tp", "2", "--json").stdout)
    assert (planned["not_loaded"], planned["model_class"]) == ([], "BertForPreTraining")
    text = run("plan", folder, "--tp", "2").stdout
    assert (
        "Class        BertForPreTraining, which the tensors fit; config.json names none\n" in text
    )


@pytest.mark.parametrize("command", ["plan", "split"])
def test_a_class_whose_head_is_missing_is_refused_before_anything_is_written(
    command: str, folder: Path, tmp_path: Path
) -> None:
    write_config(folder, "BertForTokenClassification")
    out = [tmp_path / "out"] if command == "split" else []
    result = run(command, folder, *out, "--tp", "2")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "there is no tensor of 'classifier'" in result.stderr
    assert "those of BertForPreTraining" in result.stderr
    assert not (tmp_path / "out").exists()
