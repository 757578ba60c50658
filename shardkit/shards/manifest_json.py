"""Reads a manifest as if it were hostile: bounded, exact keys and types, names that are base names,
layouts that tile, and pieces that cover each file.
"""

from collections import Counter
from pathlib import Path
from typing import Any, get_args

from shardkit import strict_json
from shardkit.checkpoint.checkpoint import SourceFile
from shardkit.checkpoint.header import MAX_DIM, MAX_NAME, MAX_RANK, encode_header
from shardkit.checkpoint.index import Index
from shardkit.errors import LayoutError, ManifestError
from shardkit.files import read_small_file
from shardkit.json_fields import JsonObject, read_file_name, read_hex, read_integer, read_string
from shardkit.layout.axis import Unit
from shardkit.layout.spans import Section
from shardkit.planning.plan import MAX_TP_SIZE, Placement, Plan
from shardkit.recipe.recipe import ForwardArgument, ModuleAttribute, Style
from shardkit.shards.manifest import (
    FORMAT,
    MANIFEST_NAME,
    PREFIX_DIGITS,
    Digest,
    Manifest,
    Piece,
    RankFile,
    SourceRecord,
    list_stored_specs,
    make_shard_metadata,
    make_split_id,
    rank_file_name,
)
from shardkit.strict_json import JsonError, quote
from shardkit.tensor import DTYPE_BITS, TensorSpec

MAX_BYTES = 1 << 30
KEYS = "format shardkit split_id tp_size recipe source units local tensors ranks copied"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder.  Raises ManifestError, naming the folder and the fault."""
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder")
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise ManifestError(
            f"{folder}: no {MANIFEST_NAME}: not a shard folder, or an unfinished split"
        )
    data = read_small_file(path, MAX_BYTES, ManifestError)
    try:
        return parse_manifest(data)
    except (JsonError, LayoutError) as fault:
        raise ManifestError(f"{path}: {fault}") from None


def parse_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes.  Raises JsonError or LayoutError."""
    value = strict_json.parse_json(data)
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise JsonError(f"format {quote(found)}; this shardkit reads format {FORMAT}")
    manifest = _manifest(JsonObject(value, "manifest", KEYS + " sha256" * ("sha256" in value)))
    _check_files(manifest)
    manifest.plan.check()
    _check_units(manifest.plan)
    for tp_rank in range(manifest.tp_size):
        _check_pieces(manifest, tp_rank)
    _check_canonical(manifest, data)
    return manifest


def shard_header(manifest: Manifest, tp_rank: int) -> bytes:
    """The exact first bytes of a rank's file, which follow from the manifest."""
    metadata = make_shard_metadata(manifest.split_id, tp_rank, manifest.tp_size)
    return encode_header(list_stored_specs(manifest.plan, tp_rank), metadata)


def _manifest(fields: JsonObject) -> Manifest:
    source = _source(fields.value("source"))
    recipe = JsonObject(fields.value("recipe"), "recipe", "name sha256")
    copied = fields.table("copied").items()
    return Manifest(
        split_id=fields.hex("split_id"),
        plan=_plan(fields, [name for file in source.files for name in file.tensors]),
        source=source,
        recipe=recipe.string("name"),
        recipe_sha256=recipe.hex("sha256"),
        ranks=fields.items("ranks", _rank),
        companion_files={
            read_file_name(name, "copied"): _digest(value, name) for name, value in copied
        },
        shardkit=fields.string("shardkit"),
    )


def _plan(fields: JsonObject, order: list[str]) -> Plan:
    tensors = fields.table("tensors")
    if sorted(order) != sorted(tensors):
        raise JsonError("the source's files do not hold exactly the tensors listed")
    local = JsonObject(fields.value("local"), "local", "attributes arguments")
    return Plan(
        fields.integer("tp_size", MAX_TP_SIZE, 1),
        tuple(_placement(name, tensors[name]) for name in order),
        {name: _unit(value, name) for name, value in fields.table("units").items()},
        local.items("attributes", _attribute),
        local.items("arguments", _argument),
    )


