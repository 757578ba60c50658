"""Memory and time of a verification with ranks in turns, below a limit that the kernel enforces.

    python benchmarks/verify_memory.py [--gib 2 4 8] [--tp 2] [--limit 1GiB] [--folder DIR] [--json]
    python benchmarks/verify_memory.py --compare [--gib 2] [--tp 4] [--rounds 1] [--folder DIR]

Each model is a random Llama in bfloat16, as large as asked for, split by `shardkit split` and
verified, every level, by `shardkit verify --ranks turns` in a process whose writable private memory
is limited (RLIMIT_DATA; an allocation beyond it fails). Its address space cannot be: the libraries
alone map more. The baseline is the peak of the same command on a tiny model, which has imported and
used all that the others do. What counts is the peak above it, over the largest block in float64: at
most 2.5. With --compare, the level numerics alone, with ranks in turns and as it was before there
were any: the unsharded model twice, whole, and a process for each rank; in turns, paired.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.checkpoint.header import encode_header
from shardkit.output.available_memory import parse_size
from shardkit.tensor import TensorSpec

HEADS, KV_HEADS = 32, 8
ALLOWED = 2.5  # the peak above the baseline, over the largest block in the reference's dtype
WIDEST = 8  # bytes of a number in float64
MIB = 1 << 20
CHUNK = 8 << 20
CLI = [sys.executable, "-m", "shardkit"]
PAGE = os.sysconf("SC_PAGE_SIZE")
NOISE = 0.02  # the standard deviation of the weights
PROGRAMS = {
    "ranks in turns": "check = check_blocks(shards, manifest, source)",
    "whole, real ranks": (
        "with RankProcesses(manifest.tp_size) as ranks:\n"
        "    check = check_numerics(shards, manifest, source, ShardedModel(ranks))"
    ),
}
IMPORTS = """
import json, sys
from pathlib import Path
from shardkit.runtime.engine.rank_processes import RankProcesses
from shardkit.shards import read_manifest
from shardkit.verification.block_check import check_blocks
from shardkit.verification.models import ShardedModel
from shardkit.verification.numerics import check_numerics
if __name__ == "__main__":
    shards, source = map(Path, sys.argv[1:])
    manifest = read_manifest(shards)
