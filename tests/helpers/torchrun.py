"""Programs that tests run under torchrun, and the story that a trained model must tell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from shardkit import runtime
from tests.helpers.real_inputs import shared

STORY = """
import json, os, pathlib, sys, torch
from shardkit import runtime
from shardkit.errors import ShardkitError
torch.set_num_threads(1)
try:
    model = runtime.load(sys.argv[1])
    start, tokens = torch.tensor([[1]]), int(sys.argv[3])
    ids = model.generate(start, max_new_tokens=tokens, do_sample=False)[0].tolist()
    torch.manual_seed(int(os.environ["RANK"]))  # ranks must sample alike all the same
    sampled = model.generate(start, max_new_tokens=min(20, tokens), do_sample=True)[0].tolist()
    said, code = {"ids": ids, "sampled": sampled}, 0
except ShardkitError as error:
    said, code = {"error": str(error), "code": error.exit_code}, error.exit_code
pathlib.Path(sys.argv[2], f"said-{os.environ['RANK']}").write_text(json.dumps(said))
sys.exit(code)
"""


def torchrun(
    ranks: int, folder: Path, tmp_path: Path, program: str = STORY, *arguments: str
) -> tuple[int, list[dict[str, Any]]]:
    """Run a program under torchrun; its exit code, and what each rank said."""
    (tmp_path / "program.py").write_text(program)
    root = Path(runtime.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
         "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
         str(tmp_path / "program.py"), str(folder), str(tmp_path),
         *arguments],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip
    outputs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("said-*"))]
    return done.returncode, outputs


def golden() -> list[int]:
    stories = json.loads(shared("models/stories260K-golden.json").read_text())
    ids: list[int] = stories["stories260K"]["ids"]
    return ids
