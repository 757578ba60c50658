"""What a plan needs to know of a type's classes, by the names of the tensors that each saves."""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from shardkit.authoring.cross_loading import find_tie_fields
from shardkit.recipe.model_classes import ModelClass, list_ancestors
from shardkit.tensor import generalize_name


@dataclass
class SavedNames:
    """The tensors that a class saves, numbers as `*`.

    Attributes:
        prefix: The class's base_model_prefix.
        some: Those saved with some sample.
        every: Those saved with every sample.
        tied: Those that may be tied to others, and are then not saved.
        skips: Regular expressions of those that the class leaves out of a checkpoint on purpose.
        buffers: Those that it makes anew, and does not save.
        single_rows: Those with one row.
        sources: The classes whose checkpoints it loads without a missing tensor.
        loads: What it loads of the checkpoints of other classes.
        renames: Names in the checkpoints of other classes, and what its own have in their place.
        tie_fields: The fields of a config that tie them, and their defaults; None if always tied.
    """

    prefix: str
    some: set[str] = field(default_factory=set)
    every: set[str] | None = None
    tied: set[str] = field(default_factory=set)
    skips: set[str] = field(default_factory=set)
    buffers: set[str] = field(default_factory=set)
    single_rows: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    loads: dict[str, frozenset[str]] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)
    tie_fields: Mapping[str, bool] | None = None

    @property
    def may_tie(self) -> bool:
        """Whether some config ties its heads."""
        return self.tie_fields is None or bool(self.tie_fields)

    @property
    def every_loaded(self) -> set[str]:
        """All names on disk that it saves, or loads of other classes' checkpoints."""
        return self.some.union(*self.loads.values())

    def add(self, names: set[str], model: PreTrainedModel) -> None:
        """Count a model of the class in, and the names that it saves."""
        ties = tuple(model._tied_weights_keys or ())
        self.tie_fields = find_tie_fields(model.config) if ties else None
        stored = {generalize_name(name) for name in model.state_dict()} | names
        self.tied |= {name for name in stored if any(re.search(tie, name) for tie in ties)}
        self.some |= names | self.tied
        self.every = names if self.every is None else self.every & names
        self.buffers |= {generalize_name(n) for n, _ in model.named_buffers()} - stored
        self.skips |= set(model._keys_to_ignore_on_load_unexpected or ())


def make_classes(saved: Mapping[str, SavedNames]) -> list[ModelClass]:
    """What a plan needs to know of a type's classes.

    Example:
        >>> names = {"Head": {"base.a", "base.b", "head.w"}, "Base": {"a", "b", "c"}}
        >>> saved = {name: SavedNames("base", some, some) for name, some in names.items()}
        >>> head, base = make_classes(saved)
        >>> sorted(head.modules), sorted(head.needs), sorted(base.modules)
        (['base.a', 'base.b', 'head'], ['base.a', 'base.b', 'head'], ['base'])
    """
    union = {name for each in saved.values() for name in each.some}
    places = {name: _find_places(each, saved, union) for name, each in saved.items()}
    plain = _find_ambiguous(saved, places)
    places = {name: names | (plain & saved[name].every_loaded) for name, names in places.items()}
    every_name = frozenset[str]().union(*places.values())
    more_rows = {name for each in saved.values() for name in each.some - each.single_rows}
    split = _find_split_parts(places, every_name)
    prefixes = {each.prefix for each in saved.values()}
    classes = []
    for name, each in saved.items():
        prefix = f"{each.prefix}."
        needs = _find_needs(each, saved, union)
        base = {n for n in needs if n.startswith(prefix)}
        heads = needs - base
        tied = {n for n in each.tied if each.may_tie and not n.startswith(prefix)}
        classes.append(
            ModelClass(
                name=name,
                prefix=each.prefix,
                modules=collapse_modules(places[name], list_partial(places[name], every_name)),
                needs=collapse_modules(heads, split | list_partial(heads, every_name))
                | {_find_child(full, split) for full in base},
                ties=collapse_modules(tied, list_partial(tied, every_name)),
                buffers=frozenset(each.buffers),
                single_rows=frozenset(each.single_rows & more_rows),
                skips=tuple(sorted(each.skips)),
                renames=each.renames,
                tie_fields=each.tie_fields or {},
                place=_find_place(each, union, prefixes),
            )
        )
    return classes


