"""What must hold of every input of a reader: accepted and read rightly, or refused in one line.

Each check says whether the reader accepts an input, and raises AssertionError, or whatever the
reader should not have raised.
"""

import importlib
import json
import os
import random
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import safetensors

from shardkit.checkpoint.config import parse_config
from shardkit.checkpoint.header import Header, parse_header, parse_header_length
from shardkit.checkpoint.index import encode_index, parse_index
from shardkit.errors import LayoutError, RecipeError
from shardkit.planning import Mesh, Plan, place_tensor
from shardkit.recipe import Recipe, compile_module_pattern, match_joint_sums
from shardkit.recipe.counts import resolve_counts, resolve_units
from shardkit.recipe.parse import parse_recipe
from shardkit.shards import encode_manifest
from shardkit.shards.manifest_json import manifest_to_json, parse_manifest
from shardkit.strict_json import JsonError, encode_canonical
from shardkit.tensor import TensorSpec

T = TypeVar("T")
SAMPLE = random.Random(0).randbytes(1 << 16)  # data of which no stretch is like another
MAX_ERROR = 4000
MEMORY_FILE = os.memfd_create("header")


def refused(read: Callable[[], T], *errors: type[Exception]) -> T | None:
    """What `read` returns; None where it refuses, with an error of one printable line."""
    try:
        return read()
    except errors as error:
        text = str(error)
        assert text.isprintable(), f"not one line: {text!r}"
        assert 0 < len(text) < MAX_ERROR
        return None


def check_header(data: bytes) -> bool:
    """Any file that we accept, the safetensors library accepts, and reads identically."""

    def read() -> tuple[int, Header]:
        length = parse_header_length(data[:23], len(data))
        return 8 + length, parse_header(data[8 : 8 + length], len(data))

    found = refused(read, JsonError, LayoutError)
    if found is None:
        return False
    base, header = found
    _json_of(header.raw)
    whole = data[:base] + SAMPLE[: len(data) - base]
    theirs = {name: rest for name, rest in safetensors.deserialize(whole)}
    assert len(theirs) == len(header.entries)
    at = base
    for entry in header.entries:
        other = theirs[entry.spec.name]
        assert entry.start == at
        assert other["data"] == whole[entry.start : entry.stop]
        assert (other["dtype"], tuple(other["shape"])) == (entry.spec.dtype, entry.spec.shape)
        at = entry.stop
    assert at == len(data)
    if b"__metadata__" in header.raw or header.metadata:
        assert header.metadata == _their_metadata(whole)
    return True


