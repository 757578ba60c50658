"""Which tensors of a checkpoint are planned as loaded, and what that changes."""

from typing import Any

import pytest

from shardkit.errors import CheckpointError
from shardkit.planning import Plan, make_plan, summarize_plan
from shardkit.planning.loading import list_extra_layers
from shardkit.recipe import find_recipe
from tests.helpers.synthetic_checkpoints import specs_of

BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "bert.embeddings.word_embeddings.weight": (40, 16),
    "bert.encoder.layer.0.attention.self.query.weight": (16, 16),
    "bert.pooler.dense.weight": (16, 16),
    "cls.predictions.bias": (40,),
    "cls.predictions.transform.dense.weight": (16, 16),
    "cls.seq_relationship.weight": (2, 16),
}
EXTRA = ["bert.pooler.dense.weight", "cls.seq_relationship.weight"]


def plan(shapes: dict[str, tuple[int, ...]] = SHAPES, **fields: Any) -> Plan:
    config = {**BERT, **fields}
    return make_plan(specs_of(shapes), find_recipe(config), config, 2)


def test_what_the_class_has_no_place_for_is_stored_once_and_not_loaded() -> None:
    placements = {p.spec.name: p for p in plan().placements}
    assert sorted(name for name, p in placements.items() if not p.is_loaded) == EXTRA
    first, second = plan().mesh.ranks()
    for name in EXTRA:
        assert placements[name].shard_spec(first) == placements[name].spec
        assert placements[name].shard_spec(second) is None


def test_what_is_not_loaded_takes_no_memory() -> None:
    summary = summarize_plan(plan())
    assert summary.stored_bytes[0] - summary.loaded_bytes[0] == 2 * (16 * 16 + 2 * 16)
    assert summary.stored_bytes[1] == summary.loaded_bytes[1]


@pytest.mark.parametrize(
    ("architectures", "model_class"),
    [(["BertForMaskedLM"], ""), (["BertOfLongAgo"], "BertForPreTraining")],
)
def test_a_plan_notes_the_class_that_config_json_does_not_name(
    architectures: list[str], model_class: str
) -> None:
    assert plan(architectures=architectures).model_class == model_class


def test_a_class_whose_head_is_not_there_is_refused_with_the_one_that_is_whole() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if not name.startswith("cls.")}
    with pytest.raises(CheckpointError, match=r"names BertForMaskedLM.*those of BertModel"):
        plan(shapes)


def test_layers_after_the_last_are_cut_as_ever_and_not_loaded() -> None:
    extra = "bert.encoder.layer.1.attention.self.query.weight"
    placements = {
        p.spec.name: p for p in plan({**SHAPES, extra: (16, 16)}, num_hidden_layers=1).placements
    }
    assert not placements[extra].is_loaded
    assert placements[extra].dim == 0


@pytest.mark.parametrize(
    "config",
    [{}, {"num_hidden_layers": 2}, {"num_hidden_layers": 1, "encoder_layers": 1}],
)
def test_no_layer_is_extra_if_the_config_does_not_say_so(config: dict[str, Any]) -> None:
    assert list_extra_layers(config, ["layers.0.w", "layers.1.w"]) == []
