"""Compiled decoding: the same tokens, in one graph, over any ranks; or a refusal in one line."""

from pathlib import Path

import pytest
import torch
import transformers

from shardkit import runtime
from shardkit.authoring.format_samples import (
    list_format_models,
    list_format_samples,
    make_quantized,
)
from shardkit.authoring.rank_pool import RankPool
from shardkit.errors import RanksError
from shardkit.runtime.compile_decoding import (
    choose_cache_length,
    compile_decoding,
    exchange_nothing,
)
from shardkit.runtime.distributed.connect import connect
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.engine.messages import generate_request, load_request
from shardkit.runtime.load_options import LoadOptions
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut
from tests.helpers.torchrun import torchrun

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own parts
PROMPTS = torch.tensor([[1, 5, 9, 2, 7], [3, 8, 6, 4, 1]])
OPTIONS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture(autouse=True)
def new_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before, neither in this process nor on this machine."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


def load_with_group(shards: Path) -> tuple[transformers.PreTrainedModel, TensorParallelGroup]:
    group = connect("cpu")
    return runtime.load(shards, group=group), group


def test_lengths_of_caches_are_few() -> None:
    assert [choose_cache_length(n) for n in (1, 128, 129, 1000)] == [128, 128, 256, 1024]
    assert [choose_cache_length(n, 200) for n in (1, 129, 199, 300)] == [128, 200, 200, 300]


@pytest.mark.parametrize(("sample", "graphs"), [("mistral", 3), ("qwen3_moe", 1)])
def test_a_step_is_one_graph_and_tokens_are_the_same(
    sample: str, graphs: int, tmp_path: Path
) -> None:
    """`graphs`: a sliding window has one to begin with, one once it counts, and one once full."""
    cut(make(sample, tmp_path / "whole"), tmp_path / "shards", 1)
    model, group = load_with_group(tmp_path / "shards")
    with torch.inference_mode():
        whole = [model.generate(ids, **OPTIONS) for ids in (PROMPTS[:1], PROMPTS)]
        compile_decoding(model, group, "eager")
        compiled = [model.generate(PROMPTS[:1], **OPTIONS)]
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == graphs
        compiled.append(model.generate(PROMPTS, **OPTIONS))
    assert not counters["graph_break"]
    assert all(torch.equal(*pair) for pair in zip(whole, compiled, strict=True))


# Rank 1's compiler takes longer than a rank may be late; the model's step is one graph.
PROGRAM = """
import json, os, pathlib, sys, time, torch
from shardkit import runtime
from shardkit.errors import ShardkitError
from shardkit.runtime.compile_decoding import compile_decoding
from shardkit.timeouts import Timeouts
torch.set_num_threads(1)
rank, graphs, report = int(os.environ["RANK"]), [], {}
def compiler(graph, inputs):
    calls = [str(node.target) for node in graph.graph.nodes]
    graphs.append([call for call in calls if "shardkit" in call])
    time.sleep(4 * rank)
    return graph.forward
try:
    group = runtime.connect("cpu", Timeouts(collective=2))
    model = runtime.load(sys.argv[1], group=group)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    def run():
        before, first_number = dict(group.counts), group.num_collectives
        new = model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
        counts = {key: count - before[key] for key, count in group.counts.items()}
        return new, counts, group.num_collectives - first_number
    with torch.inference_mode():
        report["plain"] = run()
        compile_decoding(model, group, compiler)
        report["compiled"] = run()
        report["graphs"] = graphs
        report["breaks"] = dict(torch._dynamo.utils.counters["graph_break"])
    code = 0
except ShardkitError as error:
    report, code = {"error": str(error)}, error.exit_code
pathlib.Path(sys.argv[2], f"said-{rank}").write_text(json.dumps(report))
sys.exit(code)
"""


