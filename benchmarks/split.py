"""Time and memory of a split, beside a durable copy and the usual ways to cut a checkpoint.

    python -m benchmarks.split [--gib 2.1] [--tp 4] [--rounds 5] [--folder DIR] [--json]

Every round runs each contender once, in a process of its own, on the same warm source and into a
new folder, removed before the next; the output is synced to disk within the time.  What counts is
the ratio to the durable copy (`cp -r`, then `sync -f`) of the same run.  Before each, as much
memory as an output takes is used and freed: a virtual machine gets memory that has long been free
from its host, which can take longer than all else.  Commands keep and find their bytecode, as those
of an installed package do, whatever PYTHONDONTWRITEBYTECODE says.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shardkit.checkpoint.header import encode_header
from shardkit.tensor import TensorSpec

HIDDEN, FFN, KV, VOCABULARY = 2048, 5632, 512, 32000
CHUNK = 1 << 20  # this process stays small: a child's peak memory starts at its parent's
# As weights are: a value whose exponent has all bits set is NaN or infinite.
FINITE = bytes(value & 0xBF for value in range(256))
HERE = Path(__file__).resolve().parent
COPY, SPLIT = "cp -r; sync -f", "shardkit split"
CONTENDERS = {
    COPY: ["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh"],
    SPLIT: [sys.executable, "-m", "shardkit", "split", "--json"],
    "get_slice, save_file": [sys.executable, str(HERE / "usual_ways.py"), "get_slice"],
    "load_file, slice, save_file": [sys.executable, str(HERE / "usual_ways.py"), "load_file"],
}


def llama(layers: int) -> list[TensorSpec]:
    """The tensors of a Llama in bfloat16."""
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN),
              "model.norm": (HIDDEN,)}  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "self_attn.q_proj": (HIDDEN, HIDDEN), at + "self_attn.k_proj": (KV, HIDDEN),
                   at + "self_attn.v_proj": (KV, HIDDEN), at + "self_attn.o_proj": (HIDDEN, HIDDEN),
                   at + "mlp.gate_proj": (FFN, HIDDEN), at + "mlp.up_proj": (FFN, HIDDEN),
                   at + "mlp.down_proj": (HIDDEN, FFN), at + "input_layernorm": (HIDDEN,),
                   at + "post_attention_layernorm": (HIDDEN,)}  # fmt: skip
    return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]


def make_source(folder: Path, gib: float) -> int:
    """Write a checkpoint of about `gib` GiB of random values; the bytes of its weights."""
    one, two = (sum(spec.nbytes for spec in llama(n)) for n in (1, 2))
    specs = llama(max(1, round((gib * 2**30 - one) / (two - one)) + 1))
    config = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8,
              "hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCABULARY,
              "num_hidden_layers": len(specs) // 9, "torch_dtype": "bfloat16"}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(specs, {"format": "pt"}))
        for spec in specs:
            for start in range(0, spec.nbytes, CHUNK):
                file.write(os.urandom(min(CHUNK, spec.nbytes - start)).translate(FINITE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    warm(folder / "model.safetensors")
    return sum(spec.nbytes for spec in specs)


def warm(path: Path) -> None:
    """Have the file in the page cache as it is after a read from disk, not after being written."""
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def free_pages(folder: Path, size: int) -> None:
    """Have memory for a file of the size free since a moment ago."""
    os.sync()
    chunk = bytes(CHUNK)
    with (folder / "pages").open("wb", buffering=0) as file:
        for _ in range(0, size, CHUNK):
            file.write(chunk)
    (folder / "pages").unlink()


def time_command(arguments: list[str], out: Path, size: int) -> tuple[float, float]:
    """Run a command and remove what it wrote: seconds, and the most memory it held in MB.

    Args:
        arguments: The command.
        out: The folder that it writes, if it writes one.
        size: Its bytes, about.
    """
    free_pages(out.parent, size)
    started = time.perf_counter()
    pid = os.posix_spawnp(arguments[0], arguments, ENVIRONMENT, file_actions=QUIET)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(arguments)}: failed")
    shutil.rmtree(out, ignore_errors=True)  # a command that only reads leaves nothing
    return seconds, usage.ru_maxrss / 1024


ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
QUIET = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]


def measure(folder: Path, gib: float, tp_size: int, rounds: int) -> dict[str, Any]:
    """Every contender's median seconds, ratio to the copy, and peak memory."""
    size = make_source(folder / "source", gib)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds + 1):
        for name, command in CONTENDERS.items():
            arguments = [*command, str(folder / "source"), str(folder / "out")]
            if command[0] != "sh":
                arguments += ["--tp", str(tp_size)]
            result = time_command(arguments, folder / "out", size)
            if turn:  # the first round warms the caches
                results[name].append(result)
    copies = [seconds for seconds, _ in results[COPY]]
    return {
        "bytes": size,
        "tp_size": tp_size,
        "rounds": rounds,
        "contenders": {
            name: {
                "seconds": statistics.median(s for s, _ in runs),
                "ratio": statistics.median(s / c for (s, _), c in zip(runs, copies, strict=True)),
                "peak_mb": max(m for _, m in runs),
            }
            for name, runs in results.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.1)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="Work below this folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = measure(Path(folder), options.gib, options.tp, options.rounds)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"{report['bytes'] / 2**30:.2f} GiB, tp_size {report['tp_size']}, {os.cpu_count()} cores,"
    )
    print(f"medians of {report['rounds']} rounds after one that warms the caches\n")
    print(f"| {'':27} | seconds | ratio to the copy | peak memory, MB |")
    print(f"|-{'-' * 27}-|--------:|------------------:|----------------:|")
    for name, c in report["contenders"].items():
        print(f"| {name:27} | {c['seconds']:7.2f} | {c['ratio']:17.2f} | {c['peak_mb']:15.0f} |")


if __name__ == "__main__":
    main()
