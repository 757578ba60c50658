"""Checkpoints in the forms in which they are found: what transformers loads, ranks load."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedConfig

from shardkit.authoring.cross_loading import find_renames, find_tie_fields
from shardkit.authoring.form_check import UnshardedRunError, run_unsharded, try_forms
from shardkit.authoring.forms import UNKNOWN_CLASS, write_forms
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import list_samples

ANSWERING = "LlamaForQuestionAnswering"  # the base model lies under another name
PRETRAINING, MASKED_LM, UNKNOWN = "BertForPreTraining", "BertForMaskedLM", UNKNOWN_CLASS


@pytest.mark.parametrize(
    ("sample", "classes", "whole"),
    [
        ("bert", (PRETRAINING, MASKED_LM), {(PRETRAINING, MASKED_LM), (PRETRAINING, UNKNOWN)}),
        ("gpt2", ("GPT2LMHeadModel", "GPT2Model"), {("GPT2Model", "GPT2LMHeadModel")}),
        ("llama", (ANSWERING, "LlamaModel"), {(ANSWERING, ANSWERING), ("LlamaModel", UNKNOWN)}),
    ],
)  # fmt: skip
def test_what_transformers_loads_runs(
    sample: str, classes: tuple[str, ...], whole: set[tuple[str, str]], tmp_path: Path,
    rank_pool: RankPool,
) -> None:  # fmt: skip
    chosen = next(each for each in list_samples() if each.name == sample)
    results = list(try_forms(chosen, rank_pool.of(2), tmp_path, classes))
    assert [result for result in results if result.fault] == []
    loads = {(r.form.saved_as, r.form.loaded_as) for r in results if r.loads}
    assert whole <= loads
    assert {name for name in classes if (name, name) not in loads} == set()
    assert {r.form.change for r in results} > {"as saved"}


def test_the_heads_that_are_added_are_not_the_model_itself_under_other_names(
    tmp_path: Path,
) -> None:
    chosen = next(each for each in list_samples() if each.name == "hunyuan_vl")
    forms = [form for form, _, _ in write_forms(chosen, tmp_path)]
    assert "other heads stored" not in {form.change for form in forms}


def test_of_a_class_under_another_prefix_only_the_head_is_added(tmp_path: Path) -> None:
    chosen = next(each for each in list_samples() if each.name == "llama")
    added: set[str] = set()
    for form, saved, _ in write_forms(chosen, tmp_path, (ANSWERING, "LlamaModel")):
        if (form.saved_as, form.change) == ("LlamaModel", "other heads stored"):
            added |= load_file(saved.folder / "model.safetensors").keys() - saved.tensors.keys()
    assert added == {"qa_outputs.weight", "qa_outputs.bias"}


def test_of_heads_that_share_a_name_and_differ_in_shape_one_is_stored(tmp_path: Path) -> None:
    chosen = next(each for each in list_samples() if each.name == "bert")
    names = ("BertForTokenClassification", "BertForMultipleChoice")
    forms = [form for form, _, _ in write_forms(chosen, tmp_path, names)]
    assert "other heads stored" not in {form.change for form in forms}


def test_a_model_that_does_not_run_unsharded_is_told_apart() -> None:
    config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    with pytest.raises(UnshardedRunError, match=r"^ValueError: You "):
        run_unsharded(BertModel(config), {})


@pytest.mark.parametrize(
    ("theirs", "own", "renames"),
    [
        (["base.0.w", "base.1.w"], ["a.0.w", "a.1.w"], {"base.*.w": "a.*.w"}),
        (
            ["proj.in", "proj.out"],
            ["proj.0", "proj.2"],
            {"proj.in": "proj.0", "proj.out": "proj.2"},
        ),
        (["fc1", "fc2"], ["fc0", "fc1"], {"fc1": "fc0", "fc2": "fc1"}),
        (["same"], ["same"], {}),
    ],
)
def test_names_of_one_place_are_each_other_s(
    theirs: list[str], own: list[str], renames: dict[str, str]
) -> None:
    places: list[Any] = [
        {(str(at), 0, ()): [name] for at, name in enumerate(names)} for names in (theirs, own)
    ]
    assert find_renames(*places) == renames


class Refusing(PreTrainedConfig):  # type: ignore[misc]
    """A config that ties whatever it is told."""

    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = True


def test_what_ties_a_head_is_measured() -> None:
    assert find_tie_fields(BertConfig()) == {"tie_word_embeddings": True}
    assert find_tie_fields(Refusing()) is None
