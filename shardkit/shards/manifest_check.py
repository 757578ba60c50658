"""What a hostile manifest must satisfy: layouts that tile, pieces that cover each file."""

from collections import Counter

from shardkit.checkpoint import is_wrapper_prefix
from shardkit.checkpoint.header_columns import MAX_DIM
from shardkit.layout import Section
from shardkit.layout.style import EXPERT
from shardkit.planning import Placement, PlacementTable, Plan, Rank, check_parts
from shardkit.shards.manifest import MANIFEST_NAME, Manifest, rank_file_name
from shardkit.strict_json import JsonError, quote


def check_manifest(manifest: Manifest) -> None:
    """Raise JsonError or LayoutError unless all parts of a manifest agree."""
    _check_files(manifest)
    manifest.plan.check()
    _check_weights(manifest.plan)
    _check_units(manifest.plan)
    _check_prefix(manifest.plan)
    for rank in manifest.mesh.ranks():
        _check_pieces(manifest, rank)


def check_placement(placement: Placement) -> None:
    """Raise JsonError unless the sections are those of the dimension that is divided."""
    spec, style, sections = placement.spec, placement.style, placement.sections
    width = -(-sum(map(len, sections)) // placement.layout.index_size)
    _check_expert(placement)
    if placement.dim is None:
        gathers_input = style.divides == "nothing" and style.axis == "stated"
        if sections and not (gathers_input and spec.shape[-1:] == (width,)):
            raise JsonError(f"{spec.name}: its sections are not those of a divided dimension")
        return
    if style.divides == "nothing" or width != spec.shape[placement.dim]:
        raise JsonError(f"{spec.name}: its sections are not those of a divided dimension")
    if style.divides == "input" and any(s.replicated or s.shared_by for s in sections):
        raise JsonError(f"{spec.name}: ranks share a section, and a sum would count it twice")


def _check_expert(placement: Placement) -> None:
    """Raise JsonError unless what is placed by its expert is of one, or is divided by experts."""
    expert, dim, sections = placement.expert, placement.dim, placement.sections
    plain = tuple(Section(section.units, section.size) for section in sections)
    is_stack = expert is None and dim == 0 and len(sections) == 1 and sections == plain
    is_one = expert is not None and dim is None and not sections
    if not (is_one or is_stack if placement.style is EXPERT else expert is None):
        raise JsonError(f"{placement.spec.name}: is neither one expert's nor a stack of experts")


def check_section(section: Section, where: str) -> None:
    """Raise JsonError for a section that no axis can have."""
    if section.group_tail and section.shared_by < section.units:
        raise JsonError(f"{where}: {section.shared_by} units cannot share {section.units}")
    if section.repeat * section.units * max(section.indices_per_unit, 1) > MAX_DIM:
        raise JsonError(f"{where}: larger than the {MAX_DIM} indices allowed")


def _check_files(manifest: Manifest) -> None:
    """As many ranks as there should be, and no two files of a folder with one name."""
    if len(manifest.ranks) != manifest.mesh.world_size:
        raise JsonError(f"{len(manifest.ranks)} ranks, but tp_size {manifest.tp_size}")
    for rank, rank_file in zip(manifest.mesh.ranks(), manifest.ranks, strict=True):
        if rank_file.name != rank_file_name(rank):
            raise JsonError(f"rank {rank.index} has the file {quote(rank_file.name)}")
    source = manifest.source
    if not source.files:
        raise JsonError("source: no files")
    source_names = [file.name for file in source.files]
    source_names += [source.index.name] if source.index else []
    shard_names = [MANIFEST_NAME, *(rank_file.name for rank_file in manifest.ranks)]
    for names in (source_names, shard_names):
        counts = Counter([*manifest.companion_files, *names])
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise JsonError(f"{quote(repeated[0])} is the name of two files")


def _check_weights(plan: Plan) -> None:
    """Each quantized weight is cut along one of its axes, and what stores it at the same places."""
    for group in plan.list_weights().groups:
        check_placement(group.first)
    check_parts(PlacementTable.of(plan.placements), plan.grouping)


def _check_units(plan: Plan) -> None:
    ratios = [name for a in plan.module_attributes if a.per_unit for name in (a.unit, a.per_unit)]
    for name in (*ratios, *(rule.unit for rule in plan.forward_arguments)):
        if name not in plan.units or plan.units[name].count is None:
            raise JsonError(f"{quote(name)} is not a unit with a count")
    for attribute in plan.module_attributes:
        by_tensor = attribute.is_counted_by_tensor and not attribute.per_unit
        if attribute.unit not in plan.units and not by_tensor:
            raise JsonError(f"module_attributes: {quote(attribute.unit)} is not a unit")


def _check_prefix(plan: Plan) -> None:
    """A prefix is of wrappers alone, and every tensor has it: no other part may be cut off."""
    prefix, names = plan.wrapper_prefix, [p.spec.name for p in plan.placements]
    if prefix and not (is_wrapper_prefix(prefix) and all(n.startswith(prefix) for n in names)):
        raise JsonError(f"wrapper_prefix: {quote(prefix)} is not that of every tensor")


def _check_pieces(manifest: Manifest, rank: Rank) -> None:
    """A rank's pieces are the layout's, one after another up to the end of its file.

    That they begin where its header ends is checked when the file is opened: to make the headers
    of all ranks takes seconds for a large mixture, and a rank reads one file.
    """
    rank_file = manifest.ranks[rank.index]
    specs = manifest.stored_specs(rank)
    offset = rank_file.digest.size - sum(spec.nbytes for spec in specs)
    if offset < 0:
        raise JsonError(f"{rank_file.name}: {rank_file.digest.size} bytes, less than the layout's")
    offsets = {}
    for spec in specs:
        offsets[spec.name] = offset
        offset += spec.nbytes
    if offsets != {name: piece.offset for name, piece in rank_file.pieces.items()}:
        raise JsonError(f"{rank_file.name}: its pieces are not the layout's")
    if rank_file.nonfinite.keys() - offsets.keys():
        raise JsonError(f"{rank_file.name}: counts values of a piece that it does not hold")
