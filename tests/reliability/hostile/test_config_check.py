"""Which configs agree with their tensors: every sample's does, and none that lacks a layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardkit.checkpoint import Checkpoint, open_checkpoint
from shardkit.checkpoint.config_check import MANY, check_config, group_layers
from shardkit.errors import CheckpointError
from shardkit.recipe.catalog import find_recipe_folder
from shardkit.tensor import TensorSpec
from tests.helpers.command_line import run
from tests.helpers.fixture_checkpoints import SMALL_CONFIG, small_specs, sparse_checkpoint
from tests.helpers.real_inputs import shared
from tests.helpers.synthetic_checkpoints import BART, T5, llama, mixtral, write_source

Names = Mapping[str, tuple[int, ...]]


def layers(count: int, prefix: str = "model.layers") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{at}.{part}.weight": (8, 8) for at in range(count) for part in "abc"}


def check(config: dict[str, Any], shapes: Names, dtype: str = "BF16") -> None:
    check_config(config, [TensorSpec(n, dtype, s) for n, s in shapes.items()], "model")


VISION = layers(3, "vision_tower.encoder.layers")
# A config, and tensors that agree with it.
AGREE: dict[str, tuple[dict[str, Any], Names]] = {
    "no count": ({}, layers(2)),
    "as many": ({"num_hidden_layers": 2}, layers(2)),
    "no layers at all": ({"num_hidden_layers": 2}, {"rnn.weight_ih_l0": (8, 8)}),
    "a layer that predicts further": (
        {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, layers(3),
    ),
    "a list of gaps beside": (
        {"num_hidden_layers": 2}, layers(2) | {"head.0.weight": (8,), "head.2.weight": (8,)},
    ),
    "one layer shared by all": (
        {"num_hidden_layers": 12, "num_hidden_groups": 1}, layers(1, "albert_layer_groups"),
    ),
    "an encoder alone": (
        {"encoder_layers": 2, "decoder_layers": 3}, layers(2, "model.encoder.layers"),
    ),
    "a decoder alone": (
        {"encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 2},
        layers(3, "model.decoder.layers"),
    ),
    "T5": ({"num_layers": 1, "num_decoder_layers": 1}, T5),
    "BART": ({"encoder_layers": 1, "decoder_layers": 1, "d_model": 32}, BART),
    "a tower that sees": (
        {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}},
        layers(2, "language_model.model.layers") | VISION,
    ),
    "a tower alone": (
        {
            "text_config": {"num_hidden_layers": 2, "hidden_size": 16},
            "vision_config": {"num_hidden_layers": 3, "hidden_size": 8},
        },
        VISION,
    ),
    "a tower of more tensors, its config under an unusual name": (
        {"num_hidden_layers": 2, "sight_config": {"layers": 5}},
        layers(2) | layers(5, "sight.blocks"),
    ),
    "layers that are listed": ({"layers_block_type": ["a", "b"]}, layers(2)),
    "experts": ({"num_hidden_layers": 1, "num_local_experts": 2}, mixtral()),
    "numbers that size nothing": ({"rope_theta": 10**9, "num_params": 10**12}, layers(1)),
    "latent attention without positions": ({"head_dim": 0, "qk_rope_head_dim": 0}, layers(1)),
    "positions of a long context": ({"max_position_embeddings": 10_485_760}, layers(1)),
}  # fmt: skip
# A config, tensors that contradict it, and words of the error.
CONTRADICT: dict[str, tuple[dict[str, Any], Names, tuple[str, ...]]] = {
    "one less in the decoder": (
        {"encoder_layers": 2, "decoder_layers": 2},
        layers(2, "model.encoder.layers") | layers(1, "model.decoder.layers"),
        ("decoder_layers is 2", "model.decoder.layers.1"),
    ),
    "one less in the encoder": (
        {"num_layers": 2, "num_decoder_layers": 1},
        layers(1, "encoder.block") | layers(1, "decoder.block"),
        ("num_layers is 2", "encoder.block.1"),
    ),
    "a hole": (
        {"num_hidden_layers": 3},
        {name: shape for name, shape in layers(3).items() if ".1." not in name},
        ("num_hidden_layers is 3", "model.layers.1"),
    ),
    "the tower's count for the text": (
        {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}},
        layers(2, "language_model.model.layers") | VISION,
        ("num_hidden_layers is 3", "language_model.model.layers.2"),
    ),
    "a layer less that sees": (
        {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 4}},
        layers(2, "language_model.model.layers") | VISION,
        ("depth is 4", "vision_tower.encoder.layers.3"),
    ),
    "two that predict further, of one": (
        {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, layers(4), ("model.layers.3",),
    ),
    "a layer less, beside a list of few tensors": (
        {"num_hidden_layers": 3}, layers(2) | {f"head.{at}.weight": (8,) for at in range(3)},
        ("model.layers.2",),
    ),
    "a layer less beside an unusual tower": (
        {"num_hidden_layers": 4}, layers(3) | layers(5, "sight.blocks"),
        ("num_hidden_layers is 4",),
    ),
    "heads of no width": ({"head_dim": 0}, layers(1), ("head_dim is 0",)),
    "a listed layer less": ({"layer_types": ["a"] * 3}, layers(2), ("layer_types is 3",)),
}  # fmt: skip


@pytest.mark.parametrize("name", AGREE)
def test_a_config_that_its_tensors_bear_out_is_accepted(name: str) -> None:
    check(*AGREE[name])


@pytest.mark.parametrize("name", CONTRADICT)
def test_a_config_that_its_tensors_contradict_is_refused(name: str) -> None:
    config, shapes, words = CONTRADICT[name]
    with pytest.raises(CheckpointError) as caught:
        check(config, shapes)
    for word in ("model/config.json", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_integers_in_place_of_weights_need_a_config_that_says_so(key: str) -> None:
    with pytest.raises(CheckpointError, match=r"has no quantization_config, but .* is I8"):
        check({}, llama(), "I8")
    check({key: {"quant_method": "some"}}, llama(), "I8")
    check({"text_config": {key: {"quant_method": "some"}}}, llama(), "I8")


def test_integers_that_are_no_weights_need_none() -> None:
    shapes = {"embeddings.position_ids": (1, 9), "attn.bias": (1, 1, 9, 9), "mask": (9,)}
    check({}, shapes, "I64")


def test_an_unknown_type_has_no_recipe_and_is_not_called_damaged(tmp_path: Path) -> None:
    config = {**SMALL_CONFIG, "model_type": "unheard_of", "num_hidden_layers": 7}
    source = write_source(tmp_path / "source", config, small_specs())
    refused = run("plan", source, "--tp", "2")
    assert refused.exit_code == 1
    assert "'unheard_of': no recipe" in refused.stderr
    assert run("plan", source, "--tp", "2", "--recipe", "llama").exit_code == 3


def test_an_unknown_type_with_an_unusual_tower_is_split_by_a_recipe_of_one_s_own(
    tmp_path: Path,
) -> None:
    config = {**SMALL_CONFIG, "model_type": "unheard_of", "sight": {"layers": 9}}
    tower = [TensorSpec(f"sight.blocks.{at}.norm{n}.weight", "F32", (16,)) for at in range(9)
             for n in range(9)]  # fmt: skip
    source = write_source(tmp_path / "source", config, [*small_specs(), *tower])
    text = (find_recipe_folder() / "llama.toml").read_text()
    mine = tmp_path / "mine.toml"
    mine.write_text(
        text.replace("replicate = [", f'replicate = ["sight.blocks.*.norm{{{NINE}}}", ')
    )
    assert run("plan", source, "--tp", "2").exit_code == 1
    split = run("split", source, tmp_path / "out", "--tp", "2", "--recipe", mine)
    assert split.exit_code == 0, split.stderr


NINE = ",".join(map(str, range(9)))
REAL = (
    "llama-3.1-70b-reflection", "mixtral-8x22b-wizardlm2", "falcon-40b",
    "gpt-neox-redpajama-incite-7b", "bloom-176b",
)  # fmt: skip


@pytest.mark.parametrize("fixture", REAL)
def test_a_real_model_agrees_and_one_without_a_layer_does_not(fixture: str, tmp_path: Path) -> None:
    folder = sparse_checkpoint(shared(f"fixtures/{fixture}"), tmp_path / "model")
    with open_checkpoint(str(folder)) as checkpoint:
        specs, config = checkpoint.specs(), checkpoint.config
    lists = group_layers(spec.name for spec in specs)
    name = max(lists, key=lambda name: sum(lists[name].values()))
    for at in (0, max(lists[name]) // 2, max(lists[name])):
        left = [spec for spec in specs if not spec.name.startswith(f"{name}.{at}.")]
        with pytest.raises(CheckpointError, match=rf"no tensor of '{name}.{at}'"):
            check_config(config, left, folder)


@pytest.mark.slow
def test_every_sample_agrees_and_none_without_a_layer_does(tmp_path: Path) -> None:
    from shardkit.authoring.samples import list_samples, make_sample

    tried = 0
    for sample in list_samples():
        folder = make_sample(sample, tmp_path / sample.name)
        with Checkpoint(folder) as checkpoint:
            checkpoint.check_config()
            specs, config = checkpoint.specs(), checkpoint.config
        lists = group_layers(spec.name for spec in specs)
        if not lists:
            continue  # an LSTM has weights of its layers, and no modules
        name = max(lists, key=lambda name: sum(lists[name].values()))
        for at in {0, max(lists[name])}:
            left = [spec for spec in specs if not spec.name.startswith(f"{name}.{at}.")]
            if group_layers(spec.name for spec in left):
                with pytest.raises(CheckpointError):
                    check_config(config, left, sample.name)
                tried += 1
    assert tried > 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers", f"to {MANY}")),
        ({"num_labels": 10**9}, ("num_labels",)),
        ({"text_config": {"_attn_implementation": "org/kernel"}}, ("cannot build a model",)),
        ({"model_type": "unheard_of"}, ("cannot build a model",)),
        ({"hidden_size": "16"}, ("hidden_size",)),
    ],
)  # fmt: skip
def test_a_recipe_is_not_checked_on_a_config_that_is_unsafe_to_build(
    change: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG | change))
    result = run("recipes", "check", "llama", "--config", tmp_path)
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.usefixtures("recipe_check_ranks")
def test_a_kernel_that_a_config_names_is_left_out_of_what_a_recipe_is_checked_on(
    tmp_path: Path,
) -> None:
    config = SMALL_CONFIG | {"attn_implementation": "org/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("recipes", "check", "llama", "--config", tmp_path).exit_code == 0


def test_what_makes_transformers_run_or_fetch_is_left_out_however_deep() -> None:
    from shardkit.runtime.config import remove_active_fields

    config = {
        "auto_map": {"AutoConfig": "a.B"}, "hidden_size": 8, "conv_kernel": [3],
        "text_config": {"_attn_implementation": "org/kernel", "layers": [{"auto_map": 1, "n": 2}]},
        "transformers_weights": "../x", "trust_remote_code": True,
    }  # fmt: skip
    assert remove_active_fields(config) == {
        "hidden_size": 8, "conv_kernel": [3], "text_config": {"layers": [{"n": 2}]}
    }  # fmt: skip
