"""Trained models on ranks: they say what the unsharded models say."""

from pathlib import Path

import pytest
import torch

from shardkit import runtime
from tests.helpers.real_inputs import shared
from tests.helpers.runtime_helpers import cut
from tests.helpers.torchrun import STORY, golden, torchrun

TP_SIZES = [2, *(pytest.param(tp_size, marks=pytest.mark.slow) for tp_size in (3, 4, 8))]


@pytest.mark.torchrun
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_a_trained_llama_tells_its_golden_story(
    tp_size: int, stories260k: Path, tmp_path: Path
) -> None:
    cut(stories260k, tmp_path / "shards", tp_size)
    code, said = torchrun(tp_size, tmp_path / "shards", tmp_path, STORY, "200")
    assert code == 0
    assert len(said) == tp_size
    assert all(found["ids"] == golden() for found in said)
    assert len({tuple(found["sampled"]) for found in said}) == 1


@pytest.mark.slow
def test_its_sharded_source_tells_the_same_story(tmp_path: Path) -> None:
    cut(shared("models/stories260K-sharded"), tmp_path / "shards", 2)
    with runtime.launch(tmp_path / "shards") as engine:
        ids = engine.generate([1], max_new_tokens=200, do_sample=False)[0].tolist()
    assert ids == golden()


@pytest.mark.parametrize(
    "tp_size", [pytest.param(tp_size, marks=pytest.mark.slow) for tp_size in (2, 3, 4)]
)
def test_a_trained_bert_gives_the_unsharded_embeddings(
    tp_size: int, minilm: Path, tmp_path: Path
) -> None:
    from transformers import BertModel

    cut(minilm, tmp_path / "shards", tp_size)
    with runtime.launch(tmp_path / "shards") as engine:
        texts = ["A cat sits on the mat.", "Stocks fell on Monday, as they had the week before."]
        tokens = dict(engine.tokenizer(texts, padding=True, return_tensors="pt"))
        sharded = engine.forward(**tokens)["last_hidden_state"]
    with torch.inference_mode():
        whole = BertModel.from_pretrained(minilm)(**tokens).last_hidden_state
        exact = BertModel.from_pretrained(minilm, dtype=torch.float64)(**tokens).last_hidden_state
    rounding = (whole - exact).abs().max()
    assert (sharded - exact).abs().max() <= 4 * rounding
