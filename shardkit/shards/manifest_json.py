"""The manifest as JSON, both ways. Reading checks types and bounds; `manifest_check` the rest."""

import hashlib
from pathlib import Path
from typing import Any

from shardkit.checkpoint import Index, SourceFile
from shardkit.errors import LayoutError, ManifestError
from shardkit.files import read_file_name, read_small_file
from shardkit.planning import Plan
from shardkit.shards.manifest import (
    FORMAT,
    MANIFEST_NAME,
    PREFIX_DIGITS,
    Digest,
    Manifest,
    Piece,
    RankFile,
    SourceRecord,
)
from shardkit.shards.manifest_check import check_manifest
from shardkit.shards.plan_json import (
    MESH_KEYS,
    OPTIONAL_KEYS,
    fields_to_json,
    parse_plan,
    placement_to_json,
    plan_to_json,
)
from shardkit.strict_json import (
    JsonError,
    JsonObject,
    encode_canonical,
    parse_json,
    quote,
    read_hex,
    read_integer,
    read_string,
)

MAX_BYTES = 1 << 30
KEYS = (
    "format shardkit split_id mesh recipe source units module_attributes forward_arguments tensors"
    " ranks companion_files sha256"
)
DIGEST_KEYS = "size sha256"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder. Raises ManifestError, naming the folder and the fault."""
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder")
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise ManifestError(f"{folder}: no {MANIFEST_NAME}: not a shard folder, or unfinished")
    data = read_small_file(path, MAX_BYTES, ManifestError)
    try:
        return parse_manifest(data)
    except (JsonError, LayoutError) as fault:
        raise ManifestError(f"{path}: {fault}") from None


def parse_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes, read as if it were hostile. Raises JsonError or LayoutError."""
    value = parse_json(data)
    version = value.get("format") if isinstance(value, dict) else None
    if version != FORMAT:
        raise JsonError(f"format {quote(version)}; this shardkit reads format {FORMAT}")
    manifest = _parse_manifest(JsonObject(value, "manifest", KEYS, OPTIONAL_KEYS))
    check_manifest(manifest)
    fingerprint, recipe_sha256 = manifest.source.fingerprint, manifest.recipe_sha256
    if manifest.split_id != make_split_id(manifest.plan, fingerprint, recipe_sha256):
        raise JsonError("split_id is not that of this source, recipe and layout")
    if data != encode_manifest(manifest):
        raise JsonError("not in canonical form, or not of its own sha256: damaged, or changed")
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes: what is on disk, with the digest of what they say without it."""
    value = manifest_to_json(manifest)
    sha256 = hashlib.sha256(encode_canonical(value) + b"\n").hexdigest()
    return encode_canonical({**value, "sha256": sha256}) + b"\n"


def hash_manifest(manifest: Manifest) -> str:
    """The sha256 of the manifest's file, which ranks compare before their first collective."""
    return hashlib.sha256(encode_manifest(manifest)).hexdigest()


def make_split_id(plan: Plan, fingerprint: str, recipe_sha256: str) -> str:
    """A name for a split, known before it starts, that any other layout or source changes."""
    layout = {p.spec.name: placement_to_json(p) for p in plan.placements}
    value = [FORMAT, fields_to_json(plan.mesh, MESH_KEYS), fingerprint, recipe_sha256, layout]
    return hashlib.sha256(encode_canonical(value)).hexdigest()


def manifest_to_json(manifest: Manifest) -> dict[str, object]:
    """The manifest as JSON values: tables, lists, strings and integers; without its own digest."""
    plan = manifest.plan
    return {
        **plan_to_json(plan),
        "format": FORMAT,
        "shardkit": manifest.shardkit,
        "split_id": manifest.split_id,
        "recipe": {"name": manifest.recipe, "sha256": manifest.recipe_sha256},
        "source": _source_to_json(manifest.source),
        "ranks": [_rank_to_json(rank_file) for rank_file in manifest.ranks],
        "companion_files": {
            name: fields_to_json(digest, DIGEST_KEYS)
            for name, digest in manifest.companion_files.items()
        },
    }


def _rank_to_json(rank_file: RankFile) -> dict[str, object]:
    return {
        "file": rank_file.name,
        **fields_to_json(rank_file.digest, DIGEST_KEYS),
        "pieces": {name: [p.offset, p.prefix_sha256] for name, p in rank_file.pieces.items()},
        "nonfinite": dict(rank_file.nonfinite),
    }


def _source_to_json(source: SourceRecord) -> dict[str, object]:
    index = source.index
    return {
        **fields_to_json(source, "id revision model_type fingerprint"),
        "files": [
            {
                "name": file.name,
                "size": file.size,
                "metadata": [[key, value] for key, value in file.metadata.items()],  # in its order
                "tensors": list(file.tensors),
            }
            for file in source.files
        ],
        "index": {"name": index.name, "metadata": index.metadata} if index else None,
    }


def _parse_manifest(fields: JsonObject) -> Manifest:
    source = _parse_source(fields.value("source"))
    recipe = JsonObject(fields.value("recipe"), "recipe", "name sha256")
    return Manifest(
        split_id=fields.hex("split_id"),
        plan=parse_plan(fields, [name for file in source.files for name in file.tensors]),
        source=source,
        recipe=recipe.string("name"),
        recipe_sha256=recipe.hex("sha256"),
        ranks=fields.items("ranks", _parse_rank),
        companion_files={
            read_file_name(name, "companion_files"): _parse_digest(value, name)
            for name, value in fields.table("companion_files").items()
        },
        shardkit=fields.string("shardkit"),
    )


def _parse_source(value: Any) -> SourceRecord:
    fields = JsonObject(value, "source", "id revision model_type fingerprint files index")
    files = fields.items("files", _parse_source_file)
    index = None
    if fields.value("index") is not None:
        entry = JsonObject(fields.value("index"), "index", "name metadata")
        weight_map = {name: file.name for file in files for name in file.tensors}
        index = Index(entry.read("name", read_file_name), weight_map, entry.labels("metadata"))
    return SourceRecord(
        id=fields.string("id"),
        revision=fields.string("revision"),
        model_type=fields.string("model_type"),
        fingerprint=fields.hex("fingerprint"),
        files=files,
        index=index,
    )


def _parse_source_file(value: Any, where: str) -> SourceFile:
    fields = JsonObject(value, where, "name size metadata tensors")
    return SourceFile(
        fields.read("name", read_file_name),
        fields.integer("size"),
        fields.pairs("metadata"),
        fields.items("tensors", read_string),
    )


def _parse_rank(value: Any, where: str) -> RankFile:
    fields = JsonObject(value, where, "file size sha256 pieces nonfinite")
    pieces = fields.table("pieces").items()
    return RankFile(
        fields.read("file", read_file_name),
        Digest(fields.integer("size"), fields.hex("sha256")),
        {name: _parse_piece(piece, quote(name)) for name, piece in pieces},
        fields.counts("nonfinite"),
    )


def _parse_piece(value: Any, where: str) -> Piece:
    if not isinstance(value, list) or len(value) != 2:
        raise JsonError(f"{where}: piece is not [offset, prefix_sha256]")
    return Piece(read_integer(value[0], where), read_hex(value[1], where, PREFIX_DIGITS))


def _parse_digest(value: Any, name: str) -> Digest:
    fields = JsonObject(value, name, DIGEST_KEYS)
    return Digest(fields.integer("size"), fields.hex("sha256"))
