"""Use every public name of shardkit, its runtime and its server, with types checked strictly.

Usage: python whole_interface.py SOURCE OUT
"""

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import shardkit
from shardkit import errors, runtime
from shardkit.serve import ServeOptions, make_app, run_server
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts

STATUSES: dict[type[errors.ShardkitError], int] = {
    errors.RequestError: 400,
    errors.UsageError: 400,
    errors.RequestCancelled: 499,
    errors.EngineDraining: 503,
    errors.EngineBusy: 429,
    errors.RequestTimeout: 504,
    errors.RanksLost: 503,
    errors.RanksError: 500,
}
SHARD_ERRORS: tuple[type[errors.ShardkitError], ...] = (
    errors.RecipeError, errors.LayoutError, errors.CheckpointError, errors.ManifestError,
    errors.VerifyError, errors.OutputError, errors.SourceChanged,
)  # fmt: skip


def make_shards(source: Path, out: Path) -> bool:
    """Split a checkpoint for 2 ranks, for 3, and merge it again; whether the shards are right."""
    try:
        needed: int = max(shardkit.plan(source, tp_size=2).summary.loaded_bytes)
        print(f"{shardkit.__version__}: {needed:,} bytes on the largest rank")
        shardkit.split(source, out, tp_size=2)
        shardkit.reshard(out, out.with_name("tp3"), tp_size=3)
        shardkit.merge(out.with_name("tp3"), out.with_name("merged"))
        report = shardkit.verify(out, source)
    except SHARD_ERRORS as error:
        raise SystemExit(error.exit_code) from error
    return report is not None and report.passed


def count_parameters(folder: Path) -> int:
    """How many parameters this rank has of a model; under torchrun."""
    group: runtime.TensorParallelGroup = runtime.connect("cpu", Timeouts(join=30.0))
    model = runtime.load(folder, group=group, timeouts=DEFAULT_TIMEOUTS)
    same = shardkit.load is runtime.load and shardkit.launch is runtime.launch
    return int(model.num_parameters()) if same else 0


def describe_engine(engine: runtime.Engine) -> list[str]:
    """What an engine says of itself, by line."""
    status: runtime.EngineStatus = engine.status()
    state = f"alive={status.alive and engine.alive} draining={status.draining} {status.failure}"
    work = f"{status.running} running, {status.waiting} waiting, {status.steps} steps"
    room = f"{status.max_batch_size} sequences, {status.max_batch_tokens} tokens"
    ranks = f"{status.tp_size} of {engine.ranks.size} ranks, {list(status.rank_pids)}"
    kind = f"{engine.dtype}, {engine.abilities.positions} positions, {status.obstacle}"
    return [engine.folder.name, state, work, f"{status.tokens} tokens", room, ranks, kind]


def describe_chunk(chunk: runtime.Chunk) -> tuple[int, int, str, str, str]:
    """Of a chunk: its sequence, how many tokens it has, its text, and why it ends."""
    reasons = str(chunk.finish_reason), str(chunk.stop_reason)
    return (chunk.index, len(chunk.ids) - len(chunk.logprobs), chunk.text, *reasons)


def list_logprobs(result: runtime.RequestResult) -> list[tuple[int, float, int]]:
    """Of each new token: its id, its log-probability, and the most probable id."""
    rows = []
    for completion in result.completions:
        one: runtime.Completion = completion
        each: runtime.TokenLogprob
        for each in one.logprobs:
            rows.append((each.token, each.logprob, each.top[0][0]))
        assert len(one.logprobs) == len(one.ids)
        assert (one.index, one.finish_reason, one.stop_reason) == (0, "length", None)
        assert one.text == result.text
    return rows


def make_params() -> runtime.SamplingParams:
    """Every parameter of sampling, each with a value of its type."""
    return runtime.SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repetition_penalty=1.1, seed=7,
        stop=["The end"], stop_token_ids=[2], max_tokens=12, logprobs=None, n=2, echo=True,
        ignore_eos=True,
    )  # fmt: skip


def ask_engine(engine: runtime.Engine, text: str) -> dict[str, Any]:
    """Every way of asking an engine, from a thread."""
    ids = engine.input_ids(text)
    handle: runtime.Handle = engine.submit(text, make_params(), timeout=60.0)
    sampled = [describe_chunk(chunk) for chunk in handle]
    cancelled = engine.submit(text, max_tokens=200, ignore_eos=True)
    cancelled.cancel()
    plain = engine.submit(text, max_tokens=5, temperature=0, logprobs=2, timeout=60.0)
    result = plain.result(timeout=60.0)
    assert (plain.deadline or 0) > 0
    assert (plain.done, plain.timeout) == (True, 60.0)
    assert result.prompt_ids == plain.prompt_ids
    assert engine.forward(input_ids=ids)["logits"].shape == engine.logits(text).shape
    return {
        "options": make_params().to_options(),
        "sampled": sampled,
        "cancelled": cancelled.done,
        "logprobs": list_logprobs(result),
        "ids": list(result.ids),
        "generate": engine.generate(text, max_new_tokens=5, do_sample=False)[0].tolist(),
        "stream": "".join(engine.stream(text, max_new_tokens=5, do_sample=False)),
        "tokenizer": engine.tokenizer.decode(result.ids),
    }


async def ask_engine_async(engine: runtime.Engine, text: str) -> dict[str, Any]:
    """Every way of asking an engine, from an event loop."""
    generated = await engine.agenerate(text, max_new_tokens=5, do_sample=False)
    output = await engine.aforward(input_ids=engine.input_ids(text))
    pieces = [piece async for piece in engine.astream(text, max_new_tokens=5, do_sample=False)]
    chunks = [chunk async for chunk in engine.submit(text, max_tokens=5, temperature=0)]
    result = await engine.submit(text, max_tokens=5, temperature=0)
    assert output["logits"].shape[0] == len(generated)
    assert [token for chunk in chunks for token in chunk.ids] == list(result.ids)
    return {"ids": list(result.ids), "generate": generated[0].tolist(), "stream": "".join(pieces)}


def find_status(engine: runtime.Engine, **sampling: Any) -> int:
    """The HTTP status of a request; 200 if it succeeds."""
    try:
        engine.submit([1], **sampling).result(60.0)
    except errors.ShardkitError as error:
        return next((code for kind, code in STATUSES.items() if isinstance(error, kind)), 500)
    return 200


def end_engine(engine: runtime.Engine) -> bool:
    """Drain an engine, start it again, and close it; whether all had finished."""
    finished = engine.drain(timeout=30.0)
    engine.restart()
    engine.close()
    return finished


def serve_engine(engine: runtime.Engine) -> int:
    """Answer over HTTP until a signal comes; the exit code of the program."""
    options = ServeOptions(
        model="stories", api_key="secret", hosts=frozenset({"127.0.0.1"}), request_timeout=60.0,
        max_body_bytes=1 << 20, max_prompts=8, max_choices=4, max_stops=4, pooling="mean",
    )  # fmt: skip
    assert callable(make_app(engine, options))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return run_server(engine, options, sock)


def main() -> int:
    """Make shards, ask an engine of them, and serve it."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    if not make_shards(source, out):
        return 1
    limits = runtime.Limits(max_batch_size=8, max_queue=64, max_batch_tokens=4096)
    with runtime.launch(out, limits=limits) as engine, runtime.drain_on_sigterm(engine):
        print("\n".join(describe_engine(engine)), ask_engine(engine, "Once upon a time"))
        print(asyncio.run(ask_engine_async(engine, "Once upon a time")))
        code = serve_engine(engine)
        end_engine(engine)
    return code


if __name__ == "__main__":
    sys.exit(main())