"""


@dataclass(frozen=True)
class Widths:
    """The sizes of a Llama that has as many query heads as any, and 8 kv heads."""

    hidden: int
    ffn: int
    vocabulary: int

    @property
    def kv(self) -> int:
        return self.hidden * KV_HEADS // HEADS


LARGE, TINY = Widths(2560, 6912, 12288), Widths(256, 512, 256)


def list_specs(widths: Widths, layers: int) -> list[TensorSpec]:
    """The tensors of a Llama in bfloat16."""
    hidden, ffn, kv = widths.hidden, widths.ffn, widths.kv
    shapes = {"model.embed_tokens": (widths.vocabulary, hidden), "model.norm": (hidden,),
              "lm_head": (widths.vocabulary, hidden)}  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "self_attn.q_proj": (hidden, hidden), at + "self_attn.k_proj": (kv, hidden),
                   at + "self_attn.v_proj": (kv, hidden), at + "self_attn.o_proj": (hidden, hidden),
                   at + "mlp.gate_proj": (ffn, hidden), at + "mlp.up_proj": (ffn, hidden),
                   at + "mlp.down_proj": (hidden, ffn), at + "input_layernorm": (hidden,),
                   at + "post_attention_layernorm": (hidden,)}  # fmt: skip
    return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]


def measure_largest_block(widths: Widths) -> int:
    """Bytes of the largest block, a layer or the embedding, in float64."""
    layer = sum(spec.nbytes for spec in list_specs(widths, 1) if ".layers." in spec.name)
    return max(layer, widths.vocabulary * widths.hidden * 2) * WIDEST // 2


def make_source(folder: Path, gib: float, widths: Widths = LARGE) -> int:
    """Write a checkpoint of about `gib` GiB of normal numbers; the bytes of its weights."""
    one, two = (sum(spec.nbytes for spec in list_specs(widths, n)) for n in (1, 2))
    specs = list_specs(widths, max(1, round((gib * 2**30 - one) / (two - one)) + 1))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
              "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
              "hidden_size": widths.hidden, "intermediate_size": widths.ffn,
              "vocab_size": widths.vocabulary, "eos_token_id": None,
              "num_hidden_layers": len(specs) // 9, "torch_dtype": "bfloat16"}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    noise, random_state = make_noise(), random.Random(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(specs, {"format": "pt"}))
        for spec in specs:
            for start in range(0, spec.nbytes, CHUNK):
                at = 2 * random_state.randrange(CHUNK // 4)  # so that no two tensors are equal
                file.write(noise[at : at + min(CHUNK, spec.nbytes - start)])
        file.flush()
        os.fsync(file.fileno())
    return sum(spec.nbytes for spec in specs)


def make_noise() -> memoryview:
    """Normal numbers in bfloat16, 1.5 chunks: a window of them is a chunk. Made elsewhere.

    A process's peak starts at its parent's, so this one must not import torch.
    """
    program = (
        "import sys, torch; torch.manual_seed(0);"
        f" noise = torch.randn({3 * CHUNK // 4}) * {NOISE};"
        " sys.stdout.buffer.write(noise.bfloat16().view(torch.uint8).numpy().tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    return memoryview(done.stdout)


def run(command: list[str], limit: int | None = None) -> dict[str, Any]:
    """A command: seconds, its peak resident memory and that of all its processes, its output.

    Of all processes, what is private is added up, five times a second.
    """
    data = "unlimited" if limit is None else limit // 1024
    limited = ["sh", "-c", f'ulimit -s 1024; ulimit -d {data}; exec "$@"', "sh", *command]
    started, every, ended = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(limited, stdout=output, stderr=errors, start_new_session=True)
        while not ended:
            time.sleep(0.2)
            every = max(every, sum(map(_count_private_bytes, _list_session(process.pid))))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        text, last = output.read(), errors.read().decode().splitlines()[-1:]
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])}: exit {process.returncode}: {last}")
    peak = usage.ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "all_processes": every, "output": text}


def _list_session(session: int) -> list[Path]:
    folders = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            folders.append(folder)
    return folders


def _count_private_bytes(process: Path) -> int:
    try:
        _, resident, shared, *_ = map(int, (process / "statm").read_text().split())
    except OSError:
        return 0
    return (resident - shared) * PAGE


def split(source: Path, out: Path, tp_size: int) -> None:
    run([*CLI, "split", str(source), str(out), "--tp", str(tp_size)])


def verify(source: Path, shards: Path, limit: int) -> dict[str, Any]:
    """A verification below a limit: what it took, and its report's numbers."""
    command = [*CLI, "verify", str(shards), "--against", str(source), "--ranks", "turns"]
    result = run([*command, "--max-memory", str(limit), "--json"], limit)
    report = json.loads(result.pop("output"))
    checks = {check["name"]: check for check in report["checks"]}
    if any(check["verdict"] != "passed" for check in checks.values()):
        raise SystemExit(f"{shards}: {checks}")
    numbers = checks["numerics"]["numbers"]
    return result | {
        key: numbers[key] for key in ("bytes_read", "peak_weight_bytes", "block_count")
    }


def measure(
    folder: Path, gib: float, tp_sizes: list[int], limit: int, widths: Widths = LARGE
) -> list[dict[str, Any]]:
    """A model of this size, verified over each number of ranks."""
    nbytes, rows = make_source(folder / "source", gib, widths), []
    for tp_size in tp_sizes:
        split(folder / "source", folder / "shards", tp_size)
        row = verify(folder / "source", folder / "shards", limit)
        rows.append({"bytes": nbytes, "tp_size": tp_size, **row})
        shutil.rmtree(folder / "shards")
    shutil.rmtree(folder / "source")
    return rows


