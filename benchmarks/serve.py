"""Two servers of one model, asked by OpenAI's own client: shardkit over 2 ranks, and transformers'.

    python -m benchmarks.serve MODEL [--requests 32] [--rounds 3] [--extra DIR]

MODEL is a small model with a tokenizer. Each round starts each server anew and sends it the same
streamed, greedy completions of mixed lengths: a quarter of them one after another, then all at
once. Answers are compared with the unsharded model's own. Figures are medians over the rounds, with
the least and the most: tokens per second, and milliseconds to a first token. The last column is the
ratio to the first way. `transformers serve` needs transformers[serving]; DIR is where its packages
are, if not with the others.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
import transformers

from shardkit import split

RANKS = 2
START = 180.0  # seconds that a server may take to start
WORDS = ("Once", "upon", "a", "time", "there", "was", "a", "little", "girl", "named", "Lily")
SERVE = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
ON_CPU = ["--device", "cpu", "--log-level", "error"]
WAYS = {
    "transformers serve": [*SERVE, "{model}", *ON_CPU],
    "its continuous batching": [*SERVE, "{model}", *ON_CPU, "--continuous-batching"],
    "shardkit serve, tp 2": [
        sys.executable, "-m", "shardkit", "serve", "{shards}", "--name", "{model}",
        "--device", "cpu",
    ],
}  # fmt: skip
Request = tuple[str, int]  # a prompt, and the number of new tokens


@dataclass(frozen=True)
class Answer:
    """The text of a completion, and the seconds to its first piece."""

    text: str
    first: float


def list_requests(count: int) -> list[Request]:
    """Prompts of 1 to 11 words, each with 16 to 64 new tokens."""
    return [(" ".join(WORDS[: 1 + 7 * i % 11]), 16 + 16 * (i % 4)) for i in range(count)]


def answer_alone(model: Any, tokenizer: Any, request: Request) -> str:
    """What the unsharded model adds to a prompt by itself."""
    prompt, tokens = request
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0]
    before, whole = (
        tokenizer.decode(each, skip_special_tokens=True)
        for each in (output[: ids.shape[1]], output)
    )
    return str(whole[len(before) :])


@contextmanager
def run_server(command: list[str], extra: str | None) -> Iterator[str]:
    """The address of a server that has started; it ends with the `with`."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    path = os.pathsep.join(filter(None, [*sys.path, extra]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log
        ) as process,
    ):
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + START
        try:
            while not is_healthy(address):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)}: {log.read().decode()[-2000:]}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def is_healthy(address: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


async def complete(client: openai.AsyncOpenAI, model: str, request: Request) -> Answer:
    """One streamed completion."""
    began, first, text = time.perf_counter(), 0.0, ""
    stream = await client.completions.create(
        model=model, prompt=request[0], max_tokens=request[1], temperature=0, stream=True
    )
    async for part in stream:
        text += "".join(choice.text or "" for choice in part.choices)
        first = first or (time.perf_counter() - began if text else 0.0)
    return Answer(text, first)


async def ask_server(
    address: str, model: str, requests: list[Request]
) -> dict[str, tuple[float, list[Answer]]]:
    """Seconds and answers, for a quarter of the requests in turn, and for all at once."""
    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await complete(client, model, requests[0])  # what is loaded at a first request
        began = time.perf_counter()
        turns = [await complete(client, model, each) for each in requests[::4]]
        middle = time.perf_counter()
        together = await asyncio.gather(*(complete(client, model, each) for each in requests))
        end = time.perf_counter()
    return {"in turn": (middle - began, turns), "at once": (end - middle, list(together))}


def measure_way(
    name: str, folder: Path, options: argparse.Namespace, expected: list[str]
) -> dict[str, float]:
    """One round of one way: figures by name. Answers that are wrong are said, and counted."""
    places = {"model": str(options.model), "shards": str(folder)}
    command = [word.format(**places) for word in WAYS[name]]
    requests = list_requests(options.requests)
    figures = {}
    with run_server(command, options.extra) as address:
        outcome = asyncio.run(ask_server(address, str(options.model), requests))
    for how, (seconds, answers) in outcome.items():
        asked, right = (requests, expected)
        if how == "in turn":
            asked, right = requests[::4], expected[::4]
        figures[f"{how}: tokens/s"] = sum(tokens for _, tokens in asked) / seconds
        figures[f"{how}: ms to first"] = 1000 * statistics.median(a.first for a in answers)
        # transformers' server leaves out the space that a first word begins with.
        pairs = zip(answers, right, strict=True)
        figures[f"{how}: % wrong"] = (
            100 * sum(a.text.lstrip() != text.lstrip() for a, text in pairs) / len(answers)
        )
    return figures


def show_table(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Medians with least and most, and ratios to the first way."""
    first = next(iter(rounds))
    for what in rounds[first][0]:
        base = statistics.median(each[what] for each in rounds[first])
        for name, measured in rounds.items():
            values = [each[what] for each in measured]
            middle = statistics.median(values)
            spread = f"({min(values):.1f} to {max(values):.1f})"
            ratio = f"{middle / base:6.2f}" if base else ""
            print(f"{what:22} {name:24} {middle:8.1f} {spread:20} {ratio}")


def main() -> None:
    """Measure every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extra", help="where transformers' server finds more packages")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    expected = [answer_alone(model, tokenizer, each) for each in list_requests(options.requests)]
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        split(options.model, Path(scratch, "shards"), RANKS)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for _ in range(options.rounds):
            for name in WAYS:
                figures = measure_way(name, Path(scratch, "shards"), options, expected)
                rounds[name].append(figures)
    cores = len(os.sched_getaffinity(0))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {cores} cores,")
    print(f"{options.requests} requests, medians of {options.rounds} rounds:")
    show_table(rounds)


if __name__ == "__main__":
    main()
