"""What `shardkit plan --devices` shows: the ways to use some devices, and which to take."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from shardkit.cli.options import read_size
from shardkit.cli.output import format_bytes, format_count, print_json, print_line
from shardkit.planning.advice import (
    LINKS,
    MEMORY_BANDWIDTH,
    USABLE,
    Advice,
    DeviceOption,
)

COLUMNS = "{:>4} {:<7} {:>8} {:>12} {:>4} {:>14} {:>12} {:>12} {:>11} {:>9}"
TITLES = (
    "tp", "experts", "replicas", "weights", "fit", "KV tokens", "KV bytes", "read ~", "sent ~",
    "time ~",
)  # fmt: skip


def add_device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `--devices`: what each has, and what connects them."""
    for option in (
        click.option(
            "--memory-bandwidth",
            metavar="SIZE",
            default=str(MEMORY_BANDWIDTH),
            callback=read_size,
            help="Bytes per second of each device's memory, for estimates (default: 2T).",
        ),
        click.option(
            "--link",
            type=click.Choice(list(LINKS)),
            default="nvlink",
            help="What connects the devices, for estimates (default: nvlink).",
        ),
        click.option(
            "--memory", metavar="SIZE", callback=read_size, help="Memory of each device: 80G."
        ),
    ):
        command = option(command)
    return command


def show_advice(source: str, advice: Advice, as_json: bool) -> None:
    """Print which sizes fit, what each costs, and which to take."""
    if as_json:
        print_json(advice_to_json(source, advice))
        return
    devices = advice.devices
    print_line(
        f"{source}: {format_count(devices.count, 'device')} of {format_bytes(devices.memory)},"
        f" {devices.link}; {USABLE:.0%} of it for weights and cache"
    )
    print_line(COLUMNS.format(*TITLES))
    for option in advice.options:
        print_line(COLUMNS.format(*_list_cells(option)))
    for tp_size, reason in advice.refused.items():
        print_line(f"{tp_size:>4} impossible: {reason}")
    if advice.choice is None:
        print_line(f"Take         none: {advice.reason}")
    else:
        print_line(f"Take         {_describe_choice(advice.choice)}: {advice.reason}")
    link = LINKS[devices.link]
    print_line(
        "Exact        weights and KV bytes of the largest rank, and from them the KV tokens of a"
        " replica"
    )
    print_line(
        "Estimated    what a rank reads and sends for a token of one sequence, and the time:"
        f" read / {devices.bandwidth / 1e9:.0f} GB/s + sent / {link.bandwidth / 1e9:.1f} GB/s"
        f" + collectives * {link.latency * 1e6:.0f} us"
    )


def advice_to_json(source: str, advice: Advice) -> dict[str, Any]:
    """The advice as JSON values; `estimates` has what is not exact."""
    link = LINKS[advice.devices.link]
    return {
        "source": source,
        "devices": {**asdict(advice.devices), "usable": advice.devices.usable},
        "link": asdict(link),
        "context": advice.context,
        "options": [_option_to_json(option) for option in advice.options],
        "refused": [{"tp_size": n, "reason": text} for n, text in advice.refused.items()],
        "choice": advice.choice and _option_to_json(advice.choice),
        "reason": advice.reason,
    }


def _option_to_json(option: DeviceOption) -> dict[str, Any]:
    fields = asdict(option)
    estimates = {name: fields.pop(name) for name in ("read_bytes", "sent_bytes", "seconds")}
    return {**fields, "estimates": estimates}


def _list_cells(option: DeviceOption) -> tuple[str, ...]:
    return (
        str(option.tp_size),
        "whole" if option.is_expert_parallel else "",
        str(option.replicas),
        format_bytes(option.weight_bytes),
        "yes" if option.fits else "no",
        "" if option.kv_tokens is None else f"{option.kv_tokens:,}",
        "unknown" if option.kv_bytes is None else f"{option.kv_bytes:,}",
        format_bytes(option.read_bytes),
        "" if option.sent_bytes is None else format_bytes(option.sent_bytes),
        "" if option.seconds is None else f"{option.seconds * 1e3:.2f} ms",
    )


def _describe_choice(option: DeviceOption) -> str:
    kind = " with whole experts on each rank" if option.is_expert_parallel else ""
    return f"tp_size {option.tp_size}{kind}, {format_count(option.replicas, 'replica')}"
