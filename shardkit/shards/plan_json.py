"""A plan as a part of the manifest's JSON, both ways."""

from typing import Any

from shardkit.checkpoint.header import MAX_NAME
from shardkit.checkpoint.header_columns import MAX_DIM, MAX_RANK
from shardkit.dtypes import DTYPES
from shardkit.errors import RecipeError
from shardkit.layout import STYLES, Section, Unit
from shardkit.planning import MAX_TP_SIZE, Expert, Layout, Mesh, Placement, Plan
from shardkit.recipe import ForwardArgument, JointSum, ModuleAttribute
from shardkit.recipe.formats import Grouping, Scheme, group_quantized, list_formats
from shardkit.shards.manifest_check import check_placement, check_section
from shardkit.strict_json import JsonError, JsonObject, quote, read_integer, read_string
from shardkit.tensor import TensorSpec

# Left out if they say what is usual: config.json names the class, no wrapper has left a prefix, and
# a tensor is one of the class's.
PLAN_OPTIONS, IN_MODEL, EXPERT = "model_class wrapper_prefix", "in_model", "expert"
MESH_KEYS = "tp_size ep_size pp_size"
SECTION_KEYS = "repeat units size shared_by replicated group_tail"
BLOCK, BLOCKS, QUANTIZATION, JOINT_SUMS = "block", "blocks", "quantization", "joint_sums"
SIZES = ("index_size", "block_size")  # of a tensor that is part of a quantized weight
TENSOR_KEYS = "dtype shape style dim sections"
TENSOR_OPTIONS = " ".join((IN_MODEL, EXPERT, *SIZES))
OPTIONAL_KEYS = f"{PLAN_OPTIONS} {QUANTIZATION} {JOINT_SUMS}"
ATTRIBUTE_KEYS = "module attribute unit per_unit"
ARGUMENT_KEYS = "module argument dim unit outer"
JOINT_SUM_KEYS = "module of at"


def plan_to_json(plan: Plan) -> dict[str, object]:
    """The keys of a manifest that are its plan's."""
    options = {key: getattr(plan, key) for key in PLAN_OPTIONS.split()}
    joint_sums = plan.joint_sums
    return {
        **{key: value for key, value in options.items() if value},
        "mesh": fields_to_json(plan.mesh, MESH_KEYS),
        "units": {name: _unit_to_json(unit) for name, unit in plan.units.items()},
        "module_attributes": [
            fields_to_json(rule, ATTRIBUTE_KEYS) for rule in plan.module_attributes
        ],
        "forward_arguments": [
            fields_to_json(rule, ARGUMENT_KEYS) for rule in plan.forward_arguments
        ],
        **({JOINT_SUMS: [_joint_sum_to_json(j) for j in joint_sums]} if joint_sums else {}),
        "tensors": {p.spec.name: placement_to_json(p) for p in plan.placements},
        **quantization_to_json(plan.grouping),
    }


def placement_to_json(placement: Placement) -> dict[str, object]:
    """One tensor's layout as JSON values; `dim` is -1 if it is not divided."""
    return {
        "dtype": placement.spec.dtype,
        "shape": list(placement.spec.shape),
        "style": placement.style.name,
        "dim": -1 if placement.dim is None else placement.dim,
        "sections": [_section_to_json(section) for section in placement.sections],
        **{key: size for key in SIZES if (size := getattr(placement.layout, key)) > 1},
        **({} if placement.in_model else {IN_MODEL: False}),
        **(
            {}
            if placement.expert is None
            else {EXPERT: [placement.expert.number, placement.expert.count]}
        ),
    }


def _unit_to_json(unit: Unit) -> dict[str, object]:
    blocks = [[*pair] for pair in sorted(unit.blocks.items())]
    more = {BLOCKS: blocks} if blocks else {}
    return {"count": unit.count or 0, "shared_by": unit.shared_by, **more}


def _section_to_json(section: Section) -> dict[str, object]:
    block = {BLOCK: section.block} if section.block > 1 else {}
    return {**fields_to_json(section, SECTION_KEYS), **block}


def quantization_to_json(grouping: Grouping) -> dict[str, object]:
    """The formats of quantized weights and their numbers, 0 for the whole of an axis."""
    schemes = [
        {"format": each.format.name, "numbers": {n: v or 0 for n, v in each.numbers.items()}}
        for each in grouping.schemes
    ]
    return {QUANTIZATION: schemes} if schemes else {}


def fields_to_json(value: object, keys: str) -> dict[str, object]:
    """The fields of a dataclass whose names are the keys of its JSON."""
    return {key: getattr(value, key) for key in keys.split()}


def parse_plan(fields: JsonObject, order: list[str]) -> Plan:
    """A manifest's plan, its tensors in this order. Raises JsonError or LayoutError."""
    tensors = fields.table("tensors")
    if sorted(order) != sorted(tensors):
        raise JsonError("the source's files do not hold exactly the tensors listed")
    mesh = JsonObject(fields.value("mesh"), "mesh", MESH_KEYS)
    placements = tuple(_parse_placement(name, tensors[name]) for name in order)
    schemes = fields.items(QUANTIZATION, _parse_scheme) if QUANTIZATION in fields else ()
    try:
        grouping = group_quantized([placement.spec for placement in placements], schemes)
    except RecipeError as fault:
        raise JsonError(str(fault)) from None
    return Plan(
        Mesh(*(mesh.integer(key, MAX_TP_SIZE, 1) for key in MESH_KEYS.split())),
        placements,
        {name: _parse_unit(value, name) for name, value in fields.table("units").items()},
        fields.items("module_attributes", _parse_attribute),
        fields.items("forward_arguments", _parse_argument),
        **{key: fields.string(key) for key in PLAN_OPTIONS.split() if key in fields},
        grouping=grouping,
        joint_sums=fields.items(JOINT_SUMS, _parse_joint_sum) if JOINT_SUMS in fields else (),
    )


