"""`shardkit generate`: text from shards, as it comes."""

from pathlib import Path
from typing import Any

import click

from shardkit.cli.options import FOLDER, JSON
from shardkit.cli.output import print_json, print_line
from shardkit.cli.run_options import (
    DEVICE,
    DTYPE,
    TIMEOUT,
    end_on_sigterm,
    quiet_transformers,
)
from shardkit.errors import ManifestError
from shardkit.timeouts import Timeouts


@click.command()
@click.argument("shards", type=FOLDER)
@click.argument("prompt")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="The most tokens to generate.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="Sample at this temperature; 0 takes the likeliest token.",
)
@click.option("--seed", type=int, metavar="N", help="Sample the same tokens each time.")
@click.option("--verify", is_flag=True, help="Hash the very bytes that are loaded; refuse damage.")
@DTYPE
@DEVICE
@TIMEOUT
@JSON
def generate(
    shards: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    verify: bool,
    dtype: str | None,
    device: str | None,
    timeouts: Timeouts,
    as_json: bool,
) -> None:
    """Generate text from shards.

    SHARDS is a shard folder; as many ranks are started here as it was split for.  PROMPT is text,
    or token ids such as "1 403 407" where the folder has no tokenizer.  What is generated goes to
    stdout as it comes.

    \b
    Example:
      shardkit generate llama-tp4 "Once upon a time" --max-new-tokens 100
    """
    quiet_transformers()
    end_on_sigterm()
    import torch

    from shardkit import runtime
    from shardkit.runtime.engine.engine import has_tokenizer

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    asked = prompt if has_tokenizer(shards) else token_ids(prompt)
    wanted = getattr(torch, dtype) if dtype else None
    started = runtime.launch(shards, device=device, dtype=wanted, timeouts=timeouts, verify=verify)
    with started as engine:
        if as_json:
            ids = engine.generate(asked, seed, **options)[0].tolist()
            text = engine.tokenizer.decode(ids, skip_special_tokens=True) if asked is prompt else ""
            print_json({"ids": ids, "text": text})
            return
        for part in engine.stream(asked, seed, **options):
            click.echo(part if isinstance(part, str) else f"{part} ", nl=False)
    print_line()


def token_ids(prompt: str) -> list[int]:
    """Token ids written with spaces or commas between.  Raises ManifestError for anything else."""
    words = prompt.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ManifestError(f"the folder has no tokenizer, and {prompt!r} is no list of token ids")
    return [int(word) for word in words]
