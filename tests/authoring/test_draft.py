"""Drafts: recipes for model types that have none, proven before they are written."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from shardkit.authoring.draft.draft import Draft, draft_recipe
from shardkit.authoring.draft.draft_all import (
    DraftRecord,
    draft_types,
    list_generative_types,
    read_records,
    shorten_reason,
)
from shardkit.authoring.draft.drafts_page import render_drafts
from shardkit.authoring.draft.proofs import ProofCache
from shardkit.authoring.draft.unit_axes import COLUMN_AXES, ROW_AXES, format_axis
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import OutputError, RecipeError
from shardkit.layout import Term, parse_axis
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.parse import load_recipe
from tests.helpers.model_samples import make

ROOT = Path(__file__).resolve().parents[2]
FEW = ["gpt2"]
MORE = [
    "olmo2",
    "albert", "bart", "bert", "biogpt", "bloom", "cohere", "deberta-v2", "deepseek_v3",
    "distilbert", "falcon", "gemma2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "granitemoe", "lfm2", "llama", "mamba", "mixtral", "modernbert", "mpt", "nemotron", "opt",
    "phi", "phi3", "qwen2_moe", "qwen3", "roberta", "stablelm", "starcoder2", "t5", "vit",
    "whisper", "xglm",
]  # fmt: skip
LARGEST = 0.72  # of the bytes on one of two ranks: small models have wide norms and positions


@pytest.fixture(scope="module")
def proofs(rank_pool: RankPool) -> ProofCache:
    return ProofCache(rank_pool)


@pytest.fixture(scope="module")
def proven(proofs: ProofCache) -> Callable[[str], Draft]:
    """Draft a model type, once for all tests, with every check passed."""

    @cache
    def draft(model_type: str) -> Draft:
        result = draft_recipe(model_type, lambda _: None, proofs)
        assert result.passed, result.outcomes
        assert set(result.outcomes) == {2, 4}
        return result

    return draft


@pytest.mark.parametrize(
    "model_type", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_a_draft_shards_a_model_type_and_passes_every_check(
    model_type: str, proven: Callable[[str], Draft], tmp_path: Path
) -> None:
    result = proven(model_type)
    assert result.outcomes[2].share < LARGEST
    path = tmp_path / "draft.toml"
    path.write_text(result.text)
    assert load_recipe(path).model_types == (model_type,)


def test_a_draft_says_what_it_could_not_shard_and_why(proven: Callable[[str], Draft]) -> None:
    result = proven("rwkv")
    replicated = result.recipe.replicated
    assert any("attention.receptance" in pattern for pattern in replicated)
    assert all(reason for reason in replicated.values())
    assert "[replicated]" in result.text
    assert result.outcomes[2].share > LARGEST


def test_a_draft_of_another_layout_fails_the_checks_it_is_put_through(
    proofs: ProofCache, proven: Callable[[str], Draft], tmp_path: Path
) -> None:
    from shardkit.authoring.draft.tiny_model import make_tiny_model

    result = proven("gpt2")
    wrong = result.text.replace('"3 heads"', '"heads 3"')
    assert wrong != result.text
    outcome = proofs.prove_text(make_tiny_model("gpt2", tmp_path).folder, wrong, 2)
    assert outcome.failed_check == "masked sum"


@pytest.mark.parametrize(("model", "told"), [
    ("no-such-type", "nor a model_type of transformers"),
    ("dbrx", "no small model of it can be made"),
])  # fmt: skip
def test_what_cannot_be_drafted_is_said_in_one_line(
    model: str, told: str, proofs: ProofCache
) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        draft_recipe(model, lambda _: None, proofs)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def without_gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of this project from which one recipe is gone."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("shardkit", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "recipes" / "gptj.toml").unlink()
    return tree


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardkit", *arguments], cwd=tree, capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(tree)},
    )  # fmt: skip


@pytest.mark.slow
def test_a_type_without_a_recipe_is_drafted_and_then_split_by_name_only(
    without_gptj: Path, tmp_path: Path
) -> None:
    source, draft = make("gptj", tmp_path / "gptj"), tmp_path / "new.toml"
    out = str(tmp_path / "shards")
    refused = run(without_gptj, "split", str(source), out, "--tp", "2")
    assert refused.returncode == 1
    assert "shardkit recipes draft" in refused.stderr
    made = run(without_gptj, "recipes", "draft", str(source), "--out", str(draft))
    assert made.returncode == 0, made.stderr
    assert draft.read_text().startswith("# A DRAFT")
    again = run(without_gptj, "split", str(source), out, "--tp", "2")
    assert again.returncode == 1, "a draft must not be used unless it is named"
    done = run(without_gptj, "split", str(source), out, "--tp", "2", "--recipe", str(draft))
    assert done.returncode == 0, done.stderr
    proven = run(without_gptj, "verify", out, "--against", str(source), "--json")
    assert json.loads(proven.stdout)["passed"], proven.stdout


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    kept = tmp_path / "kept.toml"
    kept.write_text("kept")
    done = run(ROOT, "recipes", "draft", "gpt2", "--out", str(kept))
    assert (done.returncode, kept.read_text()) == (5, "kept")
    done = run(ROOT, "recipes", "draft", "no-such-type", "--out", str(tmp_path / "new.toml"))
    assert done.returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.toml"]


def test_no_bundled_recipe_says_that_it_is_a_draft() -> None:
    for path in (ROOT / "recipes").glob("*.toml"):
        assert "A DRAFT" not in path.read_text(), path.name
    assert find_recipe({"model_type": "gptj"}).name == "gptj"


@pytest.mark.parametrize("terms", [*ROW_AXES, *COLUMN_AXES], ids=format_axis)
def test_an_axis_that_is_tried_is_written_as_recipes_read_it(terms: tuple[Term, ...]) -> None:
    assert parse_axis(format_axis(terms)) == terms


def test_a_type_that_crashes_its_process_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "drafts.jsonl"
    records = draft_types(["no-such-type", "gpt2"], path, 300)
    assert next(records).stage == "model class"
    (process,) = multiprocessing.active_children()
    process.kill()
    assert next(records).stage == "crash"
    assert list(records) == []
    assert multiprocessing.active_children() == []
    assert list(read_records(path)) == ["gpt2", "no-such-type"]


@pytest.mark.slow
def test_a_type_that_takes_too_long_is_recorded_and_the_next_one_drafted(tmp_path: Path) -> None:
    slow, other = draft_types(["gpt2", "no-such-type"], tmp_path / "drafts.jsonl", 0.5)
    assert (slow.passed, slow.stage) == (False, "time limit")
    assert other.stage == "model class"


def test_all_generative_types_of_transformers_are_drafted() -> None:
    model_types = list_generative_types()
    assert {"gpt2", "t5", "whisper"} <= set(model_types)
    assert len(model_types) > 200


def test_the_last_record_of_a_type_counts(tmp_path: Path) -> None:
    path = tmp_path / "drafts.jsonl"
    assert read_records(path) == {}
    lines = [
        {"model_type": "b", "passed": False, "seconds": 1.0, "transformers": "5"},
        {"model_type": "a", "passed": True, "seconds": 1.0, "transformers": "5"},
        {"model_type": "b", "passed": True, "seconds": 2.0, "transformers": "6"},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    records = read_records(path)
    assert list(records) == ["a", "b"]
    assert records["b"].passed
    path.write_text("[]\n")
    with pytest.raises(OutputError, match="not a file of draft records"):
        read_records(path)


def test_the_page_of_drafts_counts_what_passed_and_groups_what_failed() -> None:
    outcome = {"passed": True, "failed": "", "fault": "", "share": 0.5}
    page = render_drafts([
        DraftRecord("one", True, 2.0, "5", outcomes={"2": outcome}, regions=2),
        DraftRecord("two", False, 4.0, "5", "proof", "masked sum: a|b is off"),
        DraftRecord("three", False, 6.0, "5", "tiny model", "ValueError: no"),
        DraftRecord("four", False, 6.0, "5", "tiny model", "ValueError: no"),
    ])  # fmt: skip
    assert "| passed | 1 | 25% |" in page
    assert "| passed, of those of which a tiny model can be built and run | 1 of 2 | 50% |" in page
    assert "| one | 2 | 0 | 50% | 2.0 |" in page
    assert "| two | masked sum: a\\|b is off |" in page
    assert page.index("can be built and run | 2 |") < page.index("over 2 or 4 ranks | 1 |")


def test_a_reason_names_no_path_of_this_machine() -> None:
    reason = shorten_reason(
        "/tmp/shardkit-draft-x1/tiny-0/config.json: no\n/usr/lib/python3/site.py: n_head / 4"
    )
    assert reason == "the draft: no site.py: n_head / 4"
    assert len(shorten_reason("x" * 1000)) < 300


def test_a_draft_of_all_takes_no_model_and_of_one_no_limit() -> None:
    for arguments in ((), ("gpt2", "--all"), ("gpt2", "--limit", "1")):
        assert run(ROOT, "recipes", "draft", *arguments).returncode == 2
