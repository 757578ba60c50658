"""`shardkit serve` as a program: answers once ready, drains at SIGTERM, leaves nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_line import SHARDKIT, environment, run
from tests.helpers.rank_launcher import MARK, free_port, marked
from tests.helpers.runtime_helpers import cut

OWN_SERVER = Path(__file__).resolve().parents[1] / "client" / "own_server.py"


def read(request: str | urllib.request.Request) -> str:
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def complete(address: str, tokens: int) -> dict[str, Any]:
    body = {"prompt": [1], "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body | {"ignore_eos": True}).encode(),
        {"content-type": "application/json"},
    )  # fmt: skip
    made: dict[str, Any] = json.loads(read(request))["choices"][0]
    return made


@pytest.fixture
def process(stories260k: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    cut(stories260k, tmp_path / "tp2", 2)
    (tmp_path / "scratch").mkdir()
    own = {MARK: str(tmp_path), "TMPDIR": str(tmp_path / "scratch"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*SHARDKIT, "serve", str(tmp_path / "tp2"), "--port", "0", "--name", "stories"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**own),
    ) as started:  # fmt: skip
        yield started
        started.kill()


def test_a_server_answers_drains_and_leaves_nothing(
    process: subprocess.Popen[str], tmp_path: Path
) -> None:
    address = find_address(process)
    assert complete(address, 4)["token_ids"] == [403, 407, 261, 378]
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(complete(address, 400)))
    asking.start()
    while "shardkit_sequences_running 0" in read(f"{address}/metrics"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert len(answers[0]["token_ids"]) == 400
    _, log = process.communicate(timeout=60)
    assert process.returncode == 143
    lines = [json.loads(each) for each in log.splitlines()]
    answered = [each for each in lines if each.get("path") == "/v1/completions"]
    assert [each["completion_tokens"] for each in answered] == [4, 400]
    assert len({each["request_id"] for each in answered}) == 2
    assert not list(marked(tmp_path))
    assert not list((tmp_path / "scratch").iterdir())


def find_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("stories answers at http://127.0.0.1:"), process.communicate()
    return line.split()[-1]


@pytest.mark.slow
def test_ranks_that_are_lost_are_started_again(process: subprocess.Popen[str]) -> None:
    address, errors = find_address(process), []
    first = complete(address, 8)

    def ask() -> None:
        try:
            complete(address, 500)
        except urllib.error.HTTPError as error:
            errors.append((error.code, json.loads(error.read())["error"]["message"]))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    while "shardkit_sequences_running 3" not in read(f"{address}/metrics"):
        time.sleep(0.01)
    os.kill(json.loads(read(f"{address}/status"))["ranks"][1]["pid"], signal.SIGKILL)
    for thread in asking:
        thread.join(60)
    assert errors == [(503, "rank 1 was killed by SIGKILL")] * 3
    end = time.monotonic() + 90
    while not json.loads(read(f"{address}/status"))["alive"] and time.monotonic() < end:
        time.sleep(0.2)
    assert complete(address, 8) == first


@pytest.mark.slow
def test_a_second_signal_ends_what_runs(process: subprocess.Popen[str], tmp_path: Path) -> None:
    address, errors = find_address(process), []

    def ask() -> None:
        try:
            complete(address, 500)
        except urllib.error.HTTPError as error:
            errors.append(error.code)
            error.close()
        except OSError:
            errors.append(0)  # the connection was closed

    asking = threading.Thread(target=ask)
    asking.start()
    while "shardkit_sequences_running 1" not in read(f"{address}/metrics"):
        time.sleep(0.01)
    os.kill(json.loads(read(f"{address}/status"))["ranks"][1]["pid"], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    asking.join(30)
    assert errors in ([0], [503])
    assert not list(marked(tmp_path))


@pytest.mark.slow
def test_a_server_of_ones_own_streams_and_refuses(stories260k: Path, tmp_path: Path) -> None:
    cut(stories260k, tmp_path / "tp2", 2)
    port = free_port()
    command = [sys.executable, str(OWN_SERVER), str(tmp_path / "tp2"), str(port)]
    with subprocess.Popen(command, env=environment(OMP_NUM_THREADS="1")) as process:
        end = time.monotonic() + 60
        while not can_connect(port) and time.monotonic() < end:
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}/"
        text = read(urllib.request.Request(address, b"Once upon a time"))
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            read(urllib.request.Request(address, b"Once " * 600))
        caught.value.close()
        process.terminate()
    assert text.startswith(", there was a little girl named Lily.")
    assert process.returncode in (0, -signal.SIGTERM)


def can_connect(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardkit.cli.serve.find_spec", lambda _: None)
    found = run("serve", tmp_path)
    assert found.exit_code == 2
    assert "starlette is not installed: pip install 'shardkit[serve]'" in found.output


def test_a_server_for_other_hosts_needs_a_key(tmp_path: Path) -> None:
    found = run("serve", tmp_path, "--host", "0.0.0.0")
    assert found.exit_code == 2
    assert "Error: --host 0.0.0.0: other hosts can reach it; give an --api-key" in found.output
