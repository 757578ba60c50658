"""`shardkit bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from shardkit.cli.options import (
    DEVICE,
    DTYPE,
    FOLDER,
    JSON,
    REDUCE_DTYPE,
    end_on_sigterm,
    quiet_transformers,
)
from shardkit.cli.output import print_json, print_line
from shardkit.cli.report_file import check_report_file, write_report_file

RUN_COLUMNS = ("first token ms", "tokens/s", "spread", "ratio", "in collectives")


@click.command()
@click.argument("shards", type=FOLDER, nargs=-1, required=True)
@click.option(
    "--against",
    type=FOLDER,
    metavar="SOURCE",
    help="Also run the unsharded checkpoint, on all cores or one GPU: the baseline of all ratios.",
)
@click.option(
    "--peer",
    "peers",
    type=click.Choice(["transformers"]),
    multiple=True,
    help="Also run SOURCE by another library's tensor parallelism over as many ranks"
    " (transformers' needs accelerate).",
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Also run SHARDS and SOURCE with compiled decoding; loading then compiles, too.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1,),
    show_default=True,
    metavar="N",
    help="Number of sequences at once; may be repeated.",
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
    help="Length of each prompt.",
)  # fmt: skip
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
    help="Number of tokens to generate after the first.",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
    help="How often each contender runs, in turns and in processes of its own.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.svg", callback=check_report_file,
    help="Also write the results as a chart.",
)  # fmt: skip
@DTYPE
@REDUCE_DTYPE
@DEVICE
@JSON
def bench(
    shards: tuple[Path, ...],
    against: Path | None,
    peers: tuple[str, ...],
    compiles: bool,
    plot: Path | None,
    rounds: int,
    as_json: bool,
    **workload: Any,
) -> None:
    """Measure how fast shards load and run.

    SHARDS are shard folders of one model, one for each number of ranks to compare. All ranks run on
    this machine. Reported are medians over the rounds, of the slowest rank: the time to load, the
    bytes read and the memory that a rank takes for it, the time to the first token, tokens per
    second, and the share of the time that ranks spend in collectives, waits included.

    \b
    Example:
      shardkit bench llama-tp2 llama-tp4 --against models/llama --batch 1 --batch 8
    """
    quiet_transformers()
    end_on_sigterm()
    from shardkit.runtime.benchmark.chart import render_chart
    from shardkit.runtime.benchmark.contenders import Workload, list_contenders
    from shardkit.runtime.benchmark.run_contenders import run_contenders

    contenders = list_contenders(shards, against, peers, compiles)
    chosen = {name: value for name, value in workload.items() if value is not None}
    report = run_contenders(
        contenders, Workload(**chosen), rounds, lambda line: click.echo(line, err=True)
    )
    if plot is not None:
        write_report_file(render_chart(report), plot)
    if as_json:
        print_json(report)
    else:
        show_report(report)


def show_report(report: Mapping[str, Any]) -> None:
    """Print a table of each batch size, and one of loading."""
    machine, workload = report["machine"], report["workload"]
    print_line(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']},")
    print_line(f"transformers {machine['transformers']}, medians of rounds: {report['rounds']}")
    contenders = report["contenders"]
    rows: list[tuple[str, ...]] = [("load", "seconds", "spread", "read MB", "memory MB a rank")]
    for each in contenders:
        load, numbers = each["load_seconds"], (each["read_bytes"], each["memory_bytes"])
        mb = [f"{number['median'] / 1e6:.0f}" if number else "-" for number in numbers]
        rows.append((each["name"], f"{load['median']:.2f}", _format_spread(load), *mb))
    _print_rows(rows)
    for at, first in enumerate(contenders[0]["runs"]):
        rows = [(f"batch {first['batch']}", *RUN_COLUMNS)]
        base = contenders[0]["runs"][at]["token_seconds"]
        rows += [_format_run(each["name"], each["runs"][at], base) for each in contenders]
        _print_rows(rows)
    print_line()
    print_line(
        f"Prompts of {workload['prompt_tokens']} tokens, {workload['new_tokens']} more generated."
    )


def _format_run(
    name: str, run: Mapping[str, Any], base: Mapping[str, float] | None
) -> tuple[str, ...]:
    first, token, wait = run["first_token_seconds"], run["token_seconds"], run["collective_seconds"]
    cells = [name, f"{1000 * first['median']:.1f}"]
    if token is None or base is None:
        return (*cells, "-", "-", "-", "-")
    rates = {key: run["batch"] / token[key] for key in ("least", "median", "most")}
    spread = _format_spread({"least": rates["most"], "most": rates["least"]})
    share = f"{min(1.0, wait['median'] / token['median']):.0%}" if wait else "-"
    return (
        *cells,
        f"{rates['median']:.1f}",
        spread,
        f"{base['median'] / token['median']:.2f}",
        share,
    )


def _format_spread(spread: Mapping[str, float]) -> str:
    return f"{spread['least']:.1f} to {spread['most']:.1f}"


def _print_rows(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print_line()
    for first, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print_line("  ".join([first.ljust(widths[0]), *padded]))
