"""A report as one HTML page that needs nothing else: no scripts, no fonts, no pictures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import log10
from typing import Any

from shardkit.verification.report import Check, Report

STYLE = """
:root { color-scheme: light dark; --fg: #1d2430; --dim: #667085; --bg: #fff; --line: #d5dae2;
  --ok: #12805c; --bad: #c2263e; --bar: #3a6fd8; --allow: #b9860b; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e9ef; --dim: #98a2b3; --bg: #14181f;
  --line: #333b48; --ok: #4cc79c; --bad: #ff7285; --bar: #7aa5ff; --allow: #e2b84d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--fg); background: var(--bg); }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; }
code, td.hash { font-family: ui-monospace, monospace; font-size: .85em; overflow-wrap: anywhere; }
.dim { color: var(--dim); } .passed { color: var(--ok); } .failed { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
svg { display: block; width: 100%; height: auto; }
svg.plot { min-width: 44rem; }
svg text { fill: var(--dim); font: 11px ui-monospace, monospace; }
.error { fill: var(--bar); } .beyond { fill: var(--bad); }
.allowed { stroke: var(--allow); stroke-width: 2; } .grid { stroke: var(--line); }
.cell { fill: var(--bar); } .frame { fill: var(--line); }
"""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 960, 240, 48, 12, 20
MAX_RANKS_DRAWN = 64


def render_report_page(report: Report) -> str:
    """The page."""
    verdict = "passed" if report.passed else "failed"
    title = f"{report.folder}: verification {verdict}"
    parts = [
        f"<h1>{escape(report.folder)}</h1>",
        f'<p>Verification <strong class="{verdict}">{verdict}</strong></p>',
        *_render_checks(report.checks),
        *_render_blocks(report.checks),
        *_render_split(report.split),
        *_render_run(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _render_checks(checks: Sequence[Check]) -> Iterable[str]:
    rows = [
        [
            f"<strong>{escape(check.name)}</strong>",
            f'<span class="{escape(check.verdict)}">{escape(check.verdict)}</span>',
            "<br>".join([escape(check.summary), *(f"<b>{escape(f)}</b>" for f in check.faults)]),
        ]
        for check in checks
    ]
    yield "<h2>Levels</h2>"
    yield _make_table(["level", "verdict", "what was shown"], rows)


def _render_blocks(checks: Sequence[Check]) -> Iterable[str]:
    """For each dtype, the error of every block and the allowed one, as a plot."""
    numbers = next((c.numbers for c in checks if c.name == "numerics"), {})
    by_dtype: Any = numbers.get("by_block")
    if not by_dtype:
        return
    yield "<h2>Error by block</h2>"
    yield (
        '<p class="dim">The worst rank&rsquo;s error (bar) and what the unsharded model&rsquo;s'
        " own rounding allows (line), both as a share of the block&rsquo;s largest value; every"
        " block gets the reference&rsquo;s inputs.</p>"
    )
    for dtype, blocks in by_dtype.items():
        yield f"<h3>{escape(dtype)}</h3>"
        yield f'<div class="scroll">{_draw_errors(blocks)}</div>'


def _draw_errors(blocks: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each block, on a logarithmic scale."""
    values = [v for b in blocks for v in (b["error"], b["allowed"]) if 0 < v < float("inf")]
    low = int(log10(min(values, default=1e-9))) - 1
    high = int(log10(max(values, default=1.0))) + 1
    step = (WIDTH - LEFT) / max(len(blocks), 1)

    def find_y(value: float) -> float:
        exponent = log10(value) if value > 0 else low
        share = (min(max(exponent, low), high) - low) / (high - low)
        return TOP + (HEIGHT - BOTTOM - TOP) * (1 - share)

    shapes = []
    for exponent in range(low, high + 1):
        y = find_y(10.0**exponent)
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="0" y="{y + 4:.1f}">1e{exponent}</text>')
    for at, block in enumerate(blocks):
        x, width = LEFT + at * step, max(step * 0.7, 1)
        y, limit = find_y(block["error"]), find_y(block["allowed"])
        kind = "beyond" if block["excess"] > 1 else "error"
        label = (
            f"{block['block']}: {block['error']:.3g}, allowed {block['allowed']:.3g},"
            f" rank {block['tp_rank']}"
        )
        shapes.append(
            f'<g><title>{escape(label)}</title><rect class="{kind}" x="{x:.1f}" y="{y:.1f}"'
            f' width="{width:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"/><line class="allowed"'
            f' x1="{x:.1f}" x2="{x + width:.1f}" y1="{limit:.1f}" y2="{limit:.1f}"/></g>'
        )
    ends = [b["block"] for b in (*blocks[:1], *blocks[-1:])]
    shapes.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{escape(ends[0]) if ends else ""}</text>')
    if len(blocks) > 1:
        shapes.append(
            f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{escape(ends[-1])}</text>'
        )
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg>'


def _render_split(split: Mapping[str, Any]) -> Iterable[str]:
    """What each rank holds of each kind of tensor, and the digests."""
    if not split:
        return
    rows = [
        [
            f"<code>{escape(kind['tensors'])}</code>",
            escape(kind["style"]),
            str(kind["count"]),
            _draw_ranks(kind["bytes_by_rank"], kind["bytes"]),
        ]
        for kind in split["layout"]
    ]
    yield "<h2>What each rank holds</h2>"
    yield '<p class="dim">Of each kind of tensor, the share that each rank has, in order.</p>'
    yield _make_table(["tensors", "style", "count", "ranks"], rows)
    yield "<h2>Digests</h2>"
    digests = [["manifest", split["manifest_sha256"]], ["split", split["split_id"]]]
    digests += [["recipe", f"{split['recipe']} {split['recipe_sha256']}"]]
    digests += [
        [rank["name"], f"{rank['sha256']} ({rank['bytes']} bytes)"] for rank in split["ranks"]
    ]
    digests += [[f"source {k}", v] for k, v in split["source"].items() if v]
    yield _make_table(
        ["", "sha256 or identity"], [[escape(k), f"<code>{escape(v)}</code>"] for k, v in digests]
    )


def _draw_ranks(nbytes: Sequence[int], whole: int) -> str:
    """A bar for each rank, as high as its share of the whole in a frame."""
    drawn, most = nbytes[:MAX_RANKS_DRAWN], whole or 1
    bars = "".join(
        f'<g><title>rank {at}: {size} of {whole} bytes</title><rect class="frame" x="{at * 12}"'
        f' y="0" width="10" height="20"/><rect class="cell" x="{at * 12}"'
        f' y="{20 - 20 * size / most:.1f}" width="10" height="{20 * size / most:.1f}"/></g>'
        for at, size in enumerate(drawn)
    )
    width = 12 * len(drawn)
    return f'<svg viewBox="0 0 {width} 20" style="width:{width}px" role="img">{bars}</svg>'


def _render_run(report: Report) -> Iterable[str]:
    yield "<h2>How it was run</h2>"
    rows = [[escape(name), f"<code>{escape(v)}</code>"] for name, v in report.versions.items()]
    if report.command:
        rows.insert(0, ["command", f"<code>{escape(report.command)}</code>"])
    yield _make_table(["", ""], rows)
    yield "<details><summary>The same as JSON</summary><div class='scroll'><pre>"
    yield escape(json.dumps(report.to_json(), indent=2))
    yield "</pre></div></details>"


def _make_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names) if any(names) else ""
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>'
