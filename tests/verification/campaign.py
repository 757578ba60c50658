"""Many wrong layouts in 16 bits, and many right ones, each verified with ranks in turns.

    python -m tests.verification.campaign wrong --seeds 20 [--mutants 48] --report wrong.jsonl
    python -m tests.verification.campaign right --trials 500 --report right.jsonl

Each trial is a line of the report; trials that it has already are not run again, so a campaign that
was stopped goes on. It ends with 1 if a wrong layout passed, or a right one did not.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, product, zip_longest
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch

from shardkit.authoring import samples
from shardkit.authoring.mutations import Mutant, list_mutants, list_rules
from shardkit.checkpoint import Checkpoint, read_config
from shardkit.errors import ShardkitError
from shardkit.layout import Span
from shardkit.planning import Plan, make_plan
from shardkit.recipe import find_recipe
from shardkit.recipe.compose import compose_recipe
from shardkit.recipe.recipe import Recipe
from shardkit.verification.block_check import check_blocks
from tests.helpers.model_samples import VARIANTS
from tests.helpers.runtime_helpers import cut

DENSE = ("llama-two-kv-heads", "qwen3-6-heads-2-kv", "gpt2", "gpt_neox", "phi3", "bloom",
         "falcon-grouped", "olmo2")  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v3", "olmoe")
HYBRIDS = ("bamba", "granitemoehybrid", "jamba", "falcon_h1", "nemotron_h", "qwen3_next")
# What is computed in another way, of the same parts on every rank.
COMPUTED = {"norm not reduced", "input not gathered", "output not padded"}
HALF = (torch.float16, torch.bfloat16)
EVERY = (torch.float32, *HALF)
FLOAT32_ONLY = {"reformer", "deberta", "deberta-nine-heads", "deberta-base", "xlstm"}
TP_SIZE = 2
Outcome = Literal["passed", "failed", "refused"]


@dataclass(frozen=True)
class Trial:
    """One verification: of a sample, with a fault in a rule of its recipe, or with none."""

    sample: str
    dtype: str
    seed: int
    fault: str = ""
    pattern: str = ""


def list_layout_mutants(name: str) -> list[Mutant]:
    """The wrong layouts of a sample's recipe: other parts on a rank, or computed in another way."""
    with tempfile.TemporaryDirectory() as scratch:
        source = samples.make_sample(VARIANTS[name], Path(scratch))
        with Checkpoint(source) as checkpoint:
            config, specs = checkpoint.config, checkpoint.specs()
        recipe = compose_recipe(find_recipe(config), read_config(source))
    right = make_plan(specs, recipe, config, TP_SIZE)

    def is_wrong(mutant: Mutant) -> bool:
        if mutant.fault != "layout swapped":
            return mutant.fault in COMPUTED
        try:
            wrong = make_plan(specs, mutant.recipe, config, TP_SIZE)
        except ShardkitError:
            return True
        return _list_parts(wrong) != _list_parts(right)

    return [
        mutant for mutant in list_mutants(recipe, list_rules(recipe, right)) if is_wrong(mutant)
    ]


def _list_parts(plan: Plan) -> list[tuple[Span, ...]]:
    return [p.spans(rank) for p in plan.placements for rank in plan.mesh.ranks()]


def run_trial(trial: Trial, recipe: Recipe | None) -> Outcome:
    """Make the sample from the seed, split it by the recipe, and verify it."""
    with (
        patch.object(samples, "WEIGHT_SEED", trial.seed),
        patch.object(samples, "NOISE_SEED", 1000 + trial.seed),
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        dtype = getattr(torch, trial.dtype)
        source = samples.make_sample(VARIANTS[trial.sample], Path(scratch) / "source", dtype)
        shards = Path(scratch) / "shards"
        try:
            check = check_blocks(shards, cut(source, shards, TP_SIZE, recipe), source)
        except ShardkitError:
            return "refused"
        return "passed" if check.verdict == "passed" else "failed"


def list_wrong(
    seeds: int, most_mutants: int | None = None
) -> Iterator[tuple[Trial, Recipe | None]]:
    """Every wrong layout in 16 bits, or so many spread over the samples, seed after seed."""
    for seed, (name, mutant), dtype in product(range(seeds), list_spread(most_mutants), HALF):
        kind = str(dtype).removeprefix("torch.")
        yield Trial(name, kind, seed, mutant.fault, mutant.pattern), mutant.recipe


def list_spread(most: int | None = None) -> list[tuple[str, Mutant]]:
    """Wrong layouts by sample, the first of each before any second: however few, they are spread.

    A sample's own come in turns of their kinds of fault.
    """
    by_sample = [
        [(name, mutant) for mutant in list_layout_mutants(name)]
        for name in chain(*zip_longest(DENSE, MIXTURES, HYBRIDS))
        if name
    ]
    return list(islice(filter(None, chain(*zip_longest(*by_sample))), most))


def list_right(count: int) -> Iterator[tuple[Trial, Recipe | None]]:
    """So many: each sample of every family, seed after seed, each time in another of the dtypes.

    A few model classes do not run in 16 bits, whoever runs them: these have float32 alone.
    """
    for number in range(count):
        seed, at = divmod(number, len(VARIANTS))
        name = [*VARIANTS][at]
        dtype = torch.float32 if name in FLOAT32_ONLY else EVERY[(at + seed) % len(EVERY)]
        yield Trial(name, str(dtype).removeprefix("torch."), seed), None


def run_campaign(
    trials: Iterator[tuple[Trial, Recipe | None]], report: Path, deadline: float
) -> Counter[str]:
    """Run the trials that the report has not, until a time; how each of all has ended."""
    lines = report.read_text().splitlines() if report.exists() else []
    done = {json.dumps(each["trial"]): each["outcome"] for each in map(json.loads, lines)}
    with report.open("a") as file:
        for trial, recipe in trials:
            key = json.dumps(asdict(trial))
            if key in done:
                continue
            if time.monotonic() > deadline:
                break
            done[key] = run_trial(trial, recipe)
            file.write(json.dumps({"trial": asdict(trial), "outcome": done[key]}) + "\n")
            file.flush()
    return Counter(done.values())


def main(arguments: Sequence[str]) -> int:
    """Run a campaign; 1 if a verdict was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["wrong", "right"])
    parser.add_argument("--seeds", type=int, default=20, help="of each wrong layout")
    parser.add_argument("--mutants", type=int, help="so many wrong layouts (default: all)")
    parser.add_argument("--trials", type=int, default=500, help="so many right splits")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=600)
    options = parser.parse_args(arguments)
    is_wrong = options.which == "wrong"
    trials = list_wrong(options.seeds, options.mutants) if is_wrong else list_right(options.trials)
    counts = run_campaign(trials, options.report, time.monotonic() + 60 * options.minutes)
    print(dict(counts))
    return int(counts["passed"] > 0 if is_wrong else counts["passed"] < counts.total())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
