"""The page on how drafting does on every generative model type of transformers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from shardkit.authoring.draft.draft_all import DraftRecord
from shardkit.authoring.draft.failure import STAGES
from shardkit.authoring.draft.search import TP_SIZES
from shardkit.authoring.publishing import format_table


def render_drafts(records: Sequence[DraftRecord]) -> str:
    """The page in Markdown."""
    passed = [record for record in records if record.passed]
    failed = [record for record in records if not record.passed]
    sections = (
        _render_head(records, passed),
        _render_failures(failed),
        _render_passed(passed),
        _render_failed(failed),
    )
    return "\n".join(line for section in sections for line in section).rstrip() + "\n"


def _render_head(records: Sequence[DraftRecord], passed: Sequence[DraftRecord]) -> Iterator[str]:
    versions = sorted({record.transformers for record in records})
    built = [r for r in records if r.stage not in ("model class", "tiny model")]
    yield "# Drafts"
    yield ""
    yield "Written by `shardkit recipes draft --all`; do not edit."
    yield ""
    yield (
        "`shardkit recipes draft` writes a first recipe for a model type. Here it drafted every"
        f" generative model type of transformers {', '.join(versions)} from the type's default"
        " config, without looking at the bundled recipes. A draft passes if every check of"
        " `shardkit recipes check` passes over 2 ranks, and over 4 if its counts allow: every"
        " tensor has one rule, the masked sum, the merge, and the outputs and decoding over real"
        " ranks."
    )
    yield ""
    yield from format_table(("", "types:", "share:"), _summary_rows(records, built, passed))
    yield ""
    yield from _render_measures(records, passed)


def _summary_rows(
    records: Sequence[DraftRecord], built: Sequence[DraftRecord], passed: Sequence[DraftRecord]
) -> Iterator[tuple[object, ...]]:
    divided = [record for record in passed if record.regions]
    yield "generative model types", len(records), ""
    yield "passed", len(passed), _format_share(len(passed), len(records))
    yield (
        "passed, of those of which a tiny model can be built and run",
        f"{len(passed)} of {len(built)}",
        _format_share(len(passed), len(built)),
    )
    yield (
        "passed, and divide more than the vocabulary",
        len(divided),
        _format_share(len(divided), len(records)),
    )


def _render_measures(
    records: Sequence[DraftRecord], passed: Sequence[DraftRecord]
) -> Iterator[str]:
    rows = []
    for tp_size in TP_SIZES:
        shares = sorted(s for r in passed if (s := r.share(tp_size)) is not None)
        if shares:
            title = f"largest rank's share of the bytes over {tp_size} ranks, of those that passed"
            rows.append((title, *(f"{value:.0%}" for value in _quantiles(shares))))
    if records:
        seconds = sorted(record.seconds for record in records)
        rows.append(("seconds per type", *(f"{value:.1f}" for value in _quantiles(seconds))))
    yield from format_table(("", "median:", "90th percentile:", "largest:"), rows)
    yield ""
    yield (
        "The tiny models have wide norms and position tables for their size, so the same draft"
        " divides a larger share of a real checkpoint."
    )
    yield ""


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the 90th percentile and the largest of sorted values."""
    return median(values), values[min(len(values) * 9 // 10, len(values) - 1)], values[-1]


def _format_share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _render_failures(failed: Sequence[DraftRecord]) -> Iterator[str]:
    counts = Counter(record.stage for record in failed if record.stage)
    yield "## Why drafts fail"
    yield ""
    rows = [(STAGES[stage], count) for stage, count in counts.most_common()]
    yield from format_table(("reason", "types:"), rows)
    yield ""


def _render_passed(passed: Sequence[DraftRecord]) -> Iterator[str]:
    yield "## Drafts that passed"
    yield ""
    yield (
        "*Regions*: attention and feed-forward layers that are divided, by pattern. *Replicated*:"
        " large modules that every rank holds, by pattern. *Largest rank*: its share of the tiny"
        " model's bytes, over 2 and 4 ranks."
    )
    yield ""
    titles = ("model type", "regions:", "replicated:", "largest rank:", "seconds:")
    yield from format_table(titles, map(_passed_row, passed))
    yield ""


def _passed_row(record: DraftRecord) -> tuple[object, ...]:
    shares = [s for size in TP_SIZES if (s := record.share(size)) is not None]
    return (
        record.model_type,
        record.regions,
        record.replicated,
        " / ".join(f"{share:.0%}" for share in shares),
        f"{record.seconds:.1f}",
    )


def _render_failed(failed: Sequence[DraftRecord]) -> Iterator[str]:
    for stage, title in STAGES.items():
        rows = [(r.model_type, _escape_cell(r.reason)) for r in failed if r.stage == stage]
        if rows:
            yield f"## Failed: {title}"
            yield ""
            yield from format_table(("model type", "reason"), rows)
            yield ""


def _escape_cell(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return text
