"""A tensor without a rule: what it is, and a way out that is tried and works."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from shardkit.planning.unknown_tensors import describe_unknown_tensor
from shardkit.recipe.catalog import find_recipe_folder
from shardkit.recipe.parse import load_recipe
from shardkit.tensor import TensorSpec
from tests.helpers.command_line import run
from tests.helpers.fixture_checkpoints import SMALL_CONFIG, small_specs
from tests.helpers.synthetic_checkpoints import write_source

HEAD = [
    TensorSpec("v_head.summary.weight", "F32", (1, 16)),
    TensorSpec("v_head.summary.bias", "F32", (1,)),
]


def renamed(change: Callable[[str], str]) -> list[TensorSpec]:
    return [TensorSpec(change(spec.name), spec.dtype, spec.shape) for spec in small_specs()]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_way_out_for_a_value_head_is_named_and_works(prefix: str, tmp_path: Path) -> None:
    specs = [
        TensorSpec(prefix + spec.name, spec.dtype, spec.shape) for spec in [*small_specs(), *HEAD]
    ]
    source = write_source(tmp_path / "source", SMALL_CONFIG, specs)
    refused = run("split", source, tmp_path / "out", "--tp", "2")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    command = "shardkit recipes show llama > my.toml"
    for words in ('value head, add "v_head.summary" to `ignore`', command, "--recipe my.toml"):
        assert words in refused.stderr
    mine = tmp_path / "my.toml"
    text = run(*shlex.split(command)[1:4]).stdout
    mine.write_text(text.replace("ignore = [", 'ignore = ["v_head.summary", ', 1))
    split = run("split", source, tmp_path / "out", "--tp", "2", "--recipe", mine)
    assert split.exit_code == 0, split.stderr


def test_of_a_recipe_of_one_s_own_no_copy_is_advised(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text((find_recipe_folder() / "llama.toml").read_text() + "\n# mine\n")
    source = write_source(tmp_path / "source", SMALL_CONFIG, [*small_specs(), *HEAD])
    refused = run("plan", source, "--tp", "2", "--recipe", mine)
    assert refused.exit_code == 1
    assert "to `ignore` in recipe 'mine'" in refused.stderr
    assert "recipes show" not in refused.stderr


def test_a_tensor_inside_the_model_may_need_a_rule(tmp_path: Path) -> None:
    inside = TensorSpec("model.layers.1.self_attn.gate.weight", "F32", (4, 16))
    source = write_source(tmp_path / "source", SMALL_CONFIG, [*small_specs(), inside])
    refused = run("plan", source, "--tp", "2")
    assert refused.exit_code == 1
    for words in (
        inside.name, "give it a rule if transformers' class has it",
        '"model.layers.*.self_attn.gate" to `ignore`',
    ):  # fmt: skip
        assert words in refused.stderr


def base_layer(name: str) -> str:
    return "base_model.model." + name.replace("q_proj.weight", "q_proj.base_layer.weight")


def own_copies(name: str) -> str:
    return name.replace("model.norm.weight", "model._fp32_params.weight")


def inner(name: str) -> str:
    return name.replace("layers.1.", "layers.1._orig_mod.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (base_layer, ("q_proj.base_layer.weight", "adapter", "merge_and_unload")),
        (own_copies, ("_fp32_params", "trainer", "save_pretrained")),
        (inner, ("_orig_mod", "wrapper around some modules", "rename")),
    ],
)
def test_what_is_no_plain_model_is_refused_for_what_it_is(
    change: Callable[[str], str], words: tuple[str, ...], tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source", SMALL_CONFIG, renamed(change))
    refused = run("split", source, tmp_path / "out", "--tp", "2")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    for word in words:
        assert word in refused.stderr
    assert "rule" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_names_with_a_wrapper_s_prefix_is_refused_for_it(tmp_path: Path) -> None:
    text = (find_recipe_folder() / "llama.toml").read_text()
    (tmp_path / "my.toml").write_text(text.replace('"lm_head', '"_orig_mod.lm_head'))
    source = write_source(tmp_path / "source", SMALL_CONFIG, renamed(lambda n: f"_orig_mod.{n}"))
    refused = run("plan", source, "--tp", "2", "--recipe", tmp_path / "my.toml")
    assert refused.exit_code == 1
    assert "lm_head.weight: no rule" in refused.stderr
    assert "recipes leave out the wrapper's '_orig_mod.'" in refused.stderr


def test_a_name_that_a_rule_knows_is_no_mark_of_a_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text('model_types = ["known"]\nreplicate = ["a._fp32_params.d"]\n')
    text = describe_unknown_tensor(["a._fp32_params.d", "b.weight"], load_recipe(path))
    assert text.startswith("b.weight: no rule")
