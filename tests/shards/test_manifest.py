"""The manifest: one spelling, a format that stays readable, and a reader that trusts nothing."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import ManifestError
from shardkit.planning import Mesh
from shardkit.recipe.parse import load_recipe
from shardkit.shards import encode_manifest, hash_manifest, make_split_id, open_shard
from shardkit.shards.manifest import MANIFEST_NAME, Manifest
from shardkit.shards.manifest_json import parse_manifest, read_manifest
from tests.helpers.manifests import K_PROJ, SHA, Table, changed, fault_of, tiny, written
from tests.helpers.split_helpers import merge_folder, reshard_folder, split_folder

GOLDEN = Path(__file__).parent / "golden" / "manifest-format-1.json"


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    data = (folder / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(data)
    assert encode_manifest(manifest) == data
    assert hash_manifest(manifest) == hashlib.sha256(data).hexdigest()
    assert parse_manifest(encode_manifest(manifest)) == manifest


def test_the_bytes_are_canonical_and_hold_no_float(folder: Path) -> None:
    data = (folder / MANIFEST_NAME).read_bytes()
    table = json.loads(data, parse_float=pytest.fail)
    assert written(table) == data


def test_a_split_returns_the_manifest_that_it_wrote(tmp_path: Path) -> None:
    manifest = split_folder(tiny(tmp_path / "tiny"), tmp_path / "shards", 4)
    assert read_manifest(tmp_path / "shards") == manifest


def test_files_are_what_the_manifest_says(folder: Path) -> None:
    manifest = read_manifest(folder)
    listed = {rank.name: rank.digest for rank in manifest.ranks} | dict(manifest.companion_files)
    assert {path.name for path in folder.iterdir()} == {*listed, MANIFEST_NAME}
    for name, digest in listed.items():
        data = (folder / name).read_bytes()
        assert (digest.size, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for tp_rank, rank in enumerate(manifest.ranks):
        data = (folder / rank.name).read_bytes()
        assert data.startswith(manifest.rank_header(manifest.mesh.rank(tp_rank)))
        for name, piece in rank.pieces.items():
            shard = manifest.placements[name].shard_spec(Mesh(2).rank(tp_rank))
            end = piece.offset + (shard.nbytes if shard else 0)
            assert hashlib.sha256(data[:end]).hexdigest().startswith(piece.prefix_sha256)


def test_the_first_format_is_still_read() -> None:
    manifest = parse_manifest(GOLDEN.read_bytes())
    assert manifest.tp_size == 4
    assert manifest.plan.count_local_units("kv_heads", manifest.plan.mesh.rank(3)) == 1
    assert manifest.placements[K_PROJ].spans(Mesh(4).rank(3)) == ((2, 4),)
    assert encode_manifest(manifest) == GOLDEN.read_bytes()


def golden_split(base: Path) -> Manifest:
    """The split whose manifest is the golden file."""
    recipe = load_recipe(GOLDEN.parent / "tiny.toml")
    return split_folder(tiny(base / "tiny"), base / "shards", 4, recipe)


def test_the_same_source_still_makes_the_golden_manifest(tmp_path: Path) -> None:
    # A difference here is a new format: keep the reader of the old one, and raise FORMAT.
    golden = parse_manifest(GOLDEN.read_bytes())
    manifest = replace(golden_split(tmp_path), shardkit=golden.shardkit)
    assert manifest.plan.model_class == "LlamaForCausalLM"  # of a config that names no class
    manifest = replace(manifest, plan=replace(manifest.plan, model_class=""))
    assert encode_manifest(manifest).decode() == GOLDEN.read_text()


def test_what_is_not_usual_is_kept_by_the_manifest(tmp_path: Path) -> None:
    split = golden_split(tmp_path)
    first, *others = split.plan.placements
    unloaded = replace(first, layout=replace(first.layout, in_model=False))
    plan = replace(split.plan, placements=(unloaded, *others))
    changed_split_id = make_split_id(plan, split.source.fingerprint, split.recipe_sha256)
    assert changed_split_id != split.split_id
    table = json.loads(encode_manifest(replace(split, plan=plan)))
    assert table["model_class"] == "LlamaForCausalLM"
    entries = [entry.get("in_model", True) for entry in table["tensors"].values()]
    assert entries.count(False) == 1


@pytest.mark.parametrize("part", ["source", "recipe", "size", "layout"])
def test_a_split_id_names_source_recipe_size_and_layout(part: str, folder: Path) -> None:
    manifest = read_manifest(folder)
    plan, sample, recipe = manifest.plan, manifest.source.fingerprint, manifest.recipe_sha256
    if part == "source":
        sample = SHA
    elif part == "recipe":
        recipe = SHA
    elif part == "size":
        plan = plan.with_tp_size(1)
    else:
        plan = replace(plan, placements=plan.placements[1:])
    assert make_split_id(plan, sample, recipe) != manifest.split_id


@pytest.mark.parametrize(
    "change",
    [
        changed("sha256", to=SHA),
        changed("sha256", to=0),
        changed("source", "id", to="another"),
        changed("module_attributes", 0, "module", to="other.*.self_attn"),
    ],
)
def test_what_nothing_else_checks_is_checked_by_the_manifests_own_digest(
    change: Callable[[Table], None], sound: Table, tmp_path: Path
) -> None:
    table = copy.deepcopy(sound)
    change(table)
    assert "not of its own sha256" in fault_of(written(table), tmp_path)


SPELLINGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "spaces": (lambda data: data.replace(b":", b": ", 1), "not in canonical form"),
    "no last line feed": (bytes.rstrip, "not in canonical form"),
    "another order": (
        lambda data: json.dumps(dict(reversed(json.loads(data).items()))).encode(),
        "not in canonical form",
    ),
    "an escape": (lambda data: data.replace(b"model.norm", b"model\\u002enorm"), "canonical"),
    "a duplicate key": (
        lambda data: data.replace(b'"format":1', b'"format":1,"format":1'), "duplicate key",
    ),
    "a duplicate key below": (
        lambda data: data.replace(b'"size":4', b'"size":4,"size":4', 1), "duplicate",
    ),
    "a number with an exponent": (
        lambda data: data.replace(b'"tp_size":2', b'"tp_size":2e0'), "tp_size: is 2.0",
    ),
    "not a number": (lambda data: data.replace(b'"tp_size":2', b'"tp_size":NaN'), "NaN"),
    "a number of many digits": (
        lambda data: data.replace(b'"tp_size":2', b'"tp_size":' + b"2" * 5000), "4300 digits",
    ),
    "cut short": (lambda data: data[:-9], "damaged or truncated"),
    "no text": (lambda data: b"\xff" + data, "not UTF-8"),
    "nothing": (lambda _: b"", "damaged or truncated"),
    "a list": (lambda _: b"[]", "format None"),
    "nested deeply": (lambda _: b"[" * 100_000, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_any_other_spelling_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    change, words = SPELLINGS[name]
    assert words in fault_of(change((folder / MANIFEST_NAME).read_bytes()), tmp_path)


def test_a_manifest_with_no_change_is_read(sound: Table) -> None:
    assert parse_manifest(written(sound)).tp_size == 2


def test_every_value_that_is_replaced_by_another_kind_is_refused(
    sound: Table, tmp_path: Path
) -> None:
    def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        below = [
            path
            for key, item in items
            if isinstance(item, dict | list)
            for path in paths(item, (*at, key))
        ]
        keys = value if isinstance(value, dict) else range(len(value))
        return below + [(*at, key) for key in keys]

    others: list[Any] = [None, 1.5, [[]], {"a": {}}]
    found = paths(sound)
    assert len(found) > 300
    for path in found[::5]:
        for other in others:
            table = copy.deepcopy(sound)
            changed(*path, to=other)(table)
            if table != sound:
                fault_of(written_loosely(table), tmp_path)


def written_loosely(table: Table) -> bytes:
    text = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"


def test_a_folder_without_a_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no manifest.json: not a shard folder"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="no such folder"):
        read_manifest(tmp_path / "none")


def test_a_manifest_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).symlink_to(folder / MANIFEST_NAME)
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_a_resharded_manifest_keeps_the_source(folder: Path, tmp_path: Path) -> None:
    old = read_manifest(folder)
    new = reshard_folder(folder, tmp_path / "out", 3)
    assert new.source == old.source
    assert new.split_id != old.split_id
    merge_folder(tmp_path / "out", tmp_path / "merged")


def test_pieces_that_begin_behind_a_gap_are_refused_when_the_file_is_opened(folder: Path) -> None:
    manifest = read_manifest(folder)
    first = manifest.ranks[0]
    pieces = {n: replace(piece, offset=piece.offset + 2) for n, piece in first.pieces.items()}
    digest = replace(first.digest, size=first.digest.size + 2)
    ranks = (replace(first, digest=digest, pieces=pieces), *manifest.ranks[1:])
    changed = parse_manifest(encode_manifest(replace(manifest, ranks=ranks)))
    with pytest.raises(ManifestError, match="but its layout makes"):
        open_shard(folder, changed, changed.mesh.rank(0))
