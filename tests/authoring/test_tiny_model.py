"""What a draft is made from: the class that takes a config, and messages that are true."""

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from shardkit.authoring.draft.failure import DraftError
from shardkit.authoring.draft.tiny_model import choose_class_name, make_tiny_model

# A checkpoint of the text model alone may still name the class of the model that also sees.
TEXT = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe_text",
    "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "vocab_size": 320,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 64, "vocab_size": 100,
}  # fmt: skip


def write_config(folder: Path, config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TEXT, "Qwen3_5MoeForCausalLM"),
        ({**LLAMA, "architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering"),
        ({**LLAMA, "architectures": ["AutoModel"]}, "LlamaForCausalLM"),
        ({**LLAMA, "architectures": ["LlamaTokenizer"]}, "LlamaForCausalLM"),
    ],
)
def test_the_class_that_a_config_names_must_take_it(
    config: dict[str, object], expected: str, tmp_path: Path
) -> None:
    made = CONFIG_MAPPING[str(config["model_type"])].from_dict(config)
    assert choose_class_name(made, config) == expected
    tiny = make_tiny_model(write_config(tmp_path, config), tmp_path / "tiny")
    assert tiny.class_name == expected
    assert (tiny.folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [({"model_type": "nothing_yet"}, "has no model_type 'nothing_yet'"), ({}, "no model_type")],
)
def test_a_folder_with_a_config_is_not_called_one_without(
    config: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = write_config(tmp_path, {**config, "hidden_size": 64})
    with pytest.raises(DraftError) as caught:
        make_tiny_model(folder, tmp_path / "tiny")
    assert str(caught.value).startswith(f"{folder}/config.json: ")
    assert words in str(caught.value)
