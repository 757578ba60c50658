"""The manifest as JSON, both ways. Reading checks types and bounds; `manifest_check` the rest."""

import hashlib
from pathlib import Path
from typing import Any

from shardkit.checkpoint import Index, SourceFile
from shardkit.checkpoint.header import MAX_DIM, MAX_NAME, MAX_RANK
from shardkit.dtypes import DTYPES
from shardkit.errors import LayoutError, ManifestError
from shardkit.files import read_file_name, read_small_file
from shardkit.layout import STYLES, Section, Unit
from shardkit.planning import MAX_TP_SIZE, Mesh, Placement, Plan
from shardkit.recipe import ForwardArgument, ModuleAttribute
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
from shardkit.shards.manifest_check import check_manifest, check_placement, check_section
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
from shardkit.tensor import TensorSpec

MAX_BYTES = 1 << 30
KEYS = (
    "format shardkit split_id mesh recipe source units module_attributes forward_arguments tensors"
    " ranks companion_files sha256"
)
MESH_KEYS = "tp_size ep_size pp_size"
DIGEST_KEYS = "size sha256"
SECTION_KEYS = "repeat units size shared_by replicated group_tail"
ATTRIBUTE_KEYS = "module attribute unit per_unit"
ARGUMENT_KEYS = "module argument dim unit outer"


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
    manifest = _parse_manifest(JsonObject(value, "manifest", KEYS, "wrapper_prefix"))
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
    value = [FORMAT, _fields_to_json(plan.mesh, MESH_KEYS), fingerprint, recipe_sha256, layout]
    return hashlib.sha256(encode_canonical(value)).hexdigest()


def manifest_to_json(manifest: Manifest) -> dict[str, object]:
    """The manifest as JSON values: tables, lists, strings and integers; without its own digest."""
    plan = manifest.plan
    return {
        "format": FORMAT,
        "shardkit": manifest.shardkit,
        "split_id": manifest.split_id,
        "mesh": _fields_to_json(manifest.mesh, MESH_KEYS),
        "recipe": {"name": manifest.recipe, "sha256": manifest.recipe_sha256},
        "source": _source_to_json(manifest.source),
        "units": {
            name: {"count": unit.count or 0, "shared_by": unit.shared_by}
            for name, unit in plan.units.items()
        },
        "module_attributes": [
            _fields_to_json(rule, ATTRIBUTE_KEYS) for rule in plan.module_attributes
        ],
        "forward_arguments": [
            _fields_to_json(rule, ARGUMENT_KEYS) for rule in plan.forward_arguments
        ],
        "tensors": {name: placement_to_json(p) for name, p in manifest.placements.items()},
        "ranks": [_rank_to_json(rank_file) for rank_file in manifest.ranks],
        "companion_files": {
            name: _fields_to_json(digest, DIGEST_KEYS)
            for name, digest in manifest.companion_files.items()
        },
        **({"wrapper_prefix": plan.wrapper_prefix} if plan.wrapper_prefix else {}),
    }


def placement_to_json(placement: Placement) -> dict[str, object]:
    """One tensor's layout as JSON values; `dim` is -1 if it is not divided."""
    return {
        "dtype": placement.spec.dtype,
        "shape": list(placement.spec.shape),
        "style": placement.style.name,
        "dim": -1 if placement.dim is None else placement.dim,
        "sections": [_fields_to_json(s, SECTION_KEYS) for s in placement.sections],
    }


def _fields_to_json(value: object, keys: str) -> dict[str, object]:
    """The fields of a dataclass whose names are the keys of its JSON."""
    return {key: getattr(value, key) for key in keys.split()}


def _rank_to_json(rank_file: RankFile) -> dict[str, object]:
    return {
        "file": rank_file.name,
        **_fields_to_json(rank_file.digest, DIGEST_KEYS),
        "pieces": {name: [p.offset, p.prefix_sha256] for name, p in rank_file.pieces.items()},
        "nonfinite": dict(rank_file.nonfinite),
    }


def _source_to_json(source: SourceRecord) -> dict[str, object]:
    index = source.index
    return {
        **_fields_to_json(source, "id revision model_type fingerprint"),
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
        plan=_parse_plan(fields, [name for file in source.files for name in file.tensors]),
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


def _parse_plan(fields: JsonObject, order: list[str]) -> Plan:
    tensors = fields.table("tensors")
    if sorted(order) != sorted(tensors):
        raise JsonError("the source's files do not hold exactly the tensors listed")
    mesh = JsonObject(fields.value("mesh"), "mesh", MESH_KEYS)
    return Plan(
        Mesh(*(mesh.integer(key, MAX_TP_SIZE, 1) for key in MESH_KEYS.split())),
        tuple(_parse_placement(name, tensors[name]) for name in order),
        {name: _parse_unit(value, name) for name, value in fields.table("units").items()},
        fields.items("module_attributes", _parse_attribute),
        fields.items("forward_arguments", _parse_argument),
        fields.string("wrapper_prefix") if "wrapper_prefix" in fields else "",
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


def _parse_placement(name: str, value: Any) -> Placement:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise JsonError(f"tensor name {quote(name)} is empty, too long or unprintable")
    fields = JsonObject(value, name, "dtype shape style dim sections")
    shape = fields.items("shape", lambda size, at: read_integer(size, f"{name}: {at}", MAX_DIM))
    dtype, style = map(fields.string, ("dtype", "style"))
    if dtype not in DTYPES or len(shape) > MAX_RANK:
        raise JsonError(f"{name}: no dtype {quote(dtype)}, or too many dimensions")
    if style not in STYLES:
        raise JsonError(f"{name}: no style {quote(style)}")
    dim = fields.integer("dim", len(shape) - 1, -1)
    sections = fields.items("sections", lambda part, at: _parse_section(part, f"{name}: {at}"))
    dim_or_none = None if dim == -1 else dim
    placement = Placement(TensorSpec(name, dtype, shape), STYLES[style], dim_or_none, sections)
    check_placement(placement)
    return placement


def _parse_section(value: Any, where: str) -> Section:
    fields = JsonObject(value, where, SECTION_KEYS)
    section = Section(
        units=fields.integer("units", MAX_DIM, 1),
        size=fields.integer("size", MAX_DIM),
        repeat=fields.integer("repeat", MAX_DIM, 1),
        shared_by=fields.integer("shared_by", MAX_DIM),
        replicated=fields.boolean("replicated"),
        group_tail=fields.integer("group_tail", MAX_DIM),
    )
    check_section(section, where)
    return section


def _parse_unit(value: Any, name: str) -> Unit:
    fields = JsonObject(value, f"unit {quote(name)}", "count shared_by")
    return Unit(fields.integer("count", MAX_DIM) or None, fields.integer("shared_by", MAX_DIM))


def _parse_attribute(value: Any, where: str) -> ModuleAttribute:
    fields = JsonObject(value, where, ATTRIBUTE_KEYS)
    return ModuleAttribute(*map(fields.string, ATTRIBUTE_KEYS.split()))


def _parse_argument(value: Any, where: str) -> ForwardArgument:
    fields = JsonObject(value, where, ARGUMENT_KEYS)
    module, argument, unit = map(fields.string, ("module", "argument", "unit"))
    dim, outer = fields.integer("dim", MAX_RANK), fields.boolean("outer")
    return ForwardArgument(module, argument, dim, unit, outer)


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