def _check_files(manifest: Manifest) -> None:
    """As many ranks as there should be, and no two files of a folder with one name."""
    if len(manifest.ranks) != manifest.tp_size:
        raise JsonError(f"{len(manifest.ranks)} ranks, but tp_size {manifest.tp_size}")
    for tp_rank, rank in enumerate(manifest.ranks):
        if rank.name != rank_file_name(tp_rank, manifest.tp_size):
            raise JsonError(f"rank {tp_rank} has the file {quote(rank.name)}")
    source = manifest.source
    merged = [file.name for file in source.files] + ([source.index.name] if source.index else [])
    if not source.files:
        raise JsonError("source: no files")
    for others in (merged, [MANIFEST_NAME, *(rank.name for rank in manifest.ranks)]):
        names = Counter([*manifest.companion_files, *others])
        if twice := [name for name, times in names.items() if times > 1]:
            raise JsonError(f"{quote(twice[0])} is the name of two files")


def _check_units(plan: Plan) -> None:
    ratios = [name for a in plan.module_attributes if a.per_unit for name in (a.unit, a.per_unit)]
    for name in (*ratios, *(rule.unit for rule in plan.forward_arguments)):
        if name not in plan.units or plan.units[name].count is None:
            raise JsonError(f"local: {quote(name)} is no unit with a count")
    for attribute in plan.module_attributes:
        if attribute.unit not in plan.units and not (
            attribute.by_tensor and not attribute.per_unit
        ):
            raise JsonError(f"local: {quote(attribute.unit)} is no unit")


def _check_pieces(manifest: Manifest, tp_rank: int) -> None:
    """A rank's pieces are the layout's, one after another, and nothing else is in its file."""
    rank = manifest.ranks[tp_rank]
    at = len(shard_header(manifest, tp_rank))
    offsets = {}
    for spec in list_stored_specs(manifest.plan, tp_rank):
        offsets[spec.name] = at
        at += spec.nbytes
    if offsets != {name: piece.offset for name, piece in rank.pieces.items()}:
        raise JsonError(f"{rank.name}: its pieces are not the layout's")
    if rank.nonfinite.keys() - offsets.keys():
        raise JsonError(f"{rank.name}: counts values of a piece that it does not hold")
    if at != rank.digest.size:
        raise JsonError(f"{rank.name}: {rank.digest.size} bytes, but the layout makes {at}")


def _check_canonical(manifest: Manifest, data: bytes) -> None:
    plan, source = manifest.plan, manifest.source
    if make_split_id(plan, source.fingerprint, manifest.recipe_sha256) != manifest.split_id:
        raise JsonError("split_id is not that of this source, recipe and layout")
    if data != manifest.data and data != manifest.unsealed():
        raise JsonError("not in canonical form, or not of its own sha256: damaged, or changed")


def _source(value: Any) -> SourceRecord:
    fields = JsonObject(value, "source", "id revision model_type sample files index")
    files = fields.items("files", _source_file)
    index = None
    if fields.value("index") is not None:
        entry = JsonObject(fields.value("index"), "index", "name metadata")
        weight_map = {name: file.name for file in files for name in file.tensors}
        index = Index(entry.file_name("name"), weight_map, entry.labels("metadata"))
    return SourceRecord(
        fields.string("id"), fields.string("revision"), fields.string("model_type"),
        fields.hex("sample"), files, index,
    )  # fmt: skip


def _source_file(value: Any, where: str) -> SourceFile:
    fields = JsonObject(value, where, "name size metadata tensors")
    return SourceFile(
        fields.file_name("name"), fields.integer("size"), fields.pairs("metadata"),
        fields.items("tensors", read_string),
    )  # fmt: skip


