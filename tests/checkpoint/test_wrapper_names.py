"""What wrappers put before names is told from the names of models."""

import pytest

from shardkit.checkpoint import describe_wrapper_mark, find_wrapper_prefix, is_wrapper_prefix

NAMES = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    "prefix",
    [
        "", "_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.",
        "_orig_mod.module.", "module._orig_mod.base_model.model.", "module.module.",
    ],
)  # fmt: skip
def test_a_prefix_of_wrappers_that_every_name_has_is_found_whole(prefix: str) -> None:
    assert find_wrapper_prefix([prefix + name for name in NAMES]) == prefix
    assert is_wrapper_prefix(prefix) == bool(prefix)


def test_a_prefix_that_one_name_lacks_is_none() -> None:
    assert find_wrapper_prefix(["module.a.weight", "a.weight"]) == ""
    assert find_wrapper_prefix(["module._orig_mod.a.weight", "module.a.weight"]) == "module."
    assert find_wrapper_prefix([]) == ""


def test_a_model_s_own_first_module_is_no_wrapper() -> None:
    assert find_wrapper_prefix(["model.a.weight", "model.b.weight"]) == ""
    assert find_wrapper_prefix(["base_model.a.weight"]) == ""
    assert not is_wrapper_prefix("model.")
    assert not is_wrapper_prefix("module")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.q_proj.base_layer.weight", ("adapter", "merge_and_unload")),
        ("a.q_proj.lora_A.default.weight", ("adapter", "merge_and_unload")),
        ("a._fp32_params.0", ("trainer", "save_pretrained")),
        ("layers.0._orig_mod.q_proj.weight", ("some modules", "rename")),
    ],
)
def test_what_no_prefix_explains_is_named_for_what_it_is(name: str, words: tuple[str, ...]) -> None:
    text = describe_wrapper_mark([*NAMES, name])
    for word in (name, *words):
        assert word in text
    assert describe_wrapper_mark(NAMES) == ""
