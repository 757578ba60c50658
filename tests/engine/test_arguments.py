"""An engine takes what transformers' own calls take, and returns the same, or refuses it."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardkit.authoring.pooled_engine import run_engine
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import RanksError
from shardkit.runtime.config import read_source_config
from shardkit.runtime.loader import resolve_model_class
from tests.engine.argument_table import compare_table, describe_difference
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut
from tests.helpers.torchrun import torchrun

TORCHRUN = """
import json, os, pathlib, sys, time
import torch
from transformers import AutoModelForCausalLM
from shardkit import runtime
from shardkit.timeouts import Timeouts
from tests.engine.argument_table import compare_table

torch.set_num_threads(1)
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
timeouts = Timeouts(collective=3)
own = pathlib.Path(sys.argv[2], f"host{os.environ['RANK']}")
with runtime.launch(own, device="cpu", timeouts=timeouts) as engine:
    found = {"generate": engine.generate([1], max_new_tokens=4, do_sample=False).tolist()}
    if sys.argv[3:]:
        found["table"] = compare_table(
            engine, AutoModelForCausalLM.from_pretrained(sys.argv[3]).eval()
        )
    time.sleep(5)  # longer than a collective may take
    handles = [engine.submit([1, 400 + n], max_tokens=9, temperature=0) for n in range(5)]
    found["batch"] = [list(handle.result(60).ids) for handle in handles]
    chunks = iter(engine.stream([1], max_new_tokens=10**6, do_sample=False))
    next(chunks)
    chunks.close()
    found["after a stream"] = engine.generate([1], max_new_tokens=4, do_sample=False).tolist()
    try:
        engine.restart()
    except Exception as error:
        found["restart"] = str(error)
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Path:
    folder = tmp_path_factory.mktemp("arguments") / "tp2"
    cut(stories260k, folder, 2)
    return folder


def test_every_argument_on_launched_ranks(
    stories: Path, stories260k: Path, rank_pool: RankPool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval().requires_grad_(False)
    with run_engine(rank_pool.of(2), stories) as engine:
        found = compare_table(engine, model)
        assert {name: how for name, how in found.items() if how != "equal"} == {}
        with pytest.raises(RanksError):
            engine.generate([1], max_new_tokens=3, max_new_tokenz=3)
        with pytest.raises(RanksError):
            engine.forward(inputids=torch.tensor([[1]]))
        assert engine.alive


@pytest.mark.slow
@pytest.mark.torchrun
@pytest.mark.parametrize("table", [False, True])
def test_a_batch_and_every_argument_under_torchrun(
    table: bool, stories: Path, stories260k: Path, tmp_path: Path
) -> None:
    for rank in range(2):  # each has its own file alone, under a path of its own
        own = shutil.copytree(stories, tmp_path / f"host{rank}")
        next(own.glob(f"rank-0000{1 - rank}-*")).unlink()
    code, said = torchrun(2, stories, tmp_path, TORCHRUN, *[str(stories260k)] * table)
    assert code == 0
    (found,) = said  # the other rank follows, and ends
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    expected = [
        model.generate(torch.tensor([[1, 400 + n]]), max_new_tokens=9, do_sample=False)[0, 2:]
        for n in range(5)
    ]
    assert found["batch"] == [ids.tolist() for ids in expected]
    assert found["generate"] == found["after a stream"] == [[1, 403, 407, 261, 378]]
    assert found["restart"].startswith("torchrun started these ranks")
    assert {name: how for name, how in found.get("table", {}).items() if how != "equal"} == {}


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_models_with_an_encoder(name: str, rank_pool: RankPool, tmp_path: Path) -> None:
    source = make(name, tmp_path / "source")
    cut(source, tmp_path / "tp2", 2)
    model = resolve_model_class(read_source_config(source)).from_pretrained(source).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 3], [0, 4]])
    with run_engine(rank_pool.of(2), tmp_path / "tp2") as engine, torch.inference_mode():
        assert describe_difference(engine.forward(**inputs), model(**inputs)) == "equal"
        if not model.can_generate():
            return
        assert engine.status().obstacle == "it has an encoder"
        handles = [engine.submit(row.tolist(), max_tokens=5, temperature=0) for row in ids]
        for row, handle in zip(ids, handles, strict=True):
            alone = model.generate(row[None], max_new_tokens=5, do_sample=False)
            assert list(handle.result(60).ids) == alone[0, 1:].tolist()
        beams = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        assert torch.equal(engine.generate(ids, **beams), model.generate(ids, **beams))
