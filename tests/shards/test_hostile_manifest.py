"""Manifests that say what none may: refused soon, in one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardkit.shards.manifest import MANIFEST_NAME
from tests.helpers.manifests import (
    K_PROJ,
    NORM,
    O_PROJ,
    SHA,
    Table,
    changed,
    fault_of,
    without,
    written,
)
from tests.helpers.split_helpers import shard_name

BIG = 1 << 40


def section(name: str = K_PROJ, **fields: Any) -> Callable[[Table], None]:
    """Change fields of a tensor's first section."""
    return lambda table: table["tensors"][name]["sections"][0].update(fields)


def both(*changes: Callable[[Table], None]) -> Callable[[Table], None]:
    """Several changes."""

    def change_all(table: Table) -> None:
        for change in changes:
            change(table)

    return change_all


def add_rank(table: Table) -> None:
    table["ranks"].append(copy.deepcopy(table["ranks"][0]))


def swap_ranks(table: Table) -> None:
    table["ranks"].reverse()


def repeat_file(table: Table) -> None:
    files = table["source"]["files"]
    files[1]["name"] = files[0]["name"]


PIECE = ("ranks", 0, "pieces", NORM)


HOSTILE: dict[str, tuple[Callable[[Table], None], str]] = {
    "a prefix that is a model's own": (
        changed("wrapper_prefix", to="model."), "wrapper_prefix: 'model.' is not that of every",
    ),
    "a prefix that no tensor has": (
        changed("wrapper_prefix", to="module."), "wrapper_prefix: 'module.' is not that of every",
    ),
    "an empty prefix": (changed("wrapper_prefix", to=""), "canonical form"),
    "a prefix of another type": (changed("wrapper_prefix", to=1), "wrapper_prefix: is 1, not a"),
    "another format": (changed("format", to=2), "format 2; this shardkit reads format 1"),
    "no format": (without("format"), "format None"),
    "format true": (changed("format", to=True), "not in canonical form"),
    "format of a kind": (changed("format", to={"n": 1}), "format {'n': 1}"),
    "an extra key": (changed("extra", to=1), "manifest: has the keys"),
    "a missing key": (without("recipe"), "manifest: has the keys"),
    "an extra key below": (changed("source", "url", to="x"), "source: has the keys"),
    "a missing key below": (without("tensors", NORM, "dtype"), f"{NORM}: has the keys"),
    "a key with a new line": (changed("a\nb", to=1), "a\\nb"),
    "tp_size 0": (changed("mesh", "tp_size", to=0), "tp_size: is 0, not an integer of 1 to 1024"),
    "tp_size huge": (changed("mesh", "tp_size", to=BIG), "tp_size: is 1099511627776"),
    "tp_size float": (changed("mesh", "tp_size", to=2.0), "tp_size: is 2.0"),
    "tp_size true": (changed("mesh", "tp_size", to=True), "tp_size: is True"),
    "ep_size 2": (changed("mesh", "ep_size", to=2), "ep_size 2: is not that of the experts'"),
    "tp_size other": (changed("mesh", "tp_size", to=3), "2 ranks, but tp_size 3"),
    "tp_size 1024": (changed("mesh", "tp_size", to=1024), "2 ranks, but tp_size 1024"),
    "too many ranks": (add_rank, "3 ranks, but tp_size 2"),
    "ranks in another order": (swap_ranks, "rank 0 has the file"),
    "ranks no list": (changed("ranks", to={}), "ranks: is {}, not a list"),
    "an absolute name": (changed("ranks", 0, "file", to="/etc/passwd"), "'/etc/passwd' is not"),
    "a name above": (changed("ranks", 0, "file", to="../x"), "'../x' is not the name"),
    "a name with a new line": (changed("ranks", 0, "file", to="a\nb"), "'a\\nb' is not"),
    "a source file above": (changed("source", "files", 0, "name", to="../x"), "'../x'"),
    "an index elsewhere": (changed("source", "index", "name", to="/x"), "'/x'"),
    "a copied file above": (
        changed("companion_files", to={"..": {"size": 1, "sha256": SHA}}),
        "companion_files: '..' is not",
    ),
    "a copied manifest": (
        changed("companion_files", to={MANIFEST_NAME: {"size": 1, "sha256": SHA}}),
        "name of two files",
    ),
    "a copied rank": (
        changed("companion_files", to={shard_name(0, 2): {"size": 1, "sha256": SHA}}),
        "name of two files",
    ),
    "two source files of one name": (repeat_file, "is the name of two files"),
    "no source files": (
        both(changed("source", "files", to=[]), changed("tensors", to={})), "source: no files",
    ),
    "a negative offset": (changed(*PIECE, 0, to=-1), f"'{NORM}': is -1"),
    "another offset": (changed(*PIECE, 0, to=8), "its pieces are not the layout's"),
    "a piece too many": (changed("ranks", 0, "pieces", "x", to=[8, "0" * 16]), "its pieces"),
    "a piece too few": (without(*PIECE), "its pieces are not the layout's"),
    "a piece of three": (changed(*PIECE, to=[8, "0" * 16, 1]), "piece is not [offset, "),
    "a short prefix_sha256": (changed(*PIECE, 1, to="0"), "not 16 hex digits"),
    "a count of another piece": (
        changed("ranks", 0, "nonfinite", to={"x": 1}), "counts values of a piece that it does not",
    ),
    "a count of none": (changed("ranks", 0, "nonfinite", to={NORM: 0}), "0, not an integer of 1"),
    "no counts at all": (without("ranks", 0, "nonfinite"), "ranks 0: has the keys"),
    "a digest in upper case": (changed("ranks", 0, "sha256", to="A" * 64), "not 64 hex digits"),
    "a digest of another kind": (changed("recipe", "sha256", to=[SHA]), "not 64 hex digits"),
    "a size too large": (changed("ranks", 1, "size", to=9), "9 bytes, less than the layout's"),
    "a size beyond counting": (changed("ranks", 1, "size", to=1 << 63), "size: is 9223"),
    "a tensor no file holds": (
        changed("tensors", "x", to={}), "the source's files do not hold exactly",
    ),
    "a tensor two files hold": (
        changed("source", "files", 0, "tensors", 0, to=NORM), "do not hold exactly",
    ),
    "a tensor name that is a number": (
        changed("source", "files", 0, "tensors", 0, to=7), "tensors 0: is 7, not a string",
    ),
    "an unknown dtype": (changed("tensors", NORM, "dtype", to="F7"), f"{NORM}: no dtype 'F7'"),
    "a dtype that is a list": (changed("tensors", NORM, "dtype", to=["F32"]), "dtype: is ['F32']"),
    "an unknown style": (changed("tensors", NORM, "style", to="rows"), f"{NORM}: no style 'rows'"),
    "a style that is a table": (changed("tensors", NORM, "style", to={}), "style: is {}"),
    "a negative size": (changed("tensors", NORM, "shape", to=[-1]), "shape 0: is -1"),
    "a size too large for any": (changed("tensors", NORM, "shape", to=[1 << 49]), "shape 0: is"),
    "too many dimensions": (changed("tensors", NORM, "shape", to=[1] * 65), "too many dimensions"),
    "a dimension that is not there": (changed("tensors", K_PROJ, "dim", to=2), "dim: is 2"),
    "a dimension of a scalar": (
        both(changed("tensors", K_PROJ, "shape", to=[]), changed("tensors", K_PROJ, "dim", to=0)),
        f"{K_PROJ}: dim: is 0",
    ),
    "sections of no dimension": (changed("tensors", K_PROJ, "dim", to=-1), "its sections are not"),
    "a dimension of no sections": (changed("tensors", K_PROJ, "sections", to=[]), "its sections"),
    "sections that do not sum": (section(size=3), "its sections are not"),
    "sections of what is replicated": (
        changed("tensors", K_PROJ, "style", to="replicate"), "its sections are not",
    ),
    "a row that is shared": (section(O_PROJ, shared_by=12), "a sum would count it twice"),
    "a row that is whole": (section(O_PROJ, replicated=True), "a sum would count it twice"),
    "no units": (section(units=0), "sections 0: units: is 0"),
    "replicated as a number": (section(replicated=1), "replicated: is 1, not true or false"),
    "sharers not a multiple": (section(shared_by=13), f"{K_PROJ}: 13 units cannot share 2"),
    "fewer sharers than units": (section(shared_by=1), f"{K_PROJ}: 1 units cannot be divided"),
    "a gigantic repeat": (
        both(section(repeat=BIG, units=1, size=1), changed("tensors", K_PROJ, "shape", 0, to=BIG)),
        "stretches, more than the 4096 allowed",
    ),
    "a gigantic repeat of nothing": (
        both(section(repeat=BIG, size=0), changed("tensors", K_PROJ, "shape", 0, to=0)),
        "stretches, more than the 4096 allowed",
    ),
    "gigantic sharers": (section(shared_by=BIG), "stretches, more than the 4096 allowed"),
    "gigantic units": (
        both(section(units=BIG, size=0, shared_by=0), changed("tensors", K_PROJ, "shape", 0, to=0)),
        "its pieces are not the layout's",
    ),
    "a product that overflows": (section(repeat=1 << 47, units=1 << 47), "larger than the"),
    "an attribute of no unit": (
        changed("module_attributes", 0, "unit", to="x"), "'x' is not a unit",
    ),
    "an attribute of a tensor and a unit": (
        both(
            changed("module_attributes", 0, "unit", to="k_proj.weight"),
            changed("module_attributes", 0, "per_unit", to="heads"),
        ),
        "'k_proj.weight' is not a unit",
    ),
    "an attribute without a count": (
        changed("module_attributes", 0, "per_unit", to="vocab"), "'vocab' is not a unit with",
    ),
    "an argument of no unit": (
        changed("forward_arguments", to=[
            {"module": "m", "argument": "a", "dim": 0, "unit": "x", "outer": False}]),
        "'x' is not a unit",
    ),
    "a count that is a float": (changed("units", "heads", "count", to=12.0), "count: is 12.0"),
    "metadata of numbers": (
        changed("source", "files", 0, "metadata", to=[["n", 1]]), "metadata 0: is 1, not a string",
    ),
    "metadata of triples": (
        changed("source", "files", 0, "metadata", to=[["n", "1", "2"]]), "not a pair",
    ),
    "metadata that says a thing twice": (
        changed("source", "files", 0, "metadata", to=[["n", "1"], ["n", "1"]]), "not in canonical",
    ),
    "an index's metadata of lists": (
        changed("source", "index", "metadata", to={"n": []}), "metadata: 'n': is []",
    ),
    "another split_id": (changed("split_id", to=SHA), "split_id is not that of this source"),
    "another style": (changed("tensors", K_PROJ, "style", to="vocab"), "split_id is not that"),
    "another fingerprint": (changed("source", "fingerprint", to=SHA), "split_id is not that"),
}  # fmt: skip


@pytest.mark.timeout(30)  # each takes milliseconds, or would take years
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_soon_and_in_one_line(
    name: str, sound: Table, tmp_path: Path
) -> None:
    change, words = HOSTILE[name]
    table = copy.deepcopy(sound)
    change(table)
    assert words in fault_of(written(table), tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "", "\x1b[31m"])
def test_a_tensor_name_that_cannot_be_printed_is_refused(
    name: str, sound: Table, tmp_path: Path
) -> None:
    renamed = written(sound).replace(json.dumps(NORM).encode(), json.dumps(name).encode())
    assert "empty, too long or unprintable" in fault_of(renamed, tmp_path)
