"""Checkpoints in the forms in which they are found: what transformers loads, ranks load."""

from pathlib import Path

import pytest

from shardkit.authoring.form_check import try_forms
from shardkit.authoring.forms import UNKNOWN_CLASS
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