def compare(folder: Path, gib: float, tp_size: int, rounds: int) -> list[dict[str, Any]]:
    """Every round runs both ways, one after the other, on the same warm files."""
    nbytes, rows = make_source(folder / "source", gib), []
    split(folder / "source", folder / "shards", tp_size)
    for _ in range(rounds):
        for name, program in PROGRAMS.items():
            body = "\n".join(f"    {line}" for line in program.splitlines())
            text = f"{IMPORTS}{body}\n    print(check.verdict)\n"
            (folder / "program.py").write_text(text)
            arguments = [str(folder / "shards"), str(folder / "source")]
            result = run([sys.executable, str(folder / "program.py"), *arguments])
            if result.pop("output").split()[-1:] != [b"passed"]:
                raise SystemExit(f"{name}: did not pass")
            rows.append({"bytes": nbytes, "tp_size": tp_size, "way": name, **result})
    return rows


def measure_imports() -> dict[str, int]:
    """Of a process that has imported what a verification does: address space, private memory."""
    program = f"{IMPORTS.partition('if __name__')[0]}print(Path('/proc/self/status').read_text())"
    status = run([sys.executable, "-c", program])["output"].decode()
    fields = {line.partition(":")[0]: line.split()[1:2] for line in status.splitlines() if line}
    return {name: int(fields[name][0]) * 1024 for name in ("VmSize", "VmData", "VmRSS")}


def measure_sizes(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every size over every number of ranks, and the baseline."""
    (tiny,) = measure(folder, 0, options.tp[:1], options.limit, TINY)
    rows = [row for gib in options.gib for row in measure(folder, gib, options.tp, options.limit)]
    for row in rows:
        row["ratio"] = (row["peak"] - tiny["peak"]) / measure_largest_block(LARGE)
    return {"imports": measure_imports(), "baseline": tiny["peak"], "rows": rows}


def print_sizes(report: dict[str, Any], limit: int) -> None:
    size, data, resident = (report["imports"][name] / 1e6 for name in ("VmSize", "VmData", "VmRSS"))
    baseline, largest = report["baseline"] / 1e6, measure_largest_block(LARGE) / 1e6
    print(f"after the imports: {size:.0f} MB of address space, {data:.0f} MB writable and private,")
    print(f"{resident:.0f} MB resident; limit {limit / 1e6:.0f} MB writable and private; baseline")
    print(f"{baseline:.0f} MB; largest block {largest:.0f} MB\n")
    print("| GiB | tp | blocks | seconds | peak, MB | over the largest block | read, GB |")
    print("|----:|---:|-------:|--------:|---------:|-----------------------:|---------:|")
    for row in report["rows"]:
        print(
            f"| {row['bytes'] / 2**30:.2f} | {row['tp_size']} | {row['block_count']} |"
            f" {row['seconds']:.0f} | {row['peak'] / 1e6:.0f} | {row['ratio']:.2f} |"
            f" {row['bytes_read'] / 1e9:.1f} |"
        )


def print_ways(rows: list[dict[str, Any]]) -> None:
    print("| way | GiB | tp | seconds | peak of this process, MB | of all, MB |")
    print("|-----|----:|---:|--------:|-------------------------:|-----------:|")
    for row in rows:
        print(
            f"| {row['way']} | {row['bytes'] / 2**30:.2f} | {row['tp_size']} |"
            f" {row['seconds']:.0f} | {row['peak'] / 1e6:.0f} | {row['all_processes'] / 1e6:.0f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--limit", type=parse_size, default=1 << 30)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="Work below this folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if options.compare:
            rows = compare(Path(name), options.gib[0], options.tp[0], options.rounds)
            report: dict[str, Any] = {"rows": rows}
        else:
            report = measure_sizes(Path(name), options)
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.compare:
        print_ways(report["rows"])
    else:
        print_sizes(report, options.limit)
    return int(any(row.get("ratio", 0) > ALLOWED for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
