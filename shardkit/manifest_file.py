"""Reads a manifest as if it were hostile: bounded, exact keys and types, names that are base names,
layouts that tile, and pieces that cover each file.
"""

from pathlib import Path
from typing import Any, get_args

from shardkit import strict_json
from shardkit.checkpoint.folder import SourceFile
from shardkit.checkpoint.header import MAX_DIM, MAX_RANK, header_bytes
from shardkit.checkpoint.index import Index
from shardkit.errors import LayoutError, ManifestError
from shardkit.files import read_small
from shardkit.layout import Section
from shardkit.manifest import (
    FORMAT,
    MARK,
    NAME,
    Digest,
    Manifest,
    Piece,
    RankFile,
    SourceRecord,
    rank_name,
    shard_metadata,
    stored_specs,
)
from shardkit.notation import Unit
from shardkit.plan import MAX_TP_SIZE, Placement, Plan
from shardkit.recipe import LocalArgument, LocalAttribute, Style
from shardkit.tensor import DTYPE_BITS, TensorSpec

MAX_BYTES = 1 << 30
MAX_INT = 1 << 62
HEX = set("0123456789abcdef")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder.  Raises ManifestError, naming the folder and the fault."""
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder")
    path = folder / NAME
    if not path.exists():
        raise ManifestError(f"{folder}: no {NAME}: not a shard folder, or an unfinished split")
    data = read_small(path, MAX_BYTES, ManifestError)
    try:
        manifest = parse_manifest(data)
    except (strict_json.JsonError, LayoutError) as fault:
        raise ManifestError(f"{path}: {fault}") from None
    return manifest


def parse_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes.  Raises JsonError or LayoutError."""
    table = strict_json.parse(data)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else None
        raise strict_json.JsonError(f"format {found!r}; this shardkit reads format {FORMAT}")
    _keys(table, "format shardkit split_id tp_size recipe source units local tensors ranks copied")
    tp_size = _int(table["tp_size"], MAX_TP_SIZE)
    tensors = _table(table["tensors"])
    source = _source(table["source"])
    order = [name for file in source.files for name in file.tensors]
    if sorted(order) != sorted(tensors):
        raise strict_json.JsonError("the source's files do not hold exactly the tensors listed")
    plan = Plan(
        tp_size,
        tuple(_placement(name, tensors[name]) for name in order),
        {_str(name): _unit(unit) for name, unit in _table(table["units"]).items()},
        *_local(table["local"]),
    )
    plan.check()
    recipe = _keys(table["recipe"], "name sha256")
    manifest = Manifest(
        split_id=_sha256(table["split_id"]),
        plan=plan,
        source=source,
        recipe=_str(recipe["name"]),
        recipe_sha256=_sha256(recipe["sha256"]),
        ranks=tuple(_rank(rank) for rank in _list(table["ranks"])),
        copied={_base_name(n): _digest(d) for n, d in _table(table["copied"]).items()},
        shardkit=_str(table["shardkit"]),
    )
    _check_ranks(manifest)
    if manifest.data != data:
        raise strict_json.JsonError("not in canonical form: written or changed by something else")
    return manifest


def _check_ranks(manifest: Manifest) -> None:
    if len(manifest.ranks) != manifest.tp_size:
        raise strict_json.JsonError(f"{len(manifest.ranks)} ranks, but tp_size {manifest.tp_size}")
    for tp_rank, rank in enumerate(manifest.ranks):
        if rank.name != rank_name(tp_rank, manifest.tp_size):
            raise strict_json.JsonError(f"rank {tp_rank} has the file {rank.name!r}")
        specs = stored_specs(manifest.plan, tp_rank)
        at = len(shard_header(manifest, tp_rank))
        offsets = {}
        for spec in specs:
            offsets[spec.name] = at
            at += spec.nbytes
        if offsets != {name: piece.offset for name, piece in rank.pieces.items()}:
            raise strict_json.JsonError(f"{rank.name}: its pieces are not the layout's")
        if at != rank.digest.size:
            raise strict_json.JsonError(f"{rank.name}: {rank.digest.size} bytes, layout has {at}")


def shard_header(manifest: Manifest, tp_rank: int) -> bytes:
    """The exact first bytes of a rank's file, which follow from the manifest."""
    metadata = shard_metadata(manifest.split_id, tp_rank, manifest.tp_size)
    return header_bytes(stored_specs(manifest.plan, tp_rank), metadata)


def _source(value: Any) -> SourceRecord:
    table = _keys(value, "id revision model_type sample files index")
    files = tuple(_source_file(file) for file in _list(table["files"]))
    index = None
    if table["index"] is not None:
        entry = _keys(table["index"], "name metadata")
        weight_map = {name: file.name for file in files for name in file.tensors}
        index = Index(_base_name(entry["name"]), weight_map, _strings(entry["metadata"]))
    return SourceRecord(
        _str(table["id"]), _str(table["revision"]), _str(table["model_type"]),
        _sha256(table["sample"]), files, index,
    )  # fmt: skip


