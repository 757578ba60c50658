"""A ceiling on memory: split, merge and reshard keep it, or refuse before anything is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.convert import copy_memory, split
from shardkit.errors import UsageError
from shardkit.output import stream
from shardkit.output.rows import PACKED_BYTES
from shardkit.planning import make_plan
from shardkit.recipe.catalog import find_recipe
from tests.convert.test_streaming import expert_recipe
from tests.helpers.synthetic_checkpoints import (
    contents,
    llama,
    llama_config,
    llama_source,
    specs_of,
    write_source,
)

MIB = 1 << 20
RUN_AND_MEASURE = """
import sys
from pathlib import Path
from shardkit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    status = Path("/proc/self/status").read_text()
    print("peak", int(status.split("VmHWM:")[1].split()[0]) * 1024)
    sys.exit(end.code)
"""


def run_command(*arguments: object) -> tuple[int, str, int]:
    """Run a command in a process of its own: the exit code, what it printed, and its peak."""
    command = [sys.executable, "-c", RUN_AND_MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    output = done.stdout + done.stderr
    return done.returncode, output, int(re.findall(r"peak (\d+)", output)[-1])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two large tensors, one of them divided along its second dimension."""
    shapes = {
        "model.embed_tokens.weight": (32, 64),
        "model.layers.0.self_attn.q_proj.weight": (4096, 2048),
        "model.layers.0.self_attn.o_proj.weight": (2048, 4096),
    }
    config = llama_config(heads=32, kv=32, ffn=64) | {"hidden_size": 2048}
    return write_source(tmp_path / "source", config, specs_of(shapes, "F32"))


def read_needed(output: str) -> int:
    return int(re.findall(r"--max-memory (\d+)M", output)[0]) * 10**6


@pytest.mark.parametrize("command", ["split", "merge", "reshard"])
def test_a_ceiling_is_kept_or_refused_with_the_number_that_would_do(
    command: str, source: Path, tmp_path: Path
) -> None:
    out, given = tmp_path / "out", source
    if command != "split":
        split(source, tmp_path / "shards", 2)
        given = tmp_path / "shards"
    options = [] if command == "merge" else ["--tp", 4]
    code, output, _ = run_command(command, given, out, *options, "--max-memory", "10M")
    assert code == 2, output
    assert f"{command} needs " in output
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    needed = read_needed(output) + 10**6  # one process may begin a little larger than another
    code, output, peak = run_command(command, given, out, *options, "--max-memory", needed)
    assert code == 0, output
    assert peak <= needed
    usual_code, output, _ = run_command(command, given, tmp_path / "usual", *options)
    assert usual_code == 0, output
    assert contents(out) == contents(tmp_path / "usual")


def test_buffers_are_as_large_as_the_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_memory, "measure_resident_memory", lambda: 50 * MIB)
    monkeypatch.setattr(copy_memory, "THREADS", 0)
    largest, count = stream.BUFFER_BYTES, stream.NUM_BUFFERS
    rooms = stream.NUM_CORES * PACKED_BYTES
    fixed = 50 * MIB + rooms + copy_memory.SPARE_BYTES

    def choose(limit: int, replicas: float = 0.0) -> int:
        return copy_memory.choose_buffer_bytes("split", 0, limit, replicas)

    assert count * largest <= 20 * MIB
    assert choose(fixed + count * largest) == largest
    assert choose(fixed + count * largest - 1) == largest // 2
    assert choose(fixed + count * largest, 1.5) == largest // 4
    smallest = choose(fixed + count * copy_memory.SMALLEST_BUFFER)
    assert largest % smallest == 0
    assert smallest <= copy_memory.SMALLEST_BUFFER
    with pytest.raises(UsageError, match="split needs"):
        choose(fixed + count * smallest - 1)


def test_what_is_kept_of_every_tensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_memory, "measure_resident_memory", lambda: 0)
    with pytest.raises(UsageError, match=r"split needs 1[12]\d\d MB"):
        copy_memory.choose_buffer_bytes("split", 10**6, 10**6)


def test_rows_that_several_ranks_store_count() -> None:
    """Kv heads on two ranks each: parts of rows that both store do not fit into one buffer."""
    config = llama_config(heads=8, kv=2)
    plan = make_plan(specs_of(llama(heads=8, kv=2)), find_recipe(config), config, 4)
    assert copy_memory.measure_replicas(plan) == 0.0
    counts, shapes = {"model_type": "experts", "ffn": 24, "heads": 12, "kv": 2}, {"kv": (5, 28)}
    plan = make_plan(specs_of(shapes, "F32"), expert_recipe(), counts, 4)
    # Of 28 columns 24 are of 12 heads, which are divided, and 4 of 2 kv heads, on 2 ranks each.
    assert copy_memory.measure_replicas(plan) == (24 + 2 * 4) / 28


def test_a_dry_run_refuses_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-memory"):
        split(llama_source(tmp_path / "source"), tmp_path / "o", 2, dry_run=True, max_memory=10**7)
