"""Mixed load on `shardkit serve` for a while: what its answers are, and what it keeps.

    python -m tests.serve.soak MODEL [--seconds 600] [--clients 12] [--seed 1] [--report FILE]

Clients ask for whole and streamed completions, go away in the middle of them, are cancelled, and
send what is too large, malformed or cut off. Every greedy answer is compared with the unsharded
model's own. After the first minute and at the end the load stops for a moment, and memory,
processes, threads, descriptors, sockets and shared memory are counted.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from transformers import AutoModelForCausalLM

from tests.helpers.command_line import SHARDKIT, environment
from tests.helpers.rank_launcher import MARK, list_shared_memory, marked
from tests.helpers.runtime_helpers import cut
from tests.helpers.stories_engine import continue_alone

WARM = 60.0  # seconds before the first count
QUIET = 3.0  # seconds without load before a count
LONGEST = 64  # tokens
MAX_BODY = 8 << 20
Answer = tuple[list[int], list[int]]  # a prompt, and what greedy decoding adds to it


@dataclass
class Load:
    """The clients' server, what answers must be, and how many were what."""

    client: httpx2.AsyncClient
    port: int
    answers: list[Answer]
    choose: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def make_body(self, **more: Any) -> tuple[dict[str, Any], list[int]]:
        """A greedy completion, and its tokens."""
        prompt, tokens = self.choose.choice(self.answers)
        size = self.choose.randint(1, LONGEST)
        body = {"prompt": prompt, "max_tokens": size, "temperature": 0, "return_token_ids": True}
        return {**body, "ignore_eos": True, **more}, tokens[:size]

    def count(self, what: str, is_right: bool, facts: object = "") -> None:
        """Count an outcome."""
        self.counts[what if is_right else f"{what}: wrong"] += 1
        if not is_right:
            self.wrong.append(f"{what}: {facts!r:.300}")


async def ask_whole(load: Load) -> None:
    body, expected = load.make_body()
    answer = await load.client.post("/v1/completions", json=body)
    ids = answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.text
    load.count("whole", ids == expected, ids)


async def ask_streamed(load: Load) -> None:
    body, expected = load.make_body(stream=True)
    ids: list[int] = []
    async with load.client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    ids += choice["token_ids"]
    load.count("streamed", ids == expected, ids)


async def leave_stream(load: Load) -> None:
    body, expected = load.make_body(stream=True, max_tokens=400)
    stop, ids = load.choose.randint(0, 20), list[int]()
    async with load.client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                ids += json.loads(line[6:])["choices"][0]["token_ids"]
            if len(ids) >= stop:
                break
    load.count("left", ids[: len(expected)] == expected[: len(ids)], ids)


async def cancel_whole(load: Load) -> None:
    body, _ = load.make_body(max_tokens=400, n=load.choose.randint(1, 4))
    with suppress(TimeoutError):
        async with asyncio.timeout(load.choose.random()):
            await load.client.post("/v1/completions", json=body)
    load.count("cancelled", True)


async def send_oversized(load: Load) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": [5] * 600}, {"prompt": [1], "max_tokens": 10**6}, {"prompt": ["a"] * 1000},
        {"prompt": "a", "n": 1000}, {"prompt": "x" * (MAX_BODY + 10)},
    ]  # fmt: skip
    answer = await load.client.post("/v1/completions", json=load.choose.choice(bodies))
    load.count("oversized", answer.status_code in (400, 413), answer.text)


async def send_malformed(load: Load) -> None:
    whole = json.dumps(load.make_body()[0]).encode()
    bodies = [
        whole[: load.choose.randrange(len(whole))], load.choose.randbytes(200), b"[]", b"{}",
        b'{"prompt": 3.5}', b'{"prompt": [1.5]}', b'{"prompt": "a", "temperature": "hot"}',
        b'{"prompt": "a", "no_such_field": 1}', b'{"prompt": "a", "top_p": -1}', b"[" * 5000,
    ]  # fmt: skip
    headers = {"content-type": "application/json"}
    body = load.choose.choice(bodies)
    answer = await load.client.post("/v1/completions", content=body, headers=headers)
    load.count("malformed", answer.status_code == 400, (body, answer.status_code, answer.text))


