"""An engine takes what transformers' own calls take, and returns the same, or refuses it.

Of four kinds of model: a decoder, an encoder-decoder, an encoder, and models that see.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardkit.authoring.pooled_engine import run_engine
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import RanksError, RequestError
from tests.engine.compare_calls import (
    compare_forwards,
    compare_generates,
    list_differences,
    load_reference,
)
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut
from tests.helpers.torchrun import torchrun

KINDS = ("stories260k", "t5", "bert", "llava", "qwen2_vl")
GENERATES = [
    pytest.param(kind, marks=[] if kind == "stories260k" else pytest.mark.slow)
    for kind in KINDS
    if kind != "bert"
]
TABLE = """
import json, os, pathlib, sys
import torch
from shardkit import runtime
from tests.engine.compare_calls import compare_forwards, compare_generates, load_reference

torch.set_num_threads(1)
with runtime.launch(sys.argv[1], device="cpu") as engine:
    reference = load_reference(pathlib.Path(sys.argv[3]))
    outcomes = compare_generates(engine, reference) | compare_forwards(engine, reference)
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text(json.dumps(outcomes))
"""
BATCH = """
import json, os, pathlib, sys, time
import torch
from shardkit import runtime
from shardkit.timeouts import Timeouts

torch.set_num_threads(1)
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
timeouts = Timeouts(collective=3)
own = pathlib.Path(sys.argv[2], f"host{os.environ['RANK']}")
with runtime.launch(own, device="cpu", timeouts=timeouts) as engine:
    outcomes = {"generate": engine.generate([1], max_new_tokens=4, do_sample=False).tolist()}
    time.sleep(5)  # longer than a collective may take
    handles = [engine.submit([1, 400 + n], max_tokens=9, temperature=0) for n in range(5)]
    outcomes["batch"] = [list(handle.result(60).ids) for handle in handles]
    chunks = iter(engine.stream([1], max_new_tokens=10**6, do_sample=False))
    next(chunks)
    chunks.close()
    outcomes["after a stream"] = engine.generate([1], max_new_tokens=4, do_sample=False).tolist()
    try:
        engine.restart()
    except Exception as error:
        outcomes["restart"] = str(error)
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def find_source(
    tmp_path_factory: pytest.TempPathFactory, stories260k: Path
) -> Callable[[str], Path]:
    """The checkpoint of a kind of model."""
    folders = {"stories260k": stories260k}

    def find(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = make(kind, tmp_path_factory.mktemp(kind) / "source")
        return folders[kind]

    return find


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_have_every_argument_that_transformers_has(
    kind: str, find_source: Callable[[str], Path]
) -> None:
    assert load_reference(find_source(kind)).list_missing() == set()


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_of_forward(
    kind: str, find_source: Callable[[str], Path], rank_pool: RankPool, tmp_path: Path
) -> None:
    cut(find_source(kind), tmp_path / "tp2", 2)
    with run_engine(rank_pool.of(2), tmp_path / "tp2") as engine:
        outcomes = compare_forwards(engine, load_reference(find_source(kind)))
        assert list_differences(outcomes) == {}
        with pytest.raises(RanksError):
            engine.forward(inputids=torch.tensor([[1]]))
        assert engine.alive


@pytest.mark.parametrize("kind", GENERATES)
def test_every_argument_of_generate(
    kind: str, find_source: Callable[[str], Path], rank_pool: RankPool, tmp_path: Path
) -> None:
    cut(find_source(kind), tmp_path / "tp2", 2)
    with run_engine(rank_pool.of(2), tmp_path / "tp2") as engine:
        outcomes = compare_generates(engine, load_reference(find_source(kind)))
        assert list_differences(outcomes) == {}
        with pytest.raises(RequestError, match="did you mean max_new_tokens"):
            engine.generate([1], max_new_tokens=3, max_new_tokenz=3)
        assert engine.alive


@pytest.mark.slow
@pytest.mark.torchrun
@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_under_torchrun(
    kind: str, find_source: Callable[[str], Path], tmp_path: Path
) -> None:
    source = find_source(kind)
    cut(source, tmp_path / "tp2", 2)
    code, outputs = torchrun(2, tmp_path / "tp2", tmp_path, TABLE, str(source))
    assert code == 0
    (outcomes,) = outputs  # the other rank follows, and ends
    assert list_differences(outcomes) == {}


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_batch_under_torchrun_where_each_rank_has_its_own_file(
    stories260k: Path, tmp_path: Path
) -> None:
    cut(stories260k, tmp_path / "tp2", 2)
    for rank in range(2):
        own = shutil.copytree(tmp_path / "tp2", tmp_path / f"host{rank}")
        next(own.glob(f"rank-0000{1 - rank}-*")).unlink()
    code, outputs = torchrun(2, tmp_path / "tp2", tmp_path, BATCH)
    assert code == 0
    (outcomes,) = outputs
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    expected = [
        model.generate(torch.tensor([[1, 400 + n]]), max_new_tokens=9, do_sample=False)[0, 2:]
        for n in range(5)
    ]
    assert outcomes["batch"] == [ids.tolist() for ids in expected]
    assert outcomes["generate"] == outcomes["after a stream"] == [[1, 403, 407, 261, 378]]
    assert outcomes["restart"].startswith("torchrun started these ranks")


def test_requests_to_a_model_with_an_encoder(
    find_source: Callable[[str], Path], rank_pool: RankPool, tmp_path: Path
) -> None:
    cut(find_source("t5"), tmp_path / "tp2", 2)
    model = load_reference(find_source("t5")).model
    with run_engine(rank_pool.of(2), tmp_path / "tp2") as engine, torch.inference_mode():
        assert engine.status().obstacle == "it has an encoder"
        rows = torch.tensor([[5, 6, 7], [8, 9, 10]])
        handles = [engine.submit(row.tolist(), max_tokens=5, temperature=0) for row in rows]
        for row, handle in zip(rows, handles, strict=True):
            alone = model.generate(row[None], max_new_tokens=5, do_sample=False)
            assert list(handle.result(60).ids) == alone[0, 1:].tolist()
