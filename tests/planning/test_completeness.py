"""What headers, config and recipe tell to be missing is refused; what models differ in is not."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shardkit.planning import make_plan
from shardkit.planning.completeness import CERTAIN, find_missing
from shardkit.recipe import Recipe, parse_recipe
from shardkit.tensor import TensorSpec
from tests.helpers.command_line import run
from tests.helpers.fixture_checkpoints import SMALL_CONFIG, small_specs
from tests.helpers.synthetic_checkpoints import write_source

Shapes = dict[str, tuple[int, ...]]
Change = Callable[[Shapes], Shapes]
UP, NORM = "mlp.up_proj.weight", "input_layernorm.weight"
HEAD = "lm_head.weight"
LAYER: Shapes = {
    "norm.weight": (8,), "attn.{}_proj.weight": (8, 8), "attn.o_proj.weight": (8, 8),
    "mlp.{}_proj.weight": (12, 8), "mlp.down_proj.weight": (8, 12), "extra.weight": (8,),
}  # fmt: skip
RECIPE = parse_recipe(
    "any",
    b"""
    model_types = ["any"]
    vocab = ["embed", "lm_head"]
    replicate = ["layers.*.norm", "layers.*.extra"]
    [units]
    heads = "heads"
    ffn = "ffn"
    [column]
    "layers.*.attn.{q,k,v}_proj" = "heads"
    "layers.*.mlp.{gate,up}_proj" = "ffn"
    [row]
    "layers.*.attn.o_proj" = "heads"
    "layers.*.mlp.down_proj" = "ffn"
    """,
)
CONFIG: dict[str, Any] = {"heads": 4, "ffn": 12, "vocab_size": 20}


def model(layers: int, *absent: str) -> Shapes:
    """A model's tensors, without some."""
    shapes: Shapes = {"embed.weight": (20, 8), "lm_head.weight": (20, 8)}
    for at in range(layers):
        for name, shape in LAYER.items():
            words = {"attn.{}": "qkv", "mlp.{}": ("gate", "up")}.get(name[: name.find("_")], ("",))
            shapes |= {f"layers.{at}.{name.format(word)}": shape for word in words}
    assert set(absent) <= shapes.keys()
    return {name: shape for name, shape in shapes.items() if name not in absent}


