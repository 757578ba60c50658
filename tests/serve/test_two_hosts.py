"""Two hosts with two ranks each: the server on the first gives a client on the second its text.

The hosts are network namespaces, which only a cable joins: what they say goes over TCP. Each has a
folder of its own, with its own ranks' files.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_line import environment
from tests.helpers.rank_launcher import MARK, marked
from tests.helpers.real_inputs import shared
from tests.helpers.runtime_helpers import cut

HOSTS = ("shardkit-host-0", "shardkit-host-1")
CABLES = ("shardkit0", "shardkit1")
ADDRESS = "10.213.7.{}"  # of a host, from 1
PORT, RENDEZVOUS_PORT, KEY = 8431, 29431, "key-of-this-test"
CLIENT = """
import json, sys, urllib.request
request = urllib.request.Request(
    sys.argv[1], sys.argv[2].encode(),
    {"content-type": "application/json", "authorization": "Bearer " + sys.argv[3]},
)
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""
LIMIT = 60.0  # seconds for all ranks to join
JOIN = f"""
import os, pathlib, sys, time
from shardkit import runtime
from shardkit.errors import RanksError
from shardkit.timeouts import Timeouts
out, rank, began = pathlib.Path(sys.argv[1]), os.environ["RANK"], time.monotonic()
try:
    runtime.connect("cpu", Timeouts(join={LIMIT}, collective=5))
except RanksError as error:
    (out / ("after-" + rank)).write_text(str(time.monotonic() - began))
    (out / ("said-" + rank)).write_text(str(error))
    sys.exit(7)
"""


def configure(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces and a cable between them."""
    with ExitStack() as stack:
        try:
            for host in HOSTS:
                configure("netns", "add", host)
                stack.callback(configure, "netns", "del", host)
            configure("link", "add", CABLES[0], "type", "veth", "peer", "name", CABLES[1])
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"") or str(error).encode()
            pytest.skip(f"no network namespaces here: {reason.decode().strip()}")
        for at, (host, cable) in enumerate(zip(HOSTS, CABLES, strict=True), start=1):
            configure("link", "set", cable, "netns", host)
            inside = ("-n", host)
            configure(*inside, "addr", "add", f"{ADDRESS.format(at)}/24", "dev", cable)
            configure(*inside, "link", "set", cable, "up")
            configure(*inside, "link", "set", "lo", "up")
        yield


def start_host(at: int, mark: Path, interface: str, *program: str) -> subprocess.Popen[bytes]:
    """torchrun on one of the two hosts, which starts a program as two ranks.

    Without an `interface`, gloo by itself would take the loopback, to which the name of this
    machine leads.
    """
    command = [
        "ip", "netns", "exec", HOSTS[at], sys.executable, "-m", "torch.distributed.run",
        "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(at),
        "--master-addr", ADDRESS.format(1), "--master-port", str(RENDEZVOUS_PORT),
        "--local-addr", ADDRESS.format(at + 1),  # since both have the name of this machine
        *program,
    ]  # fmt: skip
    own = {
        MARK: str(mark), "OMP_NUM_THREADS": "1", "SHARDKIT_SHARED_MEMORY": "0",
        "TMPDIR": str(mark), "GLOO_SOCKET_IFNAME": interface,
    }  # fmt: skip
    log = (mark / f"log-{at}").open("wb")
    with log:
        return subprocess.Popen(command, env=environment(**own), stdout=log, stderr=log)


def ask_from(host: str, body: dict[str, Any]) -> Any:
    url = f"http://{ADDRESS.format(1)}:{PORT}/v1/completions"
    done = subprocess.run(
        ["ip", "netns", "exec", host, sys.executable, "-c", CLIENT, url, json.dumps(body), KEY],
        capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


@contextmanager
def run_hosts(mark: Path, processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End whatever is left of both hosts at the end."""
    try:
        yield
    finally:
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.wait(30)


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.torchrun
@pytest.mark.parametrize("interfaces", [CABLES, ("", "")], ids=["asked for", "found"])
def test_a_server_over_two_hosts_gives_the_golden_text(
    interfaces: tuple[str, str], hosts: None, stories260k: Path, tmp_path: Path
) -> None:
    cut(stories260k, tmp_path / "tp4", 4)
    for at in range(2):
        own = shutil.copytree(tmp_path / "tp4", tmp_path / f"host{at}" / "shards")
        for rank in (2 * (1 - at), 2 * (1 - at) + 1):
            next(own.glob(f"rank-{rank:05}-*")).unlink()
    golden = json.loads(shared("models/stories260K-golden.json").read_text())["stories260K"]["ids"]
    serve = ["--host", ADDRESS.format(1), "--port", str(PORT), "--api-key", KEY, "--device", "cpu"]
    processes = [
        start_host(
            at, tmp_path, interfaces[at],
            "-m", "shardkit", "serve", str(tmp_path / f"host{at}" / "shards"), *serve,
        )
        for at in range(2)
    ]  # fmt: skip
    body = {"prompt": [1], "max_tokens": len(golden) - 1, "temperature": 0}
    body["return_token_ids"] = True
    with run_hosts(tmp_path, processes):
        end = time.monotonic() + 200
        while isinstance(answer := ask_from(HOSTS[1], body), str) and time.monotonic() < end:
            assert processes[0].poll() is None, (tmp_path / "log-0").read_text()
            time.sleep(2)
        assert isinstance(answer, dict), answer
        assert answer["choices"][0]["token_ids"] == golden[1:]
        processes[0].send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)
        assert not list(marked(tmp_path))


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.torchrun
def test_ranks_that_cannot_reach_each_other_say_how_they_could(hosts: None, tmp_path: Path) -> None:
    (tmp_path / "join.py").write_text(JOIN)
    processes = [
        start_host(at, tmp_path, "lo", str(tmp_path / "join.py"), str(tmp_path)) for at in range(2)
    ]
    with run_hosts(tmp_path, processes):
        for process in processes:
            assert process.wait(150) != 0
    texts = [(tmp_path / f"said-{rank}").read_text() for rank in range(4)]
    assert len(set(texts)) == 1
    assert "rank 0: cannot reach rank 2 at 127.0.0.1 over lo: Connection refused" in texts[0]
    assert "set GLOO_SOCKET_IFNAME on each host to the interface that leads to" in texts[0]
    assert max(float((tmp_path / f"after-{rank}").read_text()) for rank in range(4)) < LIMIT