@pytest.mark.torchrun
def test_ranks_that_compile_are_not_taken_for_lost_ones(stories260k: Path, tmp_path: Path) -> None:
    cut(stories260k, tmp_path / "shards", 2)
    code, reports = torchrun(2, tmp_path / "shards", tmp_path, PROGRAM)
    assert code == 0, reports
    for report in reports:
        assert report["compiled"] == report["plain"]  # tokens, and how many collectives of a kind
        assert not report["breaks"]
        (calls,) = report["graphs"]
        assert [call.split(".")[-2] for call in calls] == ["all_reduce"] * 11 + ["all_gather"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample", "tp_size", "rows"),
    [
        ("llama", 2, 2),
        ("deepseek_v3", 2, 1),
        ("phi", 2, 2),
        ("qwen2_moe", 2, 1),
        ("llama-14-heads-2-kv", 3, 1),
        ("llama-7-heads-7-kv", 3, 1),
    ],
)
def test_ranks_compile_to_the_same_tokens(
    sample: str, tp_size: int, rows: int, rank_pool: RankPool, tmp_path: Path
) -> None:
    """At tp 3, ranks have unequal numbers of kv heads, or share them; they exchange over gloo."""
    shards, ranks = tmp_path / "shards", rank_pool.of(tp_size)
    cut(make(sample, tmp_path / "whole"), shards, tp_size)
    request = generate_request({"input_ids": PROMPTS[:rows]}, OPTIONS)
    outputs = []
    for compiles in (False, True):
        ranks.request(load_request(shards, LoadOptions(compile=compiles)))
        (first, *_) = ranks.request(request)
        outputs.append((first.tensors["ids"].tolist(), first.header["counts"]))
    assert outputs[0] == outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_engine_compiles(tp_size: int, stories260k: Path, tmp_path: Path) -> None:
    cut(stories260k, tmp_path / "shards", tp_size)
    texts_by_way = []
    for compiles in (False, True):
        with runtime.launch(tmp_path / "shards", compile=compiles) as engine:
            obstacle = engine.status().obstacle
            texts = ["".join(engine.stream("Once upon a time", max_new_tokens=30, do_sample=False))]
            texts += [engine.submit("Lily", max_tokens=9, temperature=0.8, seed=3).result().text]
            texts_by_way.append(texts)
    assert texts_by_way[0] == texts_by_way[1]
    assert obstacle == "its cache has a fixed size, of one call"


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ("t5", "the model has an encoder"),
        ("llama-classifier", "the model does not generate"),
        ("minimax", "its cache is its own"),
        ("llama4_text", "transformers does not compile it"),
    ],
)
def test_what_is_not_compiled_is_refused(sample: str, why: str, tmp_path: Path) -> None:
    cut(make(sample, tmp_path / "whole"), tmp_path / "shards", 1)
    with pytest.raises(RanksError, match=f"^rank 0: decoding cannot be compiled: {why}$"):
        runtime.load(tmp_path / "shards", compile=True)


def test_what_depends_on_values_is_refused(tmp_path: Path) -> None:
    """Which experts the plain loop runs, tokens decide."""
    cut(make("qwen3_moe-unsuited-width", tmp_path / "whole"), tmp_path / "shards", 1)
    model, group = load_with_group(tmp_path / "shards")
    model.set_experts_implementation("eager")
    with pytest.raises(RanksError, match=r"^rank 0: decoding cannot be compiled: .*$"):
        compile_decoding(model, group, "eager")


def test_weights_that_stay_quantized_are_refused(tmp_path: Path) -> None:
    model = next(model for model in list_format_models() if model.name == "grouped-heads")
    sample = next(sample for sample in list_format_samples() if sample.name == "fp8-block")
    cut(make_quantized(model, sample, tmp_path / "whole"), tmp_path / "shards", 1)
    with pytest.raises(RanksError, match=r'compiled: weights that stay quantized .*"load"$'):
        runtime.load(tmp_path / "shards", compile=True)


def test_compiled_steps_that_give_other_logits_are_refused(tmp_path: Path) -> None:
    """A class of transformers masks the wrong tokens of a cache that is longer than they are."""
    cut(make("gpt_neo", tmp_path / "whole"), tmp_path / "shards", 1)
    model, group = load_with_group(tmp_path / "shards")
    with pytest.raises(RanksError, match=r"steps have other logits, by 0\.9[0-9] dev"):
        compile_decoding(model, group, "eager")


def test_a_machine_without_a_compiler_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(make("llama", tmp_path / "whole"), tmp_path / "shards", 1)
    model, group = load_with_group(tmp_path / "shards")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(RanksError) as caught:
        compile_decoding(model, group)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("rank 0: decoding cannot be compiled: ")
    assert "No working C++ compiler found" in line


def test_a_rehearsal_exchanges_and_counts_nothing() -> None:
    group = TensorParallelGroup(1, 3, torch.device("cpu"))
    ones = torch.ones(2)
    with exchange_nothing(group):
        assert torch.equal(group.all_reduce(ones), ones)
        assert torch.equal(group.all_gather(ones, [2, 2, 1]), torch.ones(5))
        assert torch.equal(group.broadcast(ones), ones)
    assert (group.transport, group.num_collectives) == (None, 0)
    assert group.counts == {"all_reduce": 0, "all_gather": 0}
    group.failure = "rank 2 died"
    with pytest.raises(RanksError, match="rank 2 died"), exchange_nothing(group):
        pass
