"""Any split can be undone, redone and done another way, byte for byte: random models and ranks."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkit.checkpoint.header import read_header
from shardkit.dtypes import DTYPES
from shardkit.output import stream
from shardkit.planning import Mesh, Placement, Plan, make_plan
from shardkit.planning.summary import summarize_plan
from shardkit.recipe.parse import parse_recipe
from shardkit.recipe.recipe import Recipe
from shardkit.shards import integrity
from shardkit.shards.manifest import Manifest
from shardkit.tensor import TensorSpec, byte_view
from tests.helpers.split_helpers import merge_folder, reshard_folder, shard_bytes, split_folder
from tests.helpers.synthetic_checkpoints import contents, selected, tensor_bytes, write_source

MAX_RANKS = 16
LETTERS = "abXY09._-é漢😀'\"\\/:,"
UNITS = {
    "heads": '"n"', "kv": '{ count = "m", shared_by = "heads" }', "groups": '"g"', "any": '"*"',
}  # fmt: skip
COUNTS = {"width": '"w"', "state": '"s"'}
# How an axis may be divided: its notation, and how many pieces it has in a model of those counts.
AXES: dict[str, Callable[[Any], int]] = {
    "heads": lambda c: c["n"],
    "3 heads": lambda c: 3 * c["n"],
    "heads 2": lambda c: 2 * c["n"],
    "2 groups 3": lambda c: 6 * c["g"],
    "any": lambda c: c["f"],
    "2 any": lambda c: 2 * c["f"],
    "any 3": lambda c: 3 * c["f"],
    "groups + groups": lambda c: 2 * c["g"],
    "heads width + groups state": lambda c: c["n"] * c["w"] + c["g"] * c["s"],
    "kv": lambda c: c["m"],
    "2 kv": lambda c: 2 * c["m"],
    "heads + kv + kv": lambda c: c["n"] + 2 * c["m"],
    "heads + 2": lambda c: c["n"] + 2,
    "heads width + 3": lambda c: c["n"] * c["w"] + 3,
    "kv (heads + 2)": lambda c: c["n"] + 2 * c["m"],
}  # fmt: skip
# What may follow the divided dimension, so that its indices end on a byte, by bits of an element.
INSIDE = {4: [(2,), (6,)], 6: [(4,)]} | {bits: [(), (1,), (3,), (0,)] for bits in (8, 16, 32, 64)}
ONCE = list(AXES)[:9]  # each index is held by one rank
DIVIDED = ("column", "row", "norm", "gather")
STYLES = (*DIVIDED, "column", "column", "vocab", "replicate", "ignore", "add_once")


@dataclass(frozen=True)
class Tensor:
    """A tensor and its rule: an axis notation, or none for one that is whole."""

    spec: TensorSpec
    pattern: str
    style: str
    axis: str = ""
    fan_in_fan_out: bool = False
    dim: int | None = None

    def has_style(self, style: str) -> bool:
        """Whether its rule is of this style."""
        return self.style == style

    @property
    def rule(self) -> str:
        """Its line in a recipe."""
        axis = json.dumps(self.axis)
        value = axis if self.dim is None else f"{{ axis = {axis}, dim = {self.dim} }}"
        return f"{json.dumps(self.pattern, ensure_ascii=False)} = {value}\n"


@dataclass(frozen=True)
class Model:
    """A checkpoint and the recipe that divides it."""

    counts: dict[str, int]
    tensors: tuple[Tensor, ...]
    files: tuple[int, ...] | None

    @property
    def specs(self) -> list[TensorSpec]:
        """Its tensors."""
        return [tensor.spec for tensor in self.tensors]

    @property
    def config(self) -> dict[str, object]:
        """Its config."""
        return {"model_type": "t", **self.counts}

    @property
    def recipe(self) -> Recipe:
        """Its recipe: a rule for each tensor."""
        words = {word for t in self.tensors for word in t.axis.replace("(", " ").split()}
        used = words | ({"heads"} if "kv" in words else set())
        text = 'model_types = ["t"]\n' + self._list("fan_in_fan_out", lambda t: t.fan_in_fan_out)
        for style in ("vocab", "replicate", "ignore", "add_once"):
            text += self._list(style, partial(Tensor.has_style, style=style))
        for key, table in (("units", UNITS), ("counts", COUNTS)):
            text += f"[{key}]\n" + "".join(f"{k} = {v}\n" for k, v in table.items() if k in used)
        for style in DIVIDED:
            rules = [tensor.rule for tensor in self.tensors if tensor.style == style]
            text += f"[{style}]\n" + "".join(rules)
        return parse_recipe("random", text.encode())

    def _list(self, key: str, wanted: Callable[[Tensor], bool]) -> str:
        names = [tensor.pattern for tensor in self.tensors if wanted(tensor)]
        return f"{key} = {json.dumps(names, ensure_ascii=False)}\n"

    def plan(self, tp_size: int) -> Plan:
        """Its plan."""
        return make_plan(self.specs, self.recipe, self.config, tp_size)

    def write(self, folder: Path) -> Path:
        """Its folder: one file, or several and an index."""
        files = self.files
        name = (lambda at: f"model-{files[at]:05d}-of-00003.safetensors") if files else None
        return write_source(folder, self.config, self.specs, name)


@st.composite
def tensors(draw: st.DrawFn, at: int, counts: dict[str, int]) -> Tensor:
    """A tensor of any dtype, rank and style that can be cut as its rule says."""
    pattern = f"{at}{draw(st.text(LETTERS, max_size=6))}"
    name = pattern + draw(st.sampled_from(["", ".weight", ".bias"]))
    style, dtype = draw(st.sampled_from(STYLES)), draw(st.sampled_from(list(DTYPES)))
    inside = draw(st.sampled_from(INSIDE[DTYPES[dtype].bits]))
    before = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    if style in ("replicate", "ignore", "add_once"):
        return Tensor(TensorSpec(name, dtype, before + inside), pattern, style)
    if style == "vocab":
        return Tensor(TensorSpec(name, dtype, (draw(st.integers(1, 40)), *inside)), pattern, style)
    axis = draw(st.sampled_from(ONCE if style == "row" else list(AXES)))
    length = AXES[axis](counts) * (1 if "any" in axis else draw(st.integers(0, 2)))
    if style == "gather":
        return Tensor(TensorSpec(name, dtype, (*inside, length)), pattern, style, axis)
    stated = style != "norm" and draw(st.booleans())
    if style == "norm" and not inside:
        before = ()
    fan_in_fan_out = not stated and bool(inside if style == "row" else before and not inside)
    spec = TensorSpec(name, dtype, (*before, length, *inside))
    dim = len(before) if stated else None
    return Tensor(spec, pattern, style, axis, fan_in_fan_out and style != "norm", dim)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """One to five tensors of a model with up to 24 heads."""
    kv = draw(st.integers(1, 8))
    counts = {
        "n": kv * draw(st.integers(1, 24 // kv)), "m": kv, "g": draw(st.integers(1, 20)),
        "f": draw(st.integers(1, 40)), "w": draw(st.integers(1, 3)), "s": draw(st.integers(1, 3)),
    }  # fmt: skip
    count = draw(st.integers(1, 5))
    held = tuple(draw(tensors(at, counts)) for at in range(count))
    files = draw(st.none() | st.lists(st.integers(1, 3), min_size=count, max_size=count))
    return Model(counts, held, tuple(files) if files else None)


@contextmanager
def scratch(block: int) -> Iterator[Path]:
    """A folder in memory where there is one, and buffers of `block` bytes in place of megabytes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=memory) as folder:
        patch.setattr(stream, "BUFFER_BYTES", block)
        patch.setattr(integrity, "READ_BYTES", block)
        yield Path(folder)