def _source_file(value: Any) -> SourceFile:
    table = _keys(value, "name size metadata tensors")
    tensors = tuple(_str(name) for name in _list(table["tensors"]))
    return SourceFile(
        _base_name(table["name"]), _int(table["size"]), _strings(table["metadata"]), tensors
    )


def _placement(name: str, value: Any) -> Placement:
    table = _keys(value, "dtype shape style dim sections")
    shape = tuple(_int(n, MAX_DIM) for n in _list(table["shape"]))
    if table["dtype"] not in DTYPE_BITS or len(shape) > MAX_RANK:
        raise strict_json.JsonError(f"{name}: no dtype {table['dtype']!r}, or too many dimensions")
    if table["style"] not in get_args(Style):
        raise strict_json.JsonError(f"{name}: no style {table['style']!r}")
    parts = tuple(_section(section) for section in _list(table["sections"]))
    dim = None if table["dim"] == -1 else _int(table["dim"], max(len(shape) - 1, 0))
    if (dim is None) != (not parts) or (dim is not None and sum(map(len, parts)) != shape[dim]):
        raise strict_json.JsonError(f"{name}: its sections are not the length of its dimension")
    return Placement(TensorSpec(name, table["dtype"], shape), table["style"], dim, parts)


def _section(value: Any) -> Section:
    table = _keys(value, "repeat units size sharers whole")
    if type(table["whole"]) is not bool:
        raise strict_json.JsonError("whole is no boolean")
    section = Section(
        _int(table["units"]), _int(table["size"]), _int(table["repeat"]), _int(table["sharers"]),
        table["whole"],
    )  # fmt: skip
    if not section.units or section.units * section.repeat > MAX_DIM:
        raise strict_json.JsonError("a section of no units, or of too many")
    return section


def _unit(value: Any) -> Unit:
    table = _keys(value, "count sharers")
    return Unit(_int(table["count"]) or None, _int(table["sharers"]))


def _local(value: Any) -> tuple[tuple[LocalAttribute, ...], tuple[LocalArgument, ...]]:
    table = _keys(value, "attributes arguments")
    attributes = tuple(
        LocalAttribute(**{k: _str(v) for k, v in _keys(a, "module attribute times per").items()})
        for a in _list(table["attributes"])
    )
    arguments = []
    for entry in _list(table["arguments"]):
        a = _keys(entry, "module argument dim unit outer")
        if type(a["outer"]) is not bool:
            raise strict_json.JsonError("outer is no boolean")
        arguments.append(
            LocalArgument(_str(a["module"]), _str(a["argument"]), _int(a["dim"], MAX_RANK),
                          _str(a["unit"]), a["outer"])
        )  # fmt: skip
    return attributes, tuple(arguments)


def _rank(value: Any) -> RankFile:
    table = _keys(value, "file size sha256 pieces")
    pieces = {}
    for name, piece in _table(table["pieces"]).items():
        if not isinstance(piece, list) or len(piece) != 2:
            raise strict_json.JsonError(f"{name}: piece is not [offset, mark]")
        pieces[name] = Piece(_int(piece[0]), _hex(piece[1], MARK))
    digest = Digest(_int(table["size"]), _sha256(table["sha256"]))
    return RankFile(_base_name(table["file"]), digest, pieces)


def _digest(value: Any) -> Digest:
    table = _keys(value, "size sha256")
    return Digest(_int(table["size"]), _sha256(table["sha256"]))


def _keys(value: Any, names: str) -> dict[str, Any]:
    table = _table(value)
    if table.keys() != set(names.split()):
        found = ", ".join(sorted(table)) or "nothing"
        raise strict_json.JsonError(f"expected the keys {names}, found {found}"[:300])
    return table


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise strict_json.JsonError(f"expected a table, found {str(value)[:80]!r}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise strict_json.JsonError(f"expected a list, found {str(value)[:80]!r}")
    return value


def _strings(value: Any) -> dict[str, str]:
    return {_str(k): _str(v) for k, v in _table(value).items()}


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise strict_json.JsonError(f"expected a string, found {str(value)[:80]!r}")
    return value


def _base_name(value: Any) -> str:
    name = _str(value)
    if name in ("", ".", "..", NAME) or "/" in name or "\\" in name or "\0" in name:
        raise strict_json.JsonError(f"{name!r} is not a file name in this folder")
    return name


def _int(value: Any, limit: int = MAX_INT) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise strict_json.JsonError(f"expected an integer of 0 to {limit}, found {str(value)[:80]}")
    return value


def _sha256(value: Any) -> str:
    return _hex(value, 64)


def _hex(value: Any, digits: int) -> str:
    text = _str(value)
    if len(text) != digits or not set(text) <= HEX:
        raise strict_json.JsonError(f"expected {digits} hex digits, found {text[:80]!r}")
    return text