def missing(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> str:
    recipe: Recipe = RECIPE
    specs = [TensorSpec(name, "F32", shape) for name, shape in shapes.items()]
    plan = make_plan(specs, recipe, CONFIG | config, 1)
    return find_missing(plan, recipe, CONFIG | config)


@pytest.mark.parametrize("layers", [2, 3, CERTAIN])
@pytest.mark.parametrize("at", ["first", "middle", "last"])
@pytest.mark.parametrize("rest", ["mlp.up_proj", "mlp.down_proj", "attn.k_proj", "attn.o_proj"])
def test_a_weight_without_which_its_module_cannot_run_is_named(
    layers: int, at: str, rest: str
) -> None:
    number = {"first": 0, "middle": layers // 2, "last": layers - 1}[at]
    name = f"layers.{number}.{rest}.weight"
    assert missing(model(layers, name)).startswith(f"{name} is not there")


def test_any_weight_of_one_among_many_layers_is_named() -> None:
    name = f"layers.{CERTAIN // 2}.norm.weight"
    assert missing(model(CERTAIN, name)).startswith(f"{name} is not there")


# Whole models: tensors that some layers lack, and what the config says.
WHOLE: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "all alike": (model(3), {}),
    "a first layer without a norm": (model(CERTAIN, "layers.0.norm.weight"), {}),
    "a last layer without a module": (model(3, "layers.2.extra.weight"), {}),
    "a middle layer of few without a module": (model(3, "layers.1.extra.weight"), {}),
    "several layers without": (
        model(6, *(f"layers.{at}.mlp.up_proj.weight" for at in (1, 3))), {},
    ),
    "a last layer that uses another's keys and values": (
        model(3, "layers.2.attn.k_proj.weight", "layers.2.attn.v_proj.weight"), {},
    ),
    "a layer of another type": (
        model(3, "layers.1.attn.v_proj.weight"), {"layer_types": ["a", "b", "a"]},
    ),
    "a layer whose number is listed": (
        model(4, "layers.1.attn.v_proj.weight"), {"text_config": {"plain_layers": [1, 7]}},
    ),
    "a layer of another width": (
        {
            name: (4, 8) if name == "layers.1.attn.k_proj.weight" else shape
            for name, shape in model(3, "layers.1.attn.v_proj.weight").items()
        },
        {},
    ),
    "a vocabulary of its own beside": (model(2) | {"embed.weight": (7, 8)}, {}),
    "a config without a vocabulary": (model(2), {"vocab_size": None}),
    "rows that the class adds": (
        {"embed.weight": (28, 8)}, {"cross_attention_layers": [3]},
    ),
    "further rows that the config counts": (
        {"embed.weight": (26, 8)}, {"additional_vocab_size": 6},
    ),
    "rows for the prompts of each kind": (
        {"embed.weight": (26, 8)}, {"prompt_types": 2, "prompt_length": 3},
    ),
    "tied": (
        model(2, HEAD), {"tie_word_embeddings": True, "architectures": ["AnyForCausalLM"]},
    ),
    "tied by its text": (
        model(2, HEAD),
        {
            "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True},
            "architectures": ["AnyForCausalLM"],
        },
    ),
    "a base model": (
        model(2, HEAD), {"tie_word_embeddings": False, "architectures": ["AnyModel"]},
    ),
    "a class that is not stated": (model(2, HEAD), {"tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_nothing_is_missing_where_models_differ(case: str) -> None:
    shapes, config = WHOLE[case]
    assert missing(shapes, **config) == ""


@pytest.mark.parametrize("size", [17, 23])
def test_a_vocabulary_of_another_length_is_named(size: int) -> None:
    text = missing(model(2), vocab_size=size)
    assert "embed.weight has 20 rows" in text
    assert f"vocab_size is {size}" in text


def test_an_output_layer_that_is_neither_stored_nor_tied_is_named() -> None:
    config = {"tie_word_embeddings": False, "architectures": ["AnyForCausalLM"]}
    text = missing(model(2, HEAD), **config)
    assert text.startswith(f"{HEAD} is not there, though AnyForCausalLM has one")


def test_names_of_a_wrapper_hide_nothing() -> None:
    shapes = model(3, "layers.1.mlp.up_proj.weight")
    text = missing({f"module.{name}": shape for name, shape in shapes.items()})
    assert text.startswith("module.layers.1.mlp.up_proj.weight is not there")


def drop(name: str) -> Change:
    return lambda shapes: {key: shape for key, shape in shapes.items() if key != name}


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (drop(f"model.layers.1.{UP}"), {}, (f"model.layers.1.{UP} is not there",)),
        (lambda s: s | {f"model.layers.1.{UP}": (0,)}, {}, (UP, "shape [0]")),
        (lambda s: s | {f"model.layers.1.{NORM}": (0,)}, {}, (NORM, "shape [0]")),
        (dict, {"vocab_size": 60}, ("63 rows", "vocab_size is 60")),
        (drop(HEAD), {"tie_word_embeddings": False}, (HEAD, "LlamaForCausalLM")),
    ],
    ids=["absent", "empty weight", "empty norm", "rows", "head"],
)
def test_a_checkpoint_that_no_model_can_load_is_refused_and_nothing_written(
    change: Change, config: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    shapes = change({spec.name: spec.shape for spec in small_specs()})
    specs = [TensorSpec(name, "F32", shape) for name, shape in shapes.items()]
    source = write_source(tmp_path / "source", {**SMALL_CONFIG, **config}, specs)
    for command in (("plan", source), ("split", source, tmp_path / "out")):
        result = run(*command, "--tp", "2")
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1
        for word in words:
            assert word in result.stderr
    assert not (tmp_path / "out").exists()
