"""From what meets what to a parallel region: which axes divide, by what, and what counts it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardkit.authoring.draft.dependencies import Meeting, Probe, out_dims
from shardkit.authoring.draft.shrink_config import KINDS, kind_of
from shardkit.errors import LayoutError, RecipeError
from shardkit.layout.axis import Unit, parse_axis, resolve_sections
from shardkit.layout.spans import rank_spans

AXES = ("u", "2 u", "3 u", "4 u", "s", "2 s", "u + s + s", "2 u + s + s", "s (u + 2)", "s (u + 1)",
        "u + 2", "u + 1")  # fmt: skip
ROW_AXES = ("u", "2 u")
ANY = "*"


@dataclass(frozen=True)
class Count:
    """What a unit is called, and the config fields that count it; `*` for any even division."""

    name: str
    fields: tuple[str, ...]
    value: int


@dataclass(frozen=True)
class Axis:
    """A rule to be: a pattern, its style, and how its axis divides."""

    pattern: str
    style: str
    text: str
    in_out: bool = False
    dim: int | None = None
    length: int = 0
    owner: str = ""


@dataclass(frozen=True)
class Region:
    """A row-parallel layer, and the layers that are column-parallel for it."""

    row: Axis
    columns: tuple[Axis, ...]
    once: tuple[str, ...]
    unit: Count
    shared: Count | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of all its rules."""
        return (self.row.pattern, *(c.pattern for c in self.columns), *self.once)

    @property
    def rules(self) -> tuple[Axis, ...]:
        """Its rules that divide."""
        return (*self.columns, self.row)


def find_region(probe: Probe, counts: Sequence[Count]) -> Region | None:
    """The finest division under which every tensor that meets the layer divides, or is whole."""
    length = probe.last.tensors[0].shape[probe.last.dim]
    for unit in _units(length, counts):
        for shared in (None, *_sharing(unit, counts)):
            for text in ROW_AXES:
                columns = _columns(probe, text, unit, shared)
                if _is_layer(probe, columns):
                    used = any("SHARED" in c.text for c in columns)
                    own = shared if used else None
                    return _named(probe, text, columns, unit, own)
    return None


def _is_layer(probe: Probe, columns: Sequence[Axis]) -> bool:
    """Whether a matrix is among the columns, and not the row-parallel one itself."""
    patterns = {axis.pattern for axis in columns}
    heavy = [m for m in probe.meetings if len(m.tensor.shape) > 1 and m.tensor.pattern in patterns]
    return bool(heavy) and probe.last.tensors[0].pattern not in patterns


def counts_of(config: Mapping[str, Any], aliases: Mapping[str, str], near: str) -> list[Count]:
    """The config's counts of heads and groups, those whose name is like `near`'s first."""
    found: dict[int, list[tuple[int, str]]] = {}
    for field, value in _flat(config):
        kind = kind_of(field.rpartition(".")[2])
        if kind in ("heads", "kv_heads") and type(value) is int and value > 1:
            far = sum(part not in near for part in field.split("_")[:1] if part in SIDES)
            far += sum(part.removesuffix("_config") not in near for part in field.split(".")[:-1])
            found.setdefault(value, []).append((far, field))
    counts = []
    for value, fields in sorted(found.items(), reverse=True):
        names = [name for _, name in sorted(fields)]
        for name in names:
            counts.append(Count(unit_name(name), _with_aliases(name, aliases), value))
    return counts


SIDES = ("encoder", "decoder", "text", "vision", "audio")


def unit_name(field: str) -> str:
    """What a unit that this field counts is called: `heads`, `decoder_heads`, `kv_heads`."""
    *path, last = field.split(".")
    kind = kind_of(last)
    prefix = [p.removesuffix("_config") for p in path]
    prefix += [side for side in SIDES if last.startswith(f"{side}_")]
    if last.startswith(("num_decoder", "num_encoder")):
        prefix.append(last.split("_")[1])
    return "_".join([*dict.fromkeys(prefix), kind]).lower()


