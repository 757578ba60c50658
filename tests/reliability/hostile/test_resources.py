"""T14: a split's memory does not grow with the model, and a terabyte costs nothing to refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.tensor import TensorSpec
from tests.helpers.command_line import environment
from tests.helpers.fixture_checkpoints import sparse_file
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of
from tests.reliability.hostile.sandbox import MEGABYTES, check_told, commands, listing

PEAK = 200  # megabytes above what starting the command takes
ROOM = 1 << 30  # of address space: less than the model, so that mapping or reading it whole fails
# Runs a command, and says on stderr how many kilobytes it held at most.
MEASURED = """
import resource, sys
from shardkit.cli import main
import shardkit.cli.split
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)),) * 2)
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
"""


def sparse_llama(folder: Path, heads: int, head: int, ffn: int, vocab: int) -> list[TensorSpec]:
    """A Llama of one layer, a file with nothing in it but its header."""
    folder.mkdir()
    specs = specs_of(llama(heads=heads, kv=heads, head=head, ffn=ffn, vocab=vocab))
    sparse_file(folder / "model.safetensors", specs)
    config = llama_config(heads=heads, kv=heads, ffn=ffn) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return specs


def test_a_terabyte_is_planned_at_once_and_refused_for_want_of_room(tmp_path: Path) -> None:
    specs = sparse_llama(tmp_path / "model", 4096, 64, 1 << 18, 1 << 18)
    assert sum(spec.nbytes for spec in specs) > 1 << 40
    before = listing(tmp_path)
    (plan, split), grown = commands(
        ["plan", str(tmp_path / "model"), "--tp", "8"],
        ["split", str(tmp_path / "model"), str(tmp_path / "out"), "--tp", "8"],
    )
    check_told(plan, 0)
    check_told(split, 5, "needs", "GB free")
    assert grown < MEGABYTES
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_a_model_larger_than_the_address_space_is_split(tmp_path: Path) -> None:
    specs = sparse_llama(tmp_path / "model", 32, 128, 11_008, 80_000)
    assert sum(spec.nbytes for spec in specs) > ROOM
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(ROOM), "split", tmp_path / "model", tmp_path / "out",
         "--tp", "4"],
        capture_output=True, text=True, env=environment(MALLOC_ARENA_MAX="1"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) / 1024 < PEAK
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("rank-*"))
    assert written > ROOM
