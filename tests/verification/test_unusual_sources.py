"""Sources that verification must run, or refuse in one line: few positions, stale fields."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    MarianConfig,
    MarianModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import save_random_model
from shardkit.errors import CheckpointError, RecipeError
from shardkit.runtime.config import read_source_config
from shardkit.verification.dummy_inputs import count_positions, count_steps, make_inputs
from shardkit.verification.models import ReferenceModel, ShardedModel
from shardkit.verification.numerics import check_numerics
from tests.helpers.split_helpers import split_folder

SMALL = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 2}
STALE: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "an unknown method": {"quant_method": "mine", "bits": 4},
}


def gpt2(positions: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=24, n_head=3, n_layer=1, n_positions=positions, **SMALL)
    )


def roberta(positions: int) -> RobertaForCausalLM:
    return RobertaForCausalLM(
        RobertaConfig(
            hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=32,
            max_position_embeddings=positions, pad_token_id=1, is_decoder=True, **SMALL,
        )
    )  # fmt: skip


def quantized(folder: Path, stale: dict[str, Any]) -> Path:
    """A plain checkpoint whose config says that it is quantized."""
    save_random_model(GPT2LMHeadModel, gpt2(64).config, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stale}))
    return folder


@pytest.mark.parametrize(("make", "first"), [(gpt2, 0), (roberta, 2)])
@pytest.mark.parametrize("positions", [3, 11, 20, 64])
def test_inputs_and_what_is_generated_fit_into_the_positions(
    make: Any, first: int, positions: int
) -> None:
    model = make(positions).eval()
    inputs = make_inputs(model)
    steps = count_steps(model, inputs)
    length = inputs["input_ids"].shape[1]
    assert count_positions(model) == min(positions - first, 36)
    assert length + steps - 1 <= positions - first
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    assert model.generate(**inputs, **options).shape[1] == length + steps
    if positions == 64:
        assert (length, steps) == (24, 12)


def test_a_model_of_few_positions_is_verified(rank_pool: RankPool, tmp_path: Path) -> None:
    source = save_random_model(GPT2LMHeadModel, gpt2(11).config, tmp_path / "source")
    manifest = split_folder(source, tmp_path / "shards", 2)
    check = check_numerics(tmp_path / "shards", manifest, source, ShardedModel(rank_pool.of(2)))
    assert (check.verdict, check.numbers["greedy"]) == ("passed", "equal")


@pytest.mark.parametrize("method", STALE)
def test_what_a_config_says_of_quantization_is_left_out_for_plain_weights(
    method: str, tmp_path: Path
) -> None:
    source = quantized(tmp_path, STALE[method])
    assert getattr(read_source_config(source), "quantization_config", None) is None
    assert ReferenceModel(source, torch.float32).model.dtype == torch.float32


def test_what_transformers_cannot_load_is_one_line_that_names_quantization_config(
    tmp_path: Path,
) -> None:
    source = quantized(tmp_path, STALE["fp8"])
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.packed"] = torch.zeros(4, 4, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        ReferenceModel(source, torch.float32)
    assert "transformers cannot load it" in str(caught.value)
    assert "config.json has quantization_config" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quantization_that_cannot_be_split_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = quantized(tmp_path, STALE["bitsandbytes"])
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.packed"] = torch.zeros(4, 4, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"bitsandbytes: .* split the 16-bit weights"):
        ReferenceModel(source, torch.float32)


def test_a_text_to_classify_has_one_end_and_the_decoder_reads_the_same() -> None:
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers",)}
    config = BartConfig(
        d_model=8, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8,
        decoder_ffn_dim=8, pad_token_id=1, **sizes, **SMALL,
    )  # fmt: skip
    model = BartForSequenceClassification(config).eval()
    inputs = make_inputs(model)
    assert (inputs["input_ids"] == 2).sum(1).tolist() == [1, 1]
    assert model(**inputs).logits.shape == (2, 3)


def test_an_end_outside_of_the_vocabulary_is_no_token_of_a_text() -> None:
    config = GPT2Config(n_embd=24, n_head=3, n_layer=1, **{**SMALL, "eos_token_id": 50})
    ids = make_inputs(GPT2ForSequenceClassification(config))["input_ids"]
    assert int(ids.max()) < 30


def test_a_decoder_reads_ids_whatever_its_config_says() -> None:
    config = MarianConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, is_encoder_decoder=False, pad_token_id=1,
        decoder_start_token_id=1, **SMALL,
    )  # fmt: skip
    assert "decoder_input_ids" in make_inputs(MarianModel(config))
