"""A plan as a part of the manifest's JSON, both ways."""

from typing import Any

from shardkit.checkpoint.header import MAX_DIM, MAX_NAME, MAX_RANK
from shardkit.dtypes import DTYPES
from shardkit.layout import STYLES, Section, Unit
from shardkit.planning import MAX_TP_SIZE, Mesh, Placement, Plan
from shardkit.recipe import ForwardArgument, ModuleAttribute
from shardkit.shards.manifest_check import check_placement, check_section
from shardkit.strict_json import JsonError, JsonObject, quote, read_integer
from shardkit.tensor import TensorSpec

# Left out if they say what is usual: config.json names the class, no wrapper has left a prefix, and
# a tensor is one of the class's.
PLAN_OPTIONS, IN_MODEL = "model_class wrapper_prefix", "in_model"
MESH_KEYS = "tp_size ep_size pp_size"
SECTION_KEYS = "repeat units size shared_by replicated group_tail"
ATTRIBUTE_KEYS = "module attribute unit per_unit"
ARGUMENT_KEYS = "module argument dim unit outer"


def plan_to_json(plan: Plan) -> dict[str, object]:
    """The keys of a manifest that are its plan's."""
    options = {key: getattr(plan, key) for key in PLAN_OPTIONS.split()}
    return {
        **{key: value for key, value in options.items() if value},
        "mesh": fields_to_json(plan.mesh, MESH_KEYS),
        "units": {
            name: {"count": unit.count or 0, "shared_by": unit.shared_by}
            for name, unit in plan.units.items()
        },
        "module_attributes": [
            fields_to_json(rule, ATTRIBUTE_KEYS) for rule in plan.module_attributes
        ],
        "forward_arguments": [
            fields_to_json(rule, ARGUMENT_KEYS) for rule in plan.forward_arguments
        ],
        "tensors": {p.spec.name: placement_to_json(p) for p in plan.placements},
    }


def placement_to_json(placement: Placement) -> dict[str, object]:
    """One tensor's layout as JSON values; `dim` is -1 if it is not divided."""
    return {
        "dtype": placement.spec.dtype,
        "shape": list(placement.spec.shape),
        "style": placement.style.name,
        "dim": -1 if placement.dim is None else placement.dim,
        "sections": [fields_to_json(s, SECTION_KEYS) for s in placement.sections],
        **({} if placement.in_model else {IN_MODEL: False}),
    }


def fields_to_json(value: object, keys: str) -> dict[str, object]:
    """The fields of a dataclass whose names are the keys of its JSON."""
    return {key: getattr(value, key) for key in keys.split()}


def parse_plan(fields: JsonObject, order: list[str]) -> Plan:
    """A manifest's plan, its tensors in this order. Raises JsonError or LayoutError."""
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
        **{key: fields.string(key) for key in PLAN_OPTIONS.split() if key in fields},
    )


def _parse_placement(name: str, value: Any) -> Placement:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise JsonError(f"tensor name {quote(name)} is empty, too long or unprintable")
    fields = JsonObject(value, name, "dtype shape style dim sections", IN_MODEL)
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
    placement = Placement(spec, STYLES[style], None if dim == -1 else dim, sections, in_model)
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