def _json_of(data: bytes) -> Any:
    """JSON by the standard library, which would take the last of duplicate keys."""
    return json.loads(data, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    assert len(table) == len(pairs), "a key stands twice"
    return table


def _their_metadata(whole: bytes) -> dict[str, str]:
    os.ftruncate(MEMORY_FILE, len(whole))
    os.pwrite(MEMORY_FILE, whole, 0)
    with safetensors.safe_open(f"/proc/self/fd/{MEMORY_FILE}", "np") as opened:
        return opened.metadata() or {}


def check_index(data: bytes) -> bool:
    """An index names plain files only, is what json reads, and is written as it was read."""
    index = refused(lambda: parse_index(data, "a.safetensors.index.json"), JsonError)
    if index is None:
        return False
    assert index.weight_map == _json_of(data)["weight_map"]
    for name in index.weight_map.values():
        assert os.path.basename(name) == name
        assert len(name.splitlines()) == 1
        assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
    again = encode_index(index, 0)
    assert parse_index(again, index.name) == index
    return True


def check_config(data: bytes) -> bool:
    """A config gives every count of a recipe or a refusal, and is what json reads."""
    config = refused(lambda: parse_config(data), JsonError)
    if config is None:
        return False
    assert config == _json_of(data)
    json.dumps(config, allow_nan=False)
    for recipe in RECIPES:
        units = refused(lambda r=recipe: resolve_units(r, config), RecipeError)  # type: ignore[misc]
        counts = refused(lambda r=recipe: resolve_counts(r, config), RecipeError)  # type: ignore[misc]
        assert all(unit.count is None or unit.count > 0 for unit in (units or {}).values())
        assert all(count > 0 for count in (counts or {}).values())
    return True


def check_manifest(data: bytes) -> bool:
    """A manifest is written as it was read, and its shards make whole tensors again."""
    manifest = refused(lambda: parse_manifest(data), JsonError, LayoutError)
    if manifest is None:
        return False
    table = _json_of(data)
    assert data == encode_canonical(table) + b"\n"
    table.pop("sha256")
    assert table == json.loads(encode_canonical(manifest_to_json(manifest)))
    assert parse_manifest(encode_manifest(manifest)) == manifest
    again = manifest.plan.with_tp_size(1)
    for tp_rank in range(manifest.tp_size):
        rank = manifest.mesh.rank(tp_rank)
        size, own = manifest.ranks[tp_rank].digest.size, manifest.rank_header(rank)
        if size != len(own) + sum(spec.nbytes for spec in manifest.stored_specs(rank)):
            continue  # pieces that begin elsewhere are refused when the rank's file is opened
        assert len(parse_header(own[8:], size).raw) == parse_header_length(own[:23], 1 << 62)
    for placement in again.placements:
        assert placement.shard_spec(Mesh(1).rank(0)) == placement.spec
    ratios = [rule for rule in again.module_attributes if rule.per_unit]
    units = [unit for rule in ratios for unit in (rule.unit, rule.per_unit)]
    for unit in (*units, *(rule.unit for rule in again.forward_arguments)):
        refused(partial(again.count_local_units, unit, again.mesh.rank(0)), LayoutError)
    return True


def check_recipe(data: bytes) -> bool:
    """A recipe places any tensor, or refuses it."""
    recipe = refused(lambda: parse_recipe("fuzzed", data), RecipeError)
    if recipe is None:
        return False
    attributes = [attribute.module for attribute in recipe.module_attributes]
    arguments = [argument.module for argument in recipe.forward_arguments]
    for module in attributes + arguments:
        compile_module_pattern(module)
    [*match_joint_sums(recipe.joint_sums, ["l.0.o", "l.0.p"])]
    units = refused(lambda: resolve_units(recipe, CONFIG), RecipeError)
    counts = refused(lambda: resolve_counts(recipe, CONFIG), RecipeError)
    if units is None or counts is None:
        return True
    for spec in SPECS:
        placed = refused(partial(place_tensor, spec, recipe, units, counts), RecipeError)
        if placed is not None:
            plan = Plan(Mesh(2), (placed,), units)
            refused(plan.check, LayoutError)
    return True


def check_journal(data: bytes) -> bool:
    """A journal's whole lines say the same when they stand alone, and name files of the stage."""
    assert JOURNAL is not None
    record = refused(lambda: JOURNAL.parse_journal(data), JsonError)
    if record is None:
        return False
    whole = data[: record.nbytes]
    assert len(whole) == record.nbytes
    assert whole.count(b"\n") == len(record.entries) + (record.run is not None)
    assert JOURNAL.parse_journal(whole) == record
    for entry in record.entries:
        assert os.path.basename(entry.file) == entry.file
    return True


def _recipe(text: str) -> Recipe:
    return parse_recipe("fixed", text.encode())


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


JOURNAL = _optional("shardkit.output.resume")
RECIPES = [
    _recipe("""
model_types = ["llama"]
[units]
heads = "num_attention_heads"
kv_heads = { count = ["num_key_value_heads", "text_config.kv.0"], shared_by = "heads" }
groups = "n_head / 4"
[counts]
width = ["hidden_size / num_attention_heads", "head_dim"]
[column]
q = "heads width"
k = "kv_heads width + groups"
"""),
]
CONFIG = {
    "model_type": "unknown", "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 8,
    "hidden_size": 16, "head_dim": 4, "vocab_size": 11, "layers": [1, 2], "intermediate_size": 12,
}  # fmt: skip
SPECS = [
    TensorSpec("model.layers.0.self_attn.q_proj.weight", "BF16", (16, 16)),
    TensorSpec("model.layers.0.self_attn.k_proj.bias", "F4", (8,)),
    TensorSpec("h.0.attn.c_attn.weight", "F32", (16, 48)),
    TensorSpec("a", "U8", ()),
    TensorSpec("b.weight", "F32", (0, 3, 2)),
]
