"""Recipe files: read strictly, and the bundled ones sound."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from shardkit.errors import RecipeError
from shardkit.layout import STYLES
from shardkit.layout.axis import Term
from shardkit.recipe.catalog import find_recipe, list_recipe_files
from shardkit.recipe.parse import load_recipe
from shardkit.recipe.patterns import compile_module_pattern, compile_tensor_pattern
from shardkit.recipe.recipe import Recipe, Rule

SAMPLES = Path(__file__).parent / "samples"
FAULTS = {
    "misspelled-key": "unknown keys: replicat",
    "list-after-table": "units.ignore: a key of the recipe",
    "list-after-rules": "column.ignore must be a string",
    "undeclared-unit": "column.model.up_proj: ffn is not a unit",
    "unused-unit": "units.experts: no rule uses it",
    "duplicate-pattern": "more than one rule for model.norm",
    "fan-in-fan-out-without-rule": "fan_in_fan_out names no column or row rule: model.norm",
    "fan-in-fan-out-vocab": "fan_in_fan_out names no column or row rule: model.embed",
    "shared-row": "row.model.o_proj: kv_heads may be held by several ranks",
    "replicated-row": "row.model.o_proj: a section without a unit may be held by several ranks",
    "model-types-string": "model_types must be a list of names, not 'sample'",
    "model-types-number": "model_types must be a string, not 7",
    "no-model-types": "model_types is missing",
    "code": "__import__('os').system('touch pwned')",
    "unit-arithmetic": "units.heads: must name a config field",
    "unit-unknown-key": "units.kv_heads: unknown keys: shares_with",
    "unit-vocab": "units.vocab: a key of the recipe",
    "unit-name": "units.Heads: not a name",
    "block-of-none": "units.kv_heads.block: only of a unit with a count that is not shared",
    "block-size": "units.heads.block: 0 is not a number of 1 to 9999",
    "shared-by-nothing": "units.kv_heads.shared_by: 'heads' is not a unit",
    "shared-by-itself": "units.kv_heads: only a unit with a count",
    "shared-by-countless": "units.kv_heads: only a unit with a count",
    "attributes-no-unit": "module_attributes.self_attn.num_key_value_groups: 'heads/'",
    "attributes-empty": "module_attributes.self_attn: is empty",
    "attributes-list": "module_attributes.ignore must be a table",
    "argument-keys": "forward_arguments.self_attn.alibi: must be",
    "argument-dim": "forward_arguments.self_attn.alibi: dim is -1",
    "argument-axis": "forward_arguments.self_attn.alibi: 'heads *' is not a unit",
    "joint-sum-keys": "joint_sums.layers.*: must be { of = [MODULE, …], at = MODULE }",
    "joint-sum-of-one": "joint_sums.layers.*: of has 1 modules, not two or more",
    "joint-sum-condition": "joint_sums.layers.*.when.parallel: [True] is not a plain value",
    "pattern-braces": "replicate: 'model.{input,output_norm'",
    "not-toml": "line 2",
}


def recipe(*rules: Rule, prefix: str = "") -> Recipe:
    return Recipe("hand-made", "", ("sample",), rules, base_model_prefix=prefix)


@pytest.mark.parametrize("name", FAULTS)
def test_a_recipe_with_a_fault_is_refused_with_the_file_and_the_key(name: str) -> None:
    path = SAMPLES / f"{name}.toml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert text.startswith(f"recipe {path}: ")
    assert FAULTS[name] in text
    assert "\n" not in text


def test_every_sample_is_expected() -> None:
    assert {path.stem for path in SAMPLES.glob("*.toml")} == FAULTS.keys()


def test_a_sample_is_sound_once_its_one_fault_is_mended(tmp_path: Path) -> None:
    mended = (SAMPLES / "misspelled-key.toml").read_text().replace("replicat ", "replicate ")
    path = tmp_path / "mended.toml"
    path.write_text(mended)
    assert load_recipe(path).model_types == ("sample",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe", "utf-8"),
        (b"a = " + b"[" * 100_000, "recursion"),
        (b"a = " + b"9" * 5000, "integer string conversion"),
        (b" " * (1 << 20) + b"  ", "more than the 1048576 allowed"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    tmp_path: Path, data: bytes, words: str
) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=f"(?i){words}") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.toml: No such file"):
        load_recipe(tmp_path / "none.toml")


def test_a_pipe_is_no_recipe_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(RecipeError, match=r"pipe.toml: not a regular file"):
        load_recipe(tmp_path / "pipe.toml")


def test_a_recipe_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.toml").symlink_to(list_recipe_files()[0])
    assert load_recipe(tmp_path / "link.toml").name == "link"


@pytest.mark.parametrize("path", list_recipe_files(), ids=lambda path: path.stem)
def test_every_bundled_recipe_loads_and_its_patterns_compile(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.rules or loaded.parts
    for rule in loaded.rules:
        compile_tensor_pattern(rule.pattern, loaded.base_model_prefix)
    attributes = [attribute.module for attribute in loaded.module_attributes]
    arguments = [argument.module for argument in loaded.forward_arguments]
    for module in attributes + arguments:
        assert isinstance(compile_module_pattern(module), re.Pattern)


def test_a_model_type_is_served_by_two_recipes_only_on_conditions() -> None:
    loaded = [load_recipe(path) for path in list_recipe_files()]
    served = Counter(kind for recipe in loaded for kind in recipe.model_types)
    assert served
    for found in loaded:
        for kind in found.model_types:
            assert served[kind] == 1 or kind in found.when, (found.name, kind)


def test_each_model_type_finds_its_recipe() -> None:
    for path in list_recipe_files():
        found = load_recipe(path)
        for kind in found.model_types:
            config = {"model_type": kind, **found.when.get(kind, {})}
            assert find_recipe(config).name == path.stem


def test_a_recipe_can_be_asked_for_by_name_or_path() -> None:
    assert find_recipe({"model_type": "unheard-of"}, "llama").name == "llama"
    assert (
        find_recipe({"model_type": "unheard-of"}, str(list_recipe_files()[0])).name
        == list_recipe_files()[0].stem
    )


def test_an_unknown_model_type_is_refused_with_the_ways_out() -> None:
    with pytest.raises(RecipeError, match=r"'unheard-of': no recipe .*recipes list.*--recipe"):
        find_recipe({"model_type": "unheard-of"})


def test_a_tensor_that_no_rule_names_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^model.extra.weight: no rule .* none is guessed"):
        recipe(Rule("model.norm", STYLES["replicate"])).rule_for("model.extra.weight")


def test_a_tensor_that_two_rules_name_is_refused_with_both() -> None:
    both = recipe(
        Rule("model.*.norm", STYLES["replicate"]), Rule("model.{0,1}.norm", STYLES["ignore"])
    )
    with pytest.raises(
        RecipeError, match=r"^model.0.norm.weight: 2 rules .*'model.\*.norm' and 'model.\{0,1\}"
    ):
        both.rule_for("model.0.norm.weight")


def test_numbers_that_a_rule_states_keep_their_own_rule() -> None:
    first, others = (Rule(f"layers.{at}.w", STYLES[style]) for at, style in
                     (("0", "replicate"), ("{1,2}", "ignore")))  # fmt: skip
    mixed = recipe(first, others, Rule("layers.*.u", STYLES["replicate"]))
    assert mixed.rule_for("layers.0.w") is first
    assert mixed.rule_for("layers.2.w") is others
    assert mixed.rules_for("layers.3.w") == mixed.rules_for("layers.13.w") == []
    assert mixed.generalize("layers.3.u") == mixed.generalize("layers.40.u") == "layers.*.u"
    assert mixed.generalize("layers.2.u") == "layers.2.u"
    assert mixed.rule_for("layers.2.u") is mixed.rule_for("layers.9.u")


@pytest.mark.parametrize(
    ("pattern", "named", "not_named"),
    [
        ("a.b", ["a.b", "a.b.weight", "a.b.bias"], ["a.b.scale", "x.a.b", "a.bb", "aXb"]),
        ("a.b", ["a.b.gamma", "a.b.beta"], ["a.b.weight.gamma", "a.b.delta"]),
        (
            "h.*.ln",
            ["h.0.ln.weight", "h.127.ln", "h.*.ln"],
            ["h.x.ln", "h.**.ln", "h..ln", "h.0.1.ln", "h.-1.ln"],
        ),
        ("h.{q,k}_proj", ["h.q_proj", "h.k_proj.bias"], ["h.v_proj", "h.q,k_proj"]),
        ("h.{a.b,c}.d", ["h.a.b.d", "h.c.d"], ["h.aXb.d"]),
        ("{r,p.s,p}.k", ["r.k", "p.s.k", "s.k", "p.k", "k"], ["p.r.k", "s.p.k"]),
        ("p.wte", ["p.wte.weight", "wte.weight"], ["q.wte.weight", "p.p.wte.weight"]),
    ],
)
def test_a_pattern_names_a_modules_weight_and_bias(
    pattern: str, named: list[str], not_named: list[str]
) -> None:
    compiled = compile_tensor_pattern(pattern, "p")
    assert [name for name in named + not_named if compiled.fullmatch(name)] == named


def test_families_of_one_recipe_may_have_different_prefixes() -> None:
    other = compile_tensor_pattern("p.wte", "p", ["r"])
    assert all(other.fullmatch(name) for name in ("p.wte.weight", "r.wte.weight", "wte.weight"))
    assert not other.fullmatch("q.wte.weight")
    assert compile_tensor_pattern("wte", "", ["r"]).fullmatch("r.wte")
    assert not compile_tensor_pattern("lm_head", "p", ["r"]).fullmatch("r.lm_head")
    compiled = compile_tensor_pattern("{p,q}.wte", "{p,q}")
    names = ["p.wte.weight", "q.wte.weight", "wte.weight", "r.wte.weight", "p.q.wte.weight"]
    assert [name for name in names if compiled.fullmatch(name)] == names[:3]


def test_a_module_pattern_names_the_module_wherever_it_is_nested() -> None:
    compiled = compile_module_pattern("layers.*.attn")
    assert compiled.fullmatch("model.decoder.layers.3.attn")
    assert compiled.fullmatch("layers.3.attn")
    assert not compiled.fullmatch("mylayers.3.attn")


@pytest.mark.parametrize(
    ("style", "fan_in_fan_out", "dims"),
    [
        ("column", False, [None, 0, 0, 1]),
        ("column", True, [None, 0, 1, 2]),
        ("row", False, [None, None, 1, 2]),
        ("row", True, [None, None, 0, 1]),
        ("vocab", False, [None, 0, 0, 0]),
        ("replicate", False, [None, None, None, None]),
        ("ignore", False, [None, None, None, None]),
    ],
)
def test_the_divided_dimension_follows_from_style_and_rank(
    style: str, fan_in_fan_out: bool, dims: list[int | None]
) -> None:
    terms = () if style in ("replicate", "ignore") else (Term((), "heads"),)
    rule = Rule("any", STYLES[style], terms, fan_in_fan_out)
    assert [rule.dim((8,) * ndim, {}) for ndim in range(4)] == dims


@pytest.mark.parametrize(
    ("style", "shape", "dim"),
    [
        ("column", (4, 96, 64), 1),
        ("column", (4, 64, 96), 2),
        ("column", (4, 64, 64), 1),
        ("row", (4, 64, 48), 2),
        ("row", (4, 48, 64), 1),
    ],
)
def test_the_dimension_of_a_stated_count_stays_whole(
    style: str, shape: tuple[int, ...], dim: int
) -> None:
    rule = Rule("any", STYLES[style], (Term((), "ffn"),), whole="hidden")
    assert rule.dim(shape, {"hidden": 64}) == dim