def _with_aliases(field: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """A field, and the other names by which files of this type may state it."""
    if "." in field:
        return (field,)
    same = {aliases.get(field, field), *(a for a, own in aliases.items() if own == field)}
    return (field, *sorted(same - {field}))


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _units(length: int, counts: Sequence[Count]) -> Iterator[Count]:
    """What an axis might be divided by, the finest first."""
    yield Count("ffn", (ANY,), length)
    yield from (c for c in counts if c.value <= length and length % c.value == 0)


def _sharing(unit: Count, counts: Sequence[Count]) -> Iterator[Count]:
    """The counts that the unit might share, as query heads share kv heads."""
    if unit.fields == (ANY,):
        return
    smaller = [c for c in counts if 1 < c.value < unit.value and unit.value % c.value == 0]
    yield from sorted(smaller, key=lambda c: not KINDS["kv_heads"].fullmatch(c.fields[0]))


def _columns(probe: Probe, row: str, unit: Count, shared: Count | None) -> list[Axis]:
    """A rule for every tensor that meets only parts; none where one of them does not divide."""
    found: dict[str, Axis] = {}
    units, norms = _of_units(unit, shared), probe.last.norms
    place = expected(row, probe.last.tensors[0].shape[probe.last.dim], units)
    if place is None:
        return []
    heavy = [m for m in probe.meetings if _counts(m, norms)]
    for meeting in sorted(heavy, key=lambda m: -len(m.tensor.shape)):  # weights before biases
        axis = _axis_of(meeting, probe, place, units, meeting.tensor.owner in norms)
        if axis is None or (axis.text and found.setdefault(axis.pattern, axis).text != axis.text):
            return []
    return sorted(found.values(), key=lambda axis: axis.pattern)


def _counts(meeting: Meeting, norms: Sequence[str]) -> bool:
    """Whether a tensor says something: biases go with their weights."""
    tensor = meeting.tensor
    if tensor.kind in ("linear", "conv1d", "embedding"):
        return len(tensor.shape) > 1
    return tensor.kind != "norm" or len(tensor.shape) > 1 or tensor.owner in norms


def _axis_of(
    meeting: Meeting, probe: Probe, place: Any, units: Mapping[str, Unit], norm: bool
) -> Axis | None:
    """A tensor's rule; with no text where it is whole on every rank; None where nothing fits."""
    tensor, whole = meeting.tensor, True
    owner = tensor.owner
    for dim in (0,) if norm else out_dims(tensor):
        seen, probed = _by_unit(meeting.by_dim[dim], probe.features, place)
        if not seen.any() or seen[probed].all():
            continue
        whole = False
        if text := _text(seen, probed, tensor.shape[dim], units):
            text = text.replace("u", "UNIT").replace("s", "SHARED")
            usual = dim == max(0, len(tensor.shape) - 2)
            last = len(tensor.shape) > 1 and dim == len(tensor.shape) - 1
            at = None if usual or last else dim
            style = "norm" if norm else "column"
            return Axis(tensor.pattern, style, text, last and not usual, at,
                        tensor.shape[dim], owner)  # fmt: skip
    return Axis(tensor.pattern, "", "") if whole else None


def _by_unit(seen: Any, features: Sequence[int], place: Any) -> Any:
    """What each unit meets, `[units, length]`, and which of the units were probed."""
    own = place[:, list(features)].float()
    return (own @ seen.float()) > 0, own.any(1)


def _text(seen: Any, probed: Any, length: int, units: Mapping[str, Unit]) -> str:
    """The tightest notation that allows for all that was seen; empty where none does."""
    best, size = "", 0
    for text in AXES:
        allowed = expected(text, length, units)
        if allowed is None or bool((seen & ~allowed).any()) or not bool(seen[probed].any(1).all()):
            continue
        if not best or int(allowed.sum()) < size:
            best, size = text, int(allowed.sum())
    return best


def expected(text: str, length: int, units: Mapping[str, Unit]) -> Any:
    """Which indices each unit owns, under a notation: `[units, length]`; None where it is wrong."""
    import torch

    if ("s" in text) and "s" not in units:
        return None
    many = units["u"].count or 0
    try:
        parts = resolve_sections(parse_axis(text), length, units)
        held = [rank_spans(parts, at, many) for at in range(many)]
    except (RecipeError, LayoutError):
        return None
    found = torch.zeros((many, length), dtype=torch.bool)
    for row, own in zip(found, held, strict=True):
        for start, stop in own:
            row[start:stop] = True
    return found


def _of_units(unit: Count, shared: Count | None) -> dict[str, Unit]:
    units = {"u": Unit(unit.value)}
    return units | ({"s": Unit(shared.value, unit.value)} if shared else {})


def _named(
    probe: Probe, row: str, columns: Sequence[Axis], unit: Count, shared: Count | None
) -> Region:
    """The region, with the units' own names in its axes."""
    last, dim = probe.last.tensors[0], probe.last.dim
    names = {"UNIT": unit.name, "SHARED": shared.name if shared else ""}

    def told(text: str) -> str:
        return " ".join(names.get(word, word) for word in text.replace("(", "( ").split()).replace(
            "( ", "("
        )

    in_out = dim == len(last.shape) - 2
    own = Axis(last.pattern, "row", told(row.replace("u", "UNIT")), in_out,
               None, last.shape[dim], last.owner)  # fmt: skip
    axes = tuple(
        Axis(c.pattern, c.style, told(c.text), c.in_out, c.dim, c.length, c.owner) for c in columns
    )
    once = tuple(dict.fromkeys(t.pattern for t in probe.summed))
    return Region(own, axes, once, unit, shared)