def _parse_scheme(value: Any, where: str) -> Scheme:
    fields = JsonObject(value, where, "format numbers")
    name = fields.string("format")
    known = {each.name: each for each in list_formats()}
    if name not in known:
        raise JsonError(f"{where}: no format {quote(name)}; it may be of a later release")
    table = fields.table("numbers")
    if table.keys() != known[name].numbers.keys():
        raise JsonError(f"{where}: the numbers are not those of {quote(name)}")
    numbers = {key: read_integer(table[key], f"{where}: {key}", MAX_DIM) or None for key in table}
    return Scheme(known[name], numbers)


def _parse_placement(name: str, value: Any) -> Placement:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise JsonError(f"tensor name {quote(name)} is empty, too long or unprintable")
    fields = JsonObject(value, name, TENSOR_KEYS, TENSOR_OPTIONS)
    shape = fields.items("shape", lambda size, at: read_integer(size, f"{name}: {at}", MAX_DIM))
    dtype, style = map(fields.string, ("dtype", "style"))
    if dtype not in DTYPES or len(shape) > MAX_RANK:
        raise JsonError(f"{name}: no dtype {quote(dtype)}, or too many dimensions")
    if style not in STYLES:
        raise JsonError(f"{name}: no style {quote(style)}")
    dim = fields.integer("dim", len(shape) - 1, -1)
    sections = fields.items("sections", lambda part, at: _parse_section(part, f"{name}: {at}"))
    spec, in_model = (
        TensorSpec(name, dtype, shape),
        IN_MODEL not in fields or fields.boolean(IN_MODEL),
    )
    expert = _parse_expert(fields.value(EXPERT), name) if EXPERT in fields else None
    index_size, block_size = (
        fields.integer(key, MAX_DIM, 2) if key in fields else 1 for key in SIZES
    )
    layout = Layout(
        STYLES[style],
        None if dim == -1 else dim,
        sections,
        in_model,
        expert=expert,
        index_size=index_size,
        block_size=block_size,
    )
    placement = Placement(spec, layout)
    check_placement(placement)
    return placement


def _parse_expert(value: Any, where: str) -> Expert:
    if not isinstance(value, list) or len(value) != 2:
        raise JsonError(f"{where}: expert is not [number, count]")
    count = read_integer(value[1], where, MAX_DIM, 1)
    return Expert(read_integer(value[0], where, count - 1), count)


def _parse_section(value: Any, where: str) -> Section:
    fields = JsonObject(value, where, SECTION_KEYS, BLOCK)
    section = Section(
        units=fields.integer("units", MAX_DIM, 1),
        size=fields.integer("size", MAX_DIM),
        repeat=fields.integer("repeat", MAX_DIM, 1),
        shared_by=fields.integer("shared_by", MAX_DIM),
        replicated=fields.boolean("replicated"),
        group_tail=fields.integer("group_tail", MAX_DIM),
        block=fields.integer(BLOCK, MAX_DIM, 2) if BLOCK in fields else 1,
    )
    check_section(section, where)
    return section


def _parse_unit(value: Any, name: str) -> Unit:
    where = f"unit {quote(name)}"
    fields = JsonObject(value, where, "count shared_by", BLOCKS)
    pairs = fields.items(BLOCKS, _parse_block) if BLOCKS in fields else ()
    count, shared_by = (fields.integer(key, MAX_DIM) for key in ("count", "shared_by"))
    return Unit(count or None, shared_by, dict(pairs))


def _parse_block(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise JsonError(f"{where}: is not a count and a block")
    return read_integer(value[0], where, MAX_DIM, 1), read_integer(value[1], where, MAX_DIM, 2)


def _parse_attribute(value: Any, where: str) -> ModuleAttribute:
    fields = JsonObject(value, where, ATTRIBUTE_KEYS)
    return ModuleAttribute(*map(fields.string, ATTRIBUTE_KEYS.split()))


def _joint_sum_to_json(joint: JointSum) -> dict[str, object]:
    return {**fields_to_json(joint, JOINT_SUM_KEYS), "of": [*joint.of]}


def _parse_joint_sum(value: Any, where: str) -> JointSum:
    fields = JsonObject(value, where, JOINT_SUM_KEYS)
    of = fields.items("of", lambda name, at: read_string(name, f"{where}: {at}"))
    return JointSum(fields.string("module"), of, fields.string("at"))


def _parse_argument(value: Any, where: str) -> ForwardArgument:
    fields = JsonObject(value, where, ARGUMENT_KEYS)
    module, argument, unit = map(fields.string, ("module", "argument", "unit"))
    dim, outer = fields.integer("dim", MAX_RANK), fields.boolean("outer")
    return ForwardArgument(module, argument, dim, unit, outer)
