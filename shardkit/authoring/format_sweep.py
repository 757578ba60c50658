"""Proves every format on every model that suits it, and publishes the results."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardkit.authoring.check import SCRATCH
from shardkit.authoring.format_check import FaultResult, FormatProof, inject_faults, prove_format
from shardkit.authoring.format_samples import FormatSample, list_format_models, list_format_samples
from shardkit.authoring.publishing import format_table, name_layout
from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.stored_results import ResultsFile
from shardkit.recipe.catalog import find_recipe_folder
from shardkit.recipe.formats.format import FOLDER

PAGE = "FORMATS.md"
FAULT_MODEL = "grouped-heads"
STACKED_MODEL = "stacked-experts"


@dataclass(frozen=True)
class FormatResult:
    """The results of one format sample, as they are stored.

    Attributes:
        digest: The digest of what they are of.
        proofs: A JSON object for each model and number of ranks.
        faults: A JSON object for each injected fault.
    """

    digest: str
    proofs: Sequence[Mapping[str, Any]]
    faults: Sequence[Mapping[str, Any]]

    @property
    def passed(self) -> bool:
        """Whether no proof failed and no fault was missed."""
        is_proven = all(proof["verdict"] != "failed" for proof in self.proofs)
        return is_proven and all(fault["finding"] for fault in self.faults)


FORMAT_RESULTS = ResultsFile("formats.json", FormatResult)


def sweep_formats(folder: Path, only_stale: bool = False) -> Iterator[tuple[str, FormatResult]]:
    """Prove every format and store each result as it is done.

    Args:
        folder: Where the results and the page are stored.
        only_stale: Whether to leave out those whose results are up to date.
    """
    results = FORMAT_RESULTS.read(folder)
    samples = list(list_format_samples())
    with RankPool() as pool:
        for sample in samples:
            stored = results.get(sample.name)
            if only_stale and stored is not None and stored.digest == digest_format(sample):
                continue
            results[sample.name] = result = sweep_format(sample, pool)
            kept = {each.name: results[each.name] for each in samples if each.name in results}
            write_format_results(folder, kept)
            yield sample.name, result


def sweep_format(sample: FormatSample, pool: RankPool) -> FormatResult:
    """Prove a format on every model, and inject faults into the shards of one."""
    proofs: list[FormatProof] = []
    faults: list[FaultResult] = []
    for model in list_format_models():
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            proofs += prove_format(model, sample, pool, Path(scratch))
    chosen = STACKED_MODEL if sample.form.codes.follows_parameter else FAULT_MODEL
    model = next(model for model in list_format_models() if model.name == chosen)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        faults += inject_faults(model, sample, pool, Path(scratch))
    digest = digest_format(sample)
    return FormatResult(digest, [asdict(proof) for proof in proofs], [asdict(f) for f in faults])


def digest_format(sample: FormatSample) -> str:
    """The digest of a format's file and of the samples; results of another are stale."""
    folder = find_recipe_folder() / FOLDER
    parts = [folder / f"{sample.form.name}.toml", folder / "samples" / "models.toml"]
    data = b"\n".join(path.read_bytes() for path in parts)
    stated = json.dumps([sample.name, sample.statement, sample.options], sort_keys=True)
    return hashlib.sha256(data + stated.encode()).hexdigest()[:16]


def count_proofs(results: Mapping[str, FormatResult]) -> Counter[str]:
    """How many proofs each format has, by its title."""
    titles = {each.name: each.form.title for each in list_format_samples()}
    return Counter(
        titles[name]
        for name, result in results.items()
        for proof in result.proofs
        if proof["verdict"] == "proven"
    )


def write_format_results(folder: Path, results: Mapping[str, FormatResult]) -> None:
    """Store results, and the page made of them."""
    FORMAT_RESULTS.write(folder, results)
    (folder / PAGE).write_text(render_formats(results))


def render_formats(results: Mapping[str, FormatResult]) -> str:
    """The page of all formats in Markdown."""
    proofs = [proof for result in results.values() for proof in result.proofs]
    faults = [fault for result in results.values() for fault in result.faults]
    proven = sum(proof["verdict"] == "proven" for proof in proofs)
    refused = [proof for proof in proofs if proof["verdict"] == "refused"]
    num_detected = sum(bool(fault["finding"]) for fault in faults)
    lines = [
        "# Quantized formats",
        "",
        "Written by `make sweep` (`shardkit recipes check --formats --write`); do not edit.",
        "",
        f"Small random models, quantized to each format's specification, with sizes that do not"
        f" suit its blocks: {proven} of {len(proofs)} proofs passed, and {len(refused)} were"
        " refused before anything was written. A proof is a split, a merge and a chain of reshards"
        " bit for bit, and outputs and cached decoding over real ranks in float32, compared with"
        " the unsharded model on weights that another path computes.",
        "",
        f"{len(faults)} faults were injected into shards, and {num_detected} were detected by the"
        " numbers.",
        "",
        "## Formats and models",
        "",
        "The numbers of ranks that are proven; *ep*: with whole experts on each; in brackets:"
        " refused.",
        "",
        *_render_table(results),
        "",
        "## Refusals",
        "",
        *format_table(
            ["format", "model", "tp:", "why"],
            [[p["format"], p["model"], name_layout(p), p["detail"]] for p in refused],
        ),
        "",
        "## Injected faults",
        "",
        *format_table(
            ["format", "fault", "found by"],
            [[f["format"], f["fault"], _shorten(f["finding"]) or "**missed**"] for f in faults],
        ),
    ]
    return "\n".join(lines) + "\n"


def _render_table(results: Mapping[str, FormatResult]) -> Iterator[str]:
    """Formats and models, and over how many ranks each is proven."""
    proofs = [proof for result in results.values() for proof in result.proofs]
    models = list(dict.fromkeys(proof["model"] for proof in proofs))
    titles = {each.name: each.form.title for each in list_format_samples()}
    rows = [
        [titles[name], name, *(_describe_cell(result, model) for model in models)]
        for name, result in results.items()
    ]
    return format_table(["format", "sample", *models], rows)


def _describe_cell(result: FormatResult, model: str) -> str:
    marks = {"proven": "{}", "refused": "({})", "failed": "**{} failed**"}
    proofs = [proof for proof in result.proofs if proof["model"] == model]
    return " ".join(marks[p["verdict"]].format(name_layout(p)) for p in proofs) or "-"


def _shorten(finding: str) -> str:
    """The tensor or module that a finding names."""
    return finding.split("; ")[-1].replace("|", "\\|")