def check_everything(model: Model, one: int, other: int, block: int) -> None:
    """A model split over two numbers of ranks (`one`, `other`: any), and back."""
    most = min(model.plan(1).max_tp_size, MAX_RANKS)
    first, second = 1 + one % most, 1 + other % most
    with scratch(block) as base:
        source = model.write(base / "source")

        def cut(name: str, tp_size: int) -> Manifest:
            return split_folder(source, base / name, tp_size, model.recipe)

        manifest = cut("first", first)
        check_files(base / "first", manifest, model)
        merge_folder(base / "first", base / "merged")
        assert contents(base / "merged") == contents(source)
        cut("again", first)
        assert contents(base / "again") == contents(base / "first")
        cut("second", second)
        reshard_folder(base / "first", base / "resharded", second)
        assert contents(base / "resharded") == contents(base / "second")


def check_files(folder: Path, manifest: Manifest, model: Model) -> None:
    """Ranks hold their spans, which tile every tensor, in files of the size that was planned."""
    plan = model.plan(manifest.tp_size)
    assert manifest.placements == {p.spec.name: p for p in plan.placements}
    planned = summarize_plan(plan).stored_bytes
    for tp_rank, rank in enumerate(manifest.ranks):
        data = read_header(folder / rank.name).entries
        assert sum(entry.stop - entry.start for entry in data) == planned[tp_rank]
        assert (folder / rank.name).stat().st_size == rank.digest.size
        held = shard_bytes(folder, manifest, tp_rank)
        for placement in plan.placements:
            view = byte_view(placement.spec, placement.dim)
            spans = placement.spans(Mesh(plan.tp_size).rank(tp_rank))
            cuts = [(start * view.inner, stop * view.inner) for start, stop in spans]
            whole = tensor_bytes(placement.spec)
            expected = selected(whole, view.outer, view.row, cuts)
            assert held.pop(placement.spec.name, b"") == expected
        assert not held
    for tensor, placement in zip(model.tensors, plan.placements, strict=True):
        check_tiles(placement, plan.tp_size, tensor.axis in ONCE or tensor.style == "vocab")


def check_tiles(placement: Placement, tp_size: int, once: bool) -> None:
    """Every index of the divided dimension is on some rank; on one, where `once` says so."""
    if placement.dim is None:
        return
    spans = [
        span for tp_rank in range(tp_size) for span in placement.spans(Mesh(tp_size).rank(tp_rank))
    ]
    held = Counter(index for start, stop in spans for index in range(start, stop))
    assert held.keys() == set(range(placement.spec.shape[placement.dim]))
    assert not once or set(held.values()) <= {1}


COMMON: dict[str, Any] = {
    "database": None, "deadline": None, "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}  # fmt: skip
ANY = st.integers(0, 10_000)
CASES = (models(), ANY, ANY, st.sampled_from([48, 512, 1 << 14]))


@settings(max_examples=80, derandomize=True, **COMMON)
@given(*CASES)
def test_any_split_can_be_undone_and_redone(model: Model, one: int, other: int, block: int) -> None:
    check_everything(model, one, other, block)


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(max_examples=2000, **COMMON)
@given(*CASES)
def test_two_thousand_other_splits_can_be_undone_and_redone(
    model: Model, one: int, other: int, block: int
) -> None:
    check_everything(model, one, other, block)
