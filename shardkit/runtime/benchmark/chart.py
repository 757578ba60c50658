"""The report of a benchmark as one SVG: the speed of each contender, and where its time goes."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
svg { --fg: #1d2430; --dim: #667085; --bg: #fff; --bar: #3a6fd8; --wait: #d99a2b; }
@media (prefers-color-scheme: dark) { svg { --fg: #e6e9ef; --dim: #98a2b3; --bg: #14181f;
  --bar: #7aa5ff; --wait: #e2b84d; } }
text { font: 12px system-ui, sans-serif; fill: var(--fg); } .dim { fill: var(--dim); }
.page { fill: var(--bg); } .bar { fill: var(--bar); } .wait { fill: var(--wait); }
.spread { stroke: var(--fg); stroke-width: 1.5; }
"""
WIDTH, LEFT, BARS, ROW, HEAD = 760, 170, 420, 26, 34


def render_chart(report: Mapping[str, Any]) -> str:
    """For each batch size, two groups of bars: speed-up over the baseline, and time for a token."""
    parts, top = [], 12
    for at, run in enumerate(report["contenders"][0]["runs"]):
        title = f"batch {run['batch']}, {report['workload']['prompt_tokens']} prompt tokens"
        for name, draw in (("Speed-up", _draw_speed), ("Time for a token", _draw_time)):
            rows = list(draw(report["contenders"], at, top + HEAD))
            parts += [_text(LEFT, top + 18, f"{name}, {title}"), *rows]
            top += HEAD + ROW * len(report["contenders"]) + 10
    machine = report["machine"]
    versions = f"shardkit {machine['shardkit']}, torch {machine['torch']}"
    versions += f", transformers {machine['transformers']}"
    rounds = f"medians of {report['rounds']} rounds, with the least and the most"
    parts.append(_text(12, top + 16, f"{machine['processor']}, {machine['cores']} cores", "dim"))
    parts.append(_text(12, top + 34, f"{versions}; {rounds}", "dim"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 46}" role="img">\n'
        f"<title>Speed of {escape(report['contenders'][0]['name'])} and others</title>\n"
        f"<style>{STYLE}</style>\n"
        f'<rect class="page" width="{WIDTH}" height="{top + 46}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def choose_time(run: Mapping[str, Any]) -> Mapping[str, float]:
    """What speed is measured by: the time for a token, or of a forward pass if there is none."""
    times: Mapping[str, float] = run["token_seconds"] or run["first_token_seconds"]
    return times


def _draw_speed(contenders: Sequence[Mapping[str, Any]], at: int, top: int) -> Iterator[str]:
    """How many times as fast as the first contender, from the slowest to the fastest round."""
    base = choose_time(contenders[0]["runs"][at])["median"]
    times = [choose_time(contender["runs"][at]) for contender in contenders]
    scale = BARS / max(base / time["least"] for time in times)
    for row, (contender, time) in enumerate(zip(contenders, times, strict=True)):
        y = top + row * ROW
        low, middle, high = (base / time[key] for key in ("most", "median", "least"))
        yield _text(12, y + 15, contender["name"])
        yield _bar("bar", LEFT, y, middle * scale)
        yield _line(LEFT + low * scale, LEFT + high * scale, y + 10)
        yield _text(LEFT + high * scale + 8, y + 15, f"{middle:.2f} x", "dim")


def _draw_time(contenders: Sequence[Mapping[str, Any]], at: int, top: int) -> Iterator[str]:
    """Milliseconds for a token, and the part of it in collectives, waits for ranks included."""
    times = [choose_time(contender["runs"][at])["median"] for contender in contenders]
    scale = BARS / max(times)
    for row, (contender, time) in enumerate(zip(contenders, times, strict=True)):
        y = top + row * ROW
        spread = contender["runs"][at]["collective_seconds"]
        wait = min(time, spread["median"]) if spread else 0.0
        yield _text(12, y + 15, contender["name"])
        yield _bar("bar", LEFT, y, (time - wait) * scale)
        yield _bar("wait", LEFT + (time - wait) * scale, y, wait * scale)
        share = f", {wait / time:.0%} in collectives" if spread else ""
        yield _text(LEFT + time * scale + 8, y + 15, f"{1000 * time:.1f} ms{share}", "dim")


def _text(x: float, y: float, text: str, name: str = "") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _bar(name: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{ROW - 6}"/>'


def _line(start: float, stop: float, y: float) -> str:
    return f'<line class="spread" x1="{start:.1f}" x2="{stop:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