def _find_split_parts(places: Mapping[str, Set[str]], every_name: Set[str]) -> set[str]:
    """The modules of which some class has a part and lacks another."""
    return {
        part
        for names in places.values()
        for part in list_partial(names, every_name) & list_partial(every_name - names, every_name)
    }


def _find_places(each: SavedNames, saved: Mapping[str, SavedNames], union: set[str]) -> set[str]:
    """The full names that a class has a place for: its own, and those of others that it loads."""
    names = _add_prefix(each.some, each, union)
    return names.union(*(_add_prefix(n, saved[source], union) for source, n in each.loads.items()))


def _find_place(each: SavedNames, union: set[str], prefixes: Set[str]) -> str:
    """The module of other classes that a class is, such as the decoder alone; empty for most."""
    first, *rest = sorted(each.some)
    ends = [full.removesuffix(f".{first}") for full in sorted(union) if full.endswith(f".{first}")]
    places = (end for end in ends if all(f"{end}.{name}" in union for name in rest))
    return next((place for place in places if place not in prefixes), "")


def _find_ambiguous(saved: Mapping[str, SavedNames], places: Mapping[str, Set[str]]) -> set[str]:
    """Names without the base model's prefix that begin as others do, and so do not tell it."""
    every_name = frozenset[str]().union(*places.values())
    first = {name.split(".")[0] for name in every_name}
    names = frozenset[str]().union(*(each.every_loaded for each in saved.values()))
    return {name for name in names - every_name if name.split(".")[0] in first}


def _find_needs(each: SavedNames, saved: Mapping[str, SavedNames], union: set[str]) -> set[str]:
    """The full names, as its own checkpoints have them, that each checkpoint it loads has."""
    own = (each.every or set()) - (each.tied if each.may_tie else set())
    needs = _add_prefix(own, each, union)
    for source in each.sources:
        source_names = _add_prefix(saved[source].some - each.renames.keys(), saved[source], union)
        renamed = {each.renames[n] for n in saved[source].some & each.renames.keys()}
        needs &= source_names | _add_prefix(renamed, each, union)
    return needs


def _add_prefix(names: Set[str], each: SavedNames, union: set[str]) -> set[str]:
    """Names with the base model's prefix before all of them if the class is the base model."""
    is_base = any(_is_base(name, each, union) for name in each.some)
    if not is_base or any(name.startswith(f"{each.prefix}.") for name in each.some):
        return {f"{each.prefix}.{n}" if _is_base(n, each, union) else n for n in names}
    return {f"{each.prefix}.{name}" for name in names}


def _find_child(full: str, split: Set[str]) -> str:
    """The module of the base model that a tensor is in, or one in it if other classes have a part.

    `full` is a name of which the base model is first.
    """
    inside = list_ancestors(full)[1:]
    return next((module for module in inside if module not in split), full)


def _is_base(name: str, each: SavedNames, union: set[str]) -> bool:
    """Whether other classes have a name with the base model's prefix before it."""
    return f"{each.prefix}.{name}" in union


def list_partial(names: Set[str], every_name: Set[str]) -> set[str]:
    """The modules that have other tensors beside these."""
    return {ancestor for name in every_name - names for ancestor in list_ancestors(name)}


def collapse_modules(names: Set[str], partial: Set[str]) -> frozenset[str]:
    """The largest modules of names that are not among some.

    Example:
        >>> sorted(collapse_modules({"a.b.w", "a.c.w", "d.w"}, {"d", "d.b"}))
        ['a', 'd.w']
    """
    return frozenset(
        next((ancestor for ancestor in list_ancestors(name) if ancestor not in partial), name)
        for name in names
    )
