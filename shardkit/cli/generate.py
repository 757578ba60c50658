"""`shardkit generate`: text from shards, as it comes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardkit.cli.options import (
    DEVICE,
    DTYPE,
    FOLDER,
    JSON,
    REDUCE_DTYPE,
    TIMEOUT,
    end_on_sigterm,
    quiet_transformers,
)
from shardkit.cli.output import print_json, print_line
from shardkit.errors import ManifestError
from shardkit.timeouts import Timeouts

if TYPE_CHECKING:
    from shardkit.runtime import Engine
    from shardkit.runtime.packing import Dequantize


@click.command()
@click.argument("shards", type=FOLDER)
@click.argument("prompt")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Maximum number of tokens to generate.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option("--seed", type=int, metavar="N", help="Random seed for sampling.")
@click.option("--verify", is_flag=True, help="Check each shard's SHA-256 while loading it.")
@click.option(
    "--dequantize",
    type=click.Choice(["forward", "load"]),
    default="forward",
    show_default=True,
    help="Compute quantized weights as layers run, in the memory of the shard; or once at load, for"
    " speed, in that of 16-bit weights.",
)
@DTYPE
@REDUCE_DTYPE
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
    dequantize: "Dequantize",
    dtype: str | None,
    reduce_dtype: str | None,
    device: str | None,
    timeouts: Timeouts,
    as_json: bool,
) -> None:
    """Generate text from shards.

    SHARDS is a shard folder; one process per rank is started on this machine. PROMPT is text, or
    token ids such as "1 403 407" if the folder has no tokenizer. Tokens are printed as they are
    generated.

    \b
    Example:
      shardkit generate llama-tp4 "Once upon a time" --max-new-tokens 100
    """
    quiet_transformers()
    end_on_sigterm()
    import torch

    from shardkit import runtime
    from shardkit.runtime.engine.prompts import has_tokenizer

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    tokens = prompt if has_tokenizer(shards) else parse_token_ids(prompt)
    loading: dict[str, Any] = {"device": device, "timeouts": timeouts, "verify": verify}
    loading |= {"dtype": getattr(torch, dtype) if dtype else None, "dequantize": dequantize}
    loading["reduce_dtype"] = getattr(torch, reduce_dtype) if reduce_dtype else None
    with runtime.launch(shards, **loading) as engine:
        if as_json:
            _print_ids(engine, tokens, seed, options)
            return
        for part in engine.stream(tokens, seed, **options):
            click.echo(part if isinstance(part, str) else f"{part} ", nl=False)
    print_line()


def _print_ids(
    engine: "Engine", tokens: str | list[int], seed: int | None, options: dict[str, Any]
) -> None:
    ids = engine.generate(tokens, seed, **options)[0].tolist()
    is_text = isinstance(tokens, str)
    text = engine.tokenizer.decode(ids, skip_special_tokens=True) if is_text else ""
    print_json({"ids": ids, "text": text})


def parse_token_ids(prompt: str) -> list[int]:
    """Token ids written with spaces or commas between. Raises ManifestError for anything else."""
    words = prompt.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ManifestError(
            f"the folder has no tokenizer, and {prompt!r} is not a list of token ids"
        )
    return [int(word) for word in words]
