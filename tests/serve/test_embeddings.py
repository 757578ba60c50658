"""Embeddings over HTTP are those of the unsharded encoder."""

import math
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from shardkit.authoring.pooled_engine import run_engine
from shardkit.authoring.rank_pool import RankPool
from shardkit.serve import ServeOptions
from tests.helpers.http_server import serve_engine
from tests.helpers.runtime_helpers import cut

TEXTS = ["A dog runs.", "Two cats sleep on a warm red sofa near the window.", "Rain"]


def embed_alone(source: Path, text: str) -> torch.Tensor:
    """The mean of an unsharded encoder's token vectors, of length 1."""
    inputs = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(source).eval()(**inputs).last_hidden_state
    return torch.nn.functional.normalize(hidden[0].mean(0), dim=-1)


def test_embeddings_are_those_of_the_unsharded_encoder(
    minilm: Path, rank_pool: RankPool, tmp_path: Path
) -> None:
    cut(minilm, tmp_path / "tp2", 2)
    options = ServeOptions(model="minilm")
    with (
        run_engine(rank_pool.of(2), tmp_path / "tp2") as engine,
        serve_engine(engine, options) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        answer = client.embeddings.create(model="minilm", input=TEXTS)  # as base64
        plain = client.embeddings.create(model="minilm", input=TEXTS[1], encoding_format="float")
        with pytest.raises(openai.BadRequestError, match="the model does not generate"):
            client.completions.create(model="minilm", prompt="Rain")
        with pytest.raises(openai.BadRequestError, match="512 positions"):
            client.embeddings.create(model="minilm", input="word " * 600)
        engine.close()
        with pytest.raises(openai.InternalServerError, match="the engine was closed") as caught:
            client.embeddings.create(model="minilm", input="Rain")
        assert caught.value.status_code == 503
        with pytest.raises(HTTPError, match="503") as health:
            urlopen(f"{address}/health")
        health.value.close()
    for text, item in zip(TEXTS, answer.data, strict=True):
        assert math.isclose(sum(v * v for v in item.embedding), 1, rel_tol=1e-4)
        assert torch.allclose(torch.tensor(item.embedding), embed_alone(minilm, text), atol=1e-5)
    assert plain.data[0].embedding == pytest.approx(answer.data[1].embedding, abs=1e-5)