async def cut_off(load: Load) -> None:
    """A request whose connection closes before it is whole, or that is no HTTP at all."""
    _, writer = await asyncio.open_connection("127.0.0.1", load.port)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n"
    kind = b"content-type: application/json\r\n\r\n" + b'{"prompt": [1, '
    writer.write(load.choose.choice([head + kind, head, load.choose.randbytes(300), b""]))
    with suppress(OSError):
        await writer.drain()
        await asyncio.sleep(load.choose.random() / 5)
        writer.close()
        await writer.wait_closed()
    load.count("cut off", True)


ACTIONS: list[tuple[int, Callable[[Load], Awaitable[None]]]] = [
    (30, ask_whole), (20, ask_streamed), (10, leave_stream), (10, cancel_whole),
    (8, send_oversized), (12, send_malformed), (10, cut_off),
]  # fmt: skip


async def act_until(load: Load, end: float) -> None:
    """One client: an action after another, until the time is up."""
    weights, actions = zip(*ACTIONS, strict=True)
    while time.monotonic() < end:
        (action,) = load.choose.choices(actions, weights)
        try:
            await action(load)
        except (httpx2.HTTPError, OSError, KeyError, ValueError) as error:
            load.count(action.__name__, False, error)


def count_resources(mark: Path, before: set[str]) -> dict[str, int]:
    """What the server and its ranks have at this moment; memory in MiB."""
    counts: Counter[str] = Counter()
    for pid in marked(mark):
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        counts["processes"] += 1
        counts["threads"] += int(status["Threads"])
        counts["memory"] += int(status["VmRSS"].split()[0]) >> 10
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                counts["descriptors"] += 1
                counts["sockets"] += os.readlink(link).startswith("socket:")
    counts["shared memory"] = len(list_shared_memory() - before)
    counts["files"] = len(list((mark / "scratch").iterdir()))
    return dict(counts)


@contextmanager
def run_server(folder: Path, mark: Path) -> Iterator[int]:
    """The port of a server of two ranks."""
    (mark / "scratch").mkdir()
    own = {MARK: str(mark), "TMPDIR": str(mark / "scratch"), "OMP_NUM_THREADS": "1"}
    command = [*SHARDKIT, "serve", str(folder), "--port", "0", "--device", "cpu"]
    with (
        (mark / "log").open("wb") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment(**own)
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().decode().rpartition(":")[2])
            process.terminate()
            assert process.wait(60) == 143
        finally:
            process.kill()


async def run_load(
    port: int, answers: list[Answer], mark: Path, options: argparse.Namespace, before: set[str]
) -> dict[str, Any]:
    """Load for a while; the outcomes, and what the server had early and late."""
    counted = []
    async with httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=120, limits=httpx2.Limits(max_connections=None)
    ) as client:
        load = Load(client, port, answers, random.Random(options.seed))
        warm = min(WARM, options.seconds / 4)
        for seconds in (warm, options.seconds - warm):
            end = time.monotonic() + seconds
            await asyncio.gather(*(act_until(load, end) for _ in range(options.clients)))
            await asyncio.sleep(QUIET + 5)  # idle connections are closed after 5 s
            counted.append(count_resources(mark, before))
    return {
        "seconds": options.seconds, "requests": sum(load.counts.values()),
        "outcomes": dict(sorted(load.counts.items())), "wrong": load.wrong[:20],
        "after warming up": counted[0], "at the end": counted[1],
    }  # fmt: skip


def run_soak(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report of one run; nothing of the server is left after it."""
    model = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    prompts = [[1, *((7 * i + 13 * j) % 500 + 3 for j in range(i % 40))] for i in range(60)]
    answers = [(ids, continue_alone(model, ids, LONGEST, eos_token_id=None)) for ids in prompts]
    before = list_shared_memory()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        mark = Path(scratch)
        before |= list_shared_memory()
        cut(source, mark / "tp2", 2)
        with run_server(mark / "tp2", mark) as port:
            report = asyncio.run(run_load(port, answers, mark, options, before))
        report["left"] = len(list(marked(mark))) + len(list((mark / "scratch").iterdir()))
        errors = [line for line in (mark / "log").read_text().splitlines() if "Traceback" in line]
        report["tracebacks"] = len(errors)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    report = json.dumps(run_soak(options.model, options), indent=1)
    if options.report:
        options.report.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