def _placement(name: str, value: Any) -> Placement:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise JsonError(f"tensor name {quote(name)} is empty, too long or unprintable")
    fields = JsonObject(value, name, "dtype shape style dim sections")
    shape = fields.items(
        "shape", lambda size, where: read_integer(size, f"{name}: {where}", MAX_DIM)
    )
    if fields.string("dtype") not in DTYPE_BITS or len(shape) > MAX_RANK:
        raise JsonError(f"{name}: no dtype {quote(fields.value('dtype'))}, or too many dimensions")
    style: Style = fields.value("style")
    if style not in get_args(Style):
        raise JsonError(f"{name}: no style {quote(style)}")
    dim = fields.integer("dim", len(shape) - 1, -1)
    parts = fields.items("sections", lambda part, where: _section(part, f"{name}: {where}"))
    spec = TensorSpec(name, fields.string("dtype"), shape)
    whole = style in ("replicate", "ignore", "once", "gather")
    if dim == -1 and (not parts or (style == "gather" and shape[-1:] == (sum(map(len, parts)),))):
        return Placement(spec, style, None, parts)
    if dim == -1 or whole or sum(map(len, parts)) != shape[dim]:
        raise JsonError(f"{name}: its sections are not those of a dimension that is divided")
    if style == "row" and any(part.replicated or part.shared_by for part in parts):
        raise JsonError(f"{name}: ranks share a section, and a sum would count it twice")
    return Placement(spec, style, dim, parts)


def _section(value: Any, where: str) -> Section:
    beside = isinstance(value, dict) and "beside" in value  # left out where there is nothing
    fields = JsonObject(value, where, "repeat units size sharers whole" + " beside" * beside)
    section = Section(
        fields.integer("units", MAX_DIM, 1), fields.integer("size", MAX_DIM),
        fields.integer("repeat", MAX_DIM, 1), fields.integer("sharers", MAX_DIM),
        fields.boolean("whole"), fields.integer("beside", MAX_DIM, 1) if beside else 0,
    )  # fmt: skip
    if section.group_tail and section.shared_by < section.units:
        raise JsonError(f"{where}: {section.shared_by} units cannot share {section.units}")
    if section.repeat * section.units * max(section.indices_per_unit, 1) > MAX_DIM:
        raise JsonError(f"{where}: larger than the {MAX_DIM} indices allowed")
    return section


def _unit(value: Any, name: str) -> Unit:
    fields = JsonObject(value, f"unit {quote(name)}", "count sharers")
    return Unit(fields.integer("count", MAX_DIM) or None, fields.integer("sharers", MAX_DIM))


def _attribute(value: Any, where: str) -> ModuleAttribute:
    names = "module attribute times per"
    fields = JsonObject(value, where, names)
    return ModuleAttribute(*(fields.string(name) for name in names.split()))


def _argument(value: Any, where: str) -> ForwardArgument:
    fields = JsonObject(value, where, "module argument dim unit outer")
    return ForwardArgument(
        fields.string("module"), fields.string("argument"), fields.integer("dim", MAX_RANK),
        fields.string("unit"), fields.boolean("outer"),
    )  # fmt: skip


def _rank(value: Any, where: str) -> RankFile:
    counted = isinstance(value, dict) and "nonfinite" in value  # left out where there are none
    fields = JsonObject(value, where, "file size sha256 pieces" + " nonfinite" * counted)
    pieces = {name: _piece(piece, quote(name)) for name, piece in fields.table("pieces").items()}
    digest = Digest(fields.integer("size"), fields.hex("sha256"))
    nonfinite = fields.counts("nonfinite") if counted else {}
    return RankFile(fields.file_name("file"), digest, pieces, nonfinite)


def _piece(value: Any, where: str) -> Piece:
    if not isinstance(value, list) or len(value) != 2:
        raise JsonError(f"{where}: piece is not [offset, mark]")
    return Piece(read_integer(value[0], where), read_hex(value[1], where, PREFIX_DIGITS))


def _digest(value: Any, name: str) -> Digest:
    fields = JsonObject(value, name, "size sha256")
    return Digest(fields.integer("size"), fields.hex("sha256"))
