"""Which class a checkpoint is of, and which of its tensors that class loads."""

from collections.abc import Iterable
from typing import Any

import pytest

from shardkit.recipe import LoadedTensors, find_loaded_tensors
from shardkit.tensor import TensorTable
from tests.helpers.synthetic_checkpoints import specs_of

LAYER = ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"]
POOLER = ["bert.pooler.dense.weight"]
MASKED_LM = ["cls.predictions.bias", "cls.predictions.transform.dense.weight"]
NEXT_SENTENCE = ["cls.seq_relationship.weight"]
PUBLISHED = [*LAYER, *POOLER, *MASKED_LM, *NEXT_SENTENCE]  # as bert-base-uncased has it
LLAMA = [
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight",
]  # fmt: skip


def group(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their pattern, as a plan has them."""
    return TensorTable.of(specs_of(dict.fromkeys(names, ()))).names_by_pattern


def load(names: list[str], model_type: str = "bert", **fields: Any) -> LoadedTensors:
    return find_loaded_tensors({"model_type": model_type, **fields}, group(names))


@pytest.mark.parametrize(
    ("model_class", "unloaded"),
    [
        ("BertForPreTraining", []),
        ("BertForMaskedLM", POOLER + NEXT_SENTENCE),
        ("BertModel", MASKED_LM + NEXT_SENTENCE),
        ("BertForNextSentencePrediction", MASKED_LM),
    ],
)
def test_what_a_class_has_no_place_for_is_not_loaded(model_class: str, unloaded: list[str]) -> None:
    loaded = load(PUBLISHED, architectures=[model_class])
    assert (loaded.model_class, loaded.missing) == (model_class, "")
    assert sorted(loaded.unloaded) == sorted(unloaded)


@pytest.mark.parametrize("stated", [None, [], ["BertForOldPurposes"], "BertModel", [3]])
@pytest.mark.parametrize(
    ("names", "model_class"),
    [
        (PUBLISHED, "BertForPreTraining"),
        ([*LAYER, *MASKED_LM], "BertLMHeadModel"),
        ([*LAYER, *POOLER], "BertModel"),
        ([name.removeprefix("bert.") for name in LAYER + POOLER], "BertModel"),
        ([*LAYER, *POOLER, "classifier.weight"], "BertForSequenceClassification"),
    ],
)
def test_without_a_class_that_transformers_has_the_tensors_decide(
    stated: object, names: list[str], model_class: str
) -> None:
    assert load(names, architectures=stated).model_class == model_class


def test_a_head_that_is_missing_is_named_with_the_class_that_is_whole() -> None:
    loaded = load([*LAYER, *POOLER], architectures=["BertForNextSentencePrediction"])
    assert (loaded.missing, loaded.better_class) == ("cls.seq_relationship", "BertModel")


@pytest.mark.parametrize(
    ("fields", "model_class"),
    [
        ({"tie_word_embeddings": True}, "LlamaForCausalLM"),
        ({"tie_word_embeddings": False}, "LlamaModel"),
        ({}, "LlamaModel"),
    ],
)
def test_a_head_may_be_missing_only_if_it_is_tied(fields: dict[str, Any], model_class: str) -> None:
    assert load(LLAMA, "llama", **fields).model_class == model_class


def test_a_head_that_is_stored_under_one_of_its_names_is_there() -> None:
    parts = ["language_model.model.embed_tokens", "language_model.lm_head", "vision_tower.w"]
    names = [f"{part}.weight" for part in [*parts, "multi_modal_projector.linear_1"]]
    config = {"text_config": {"tie_word_embeddings": False}, "architectures": ["Unknown"]}
    assert load(names, "aria", **config).model_class == "AriaForConditionalGeneration"


@pytest.mark.parametrize(
    ("ties", "text_ties", "model_class"),
    [
        (None, None, "Glm4vModel"),  # whose config ties nothing unless it says so
        (False, True, "Glm4vForConditionalGeneration"),  # older configs say so of the text alone
        (True, None, "Glm4vForConditionalGeneration"),
        (False, False, "Glm4vModel"),
    ],
)
def test_a_head_is_tied_by_the_fields_that_its_class_reads(
    ties: bool | None, text_ties: bool | None, model_class: str
) -> None:
    names = ["model.language_model.norm.weight", "model.visual.merger.proj.weight"]
    tables: list[dict[str, Any]] = [
        {} if value is None else {"tie_word_embeddings": value} for value in (ties, text_ties)
    ]
    config = {**tables[0], "text_config": tables[1]}
    assert load(names, "glm4v", **config).model_class == model_class


def test_a_head_inside_of_a_part_that_all_classes_have_is_missed() -> None:
    parts = ["audio_tower.layer_norm", "language_model.model.norm", "multi_modal_projector.linear"]
    names = [f"{part}.weight" for part in parts]
    assert load(names, "qwen2_audio").model_class == "Qwen2AudioModel"


@pytest.mark.parametrize("model_class", ["HunYuanVLModel", "HunYuanVLForConditionalGeneration"])
@pytest.mark.parametrize(
    "names",
    [
        [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.up_proj.weight",
            "vit.perceive.image_sep",
        ],
        ["language_model.embed_tokens.weight", "vision_tower.layers.0.layer_norm1.weight"],
    ],
)
def test_a_class_loads_what_another_class_stores_under_other_names(
    model_class: str, names: list[str]
) -> None:
    assert not load(names, "hunyuan_vl", architectures=[model_class]).unloaded


def test_old_buffers_tell_nothing_of_what_is_missing() -> None:
    parts = [
        "audio_tower.layer_norm",
        "language_model.model.norm",
        "multi_modal_projector.linear_1",
    ]
    names = [f"{part}.weight" for part in parts]
    buffers = ["pos_emb.inv_freq"]
    assert load([*names, *buffers], "musicflamingo").model_class == "MusicFlamingoModel"


def test_a_tensor_that_no_class_is_known_to_have_may_be_one_of_the_model() -> None:
    loaded = load([*LLAMA, "lm_head.weight", "v_head.weight"], "llama")
    assert (loaded.model_class, loaded.unloaded) == ("LlamaForCausalLM", frozenset())


def test_a_type_that_is_not_known_keeps_what_its_config_says() -> None:
    assert load(LLAMA, "no-such-type", architectures=["X"]) == LoadedTensors()


@pytest.mark.parametrize(
    ("single_rows", "model_class"),
    [
        ([], "BertForSequenceClassification"),
        (["classifier.weight"], "BertForMultipleChoice"),
    ],
)
def test_the_rows_of_a_head_tell_classes_of_the_same_names_apart(
    single_rows: list[str], model_class: str
) -> None:
    names = [*LAYER, *POOLER, "classifier.weight"]
    loaded = find_loaded_tensors({"model_type": "bert"}, group(names), single_rows)
    assert loaded.model_class == model_class


def test_a_class_whose_head_has_one_row_cannot_load_more() -> None:
    """Though it has a place for the pooler, which the other class of that head leaves out."""
    names = [*LAYER, *POOLER, "classifier.weight", "classifier.bias"]
    names = [name.replace("bert.", "mpnet.") for name in names]
    assert load(names, "mpnet").model_class == "MPNetForTokenClassification"
