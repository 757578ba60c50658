"""Which of transformers' classes a checkpoint is of, and which of its tensors that class loads.

transformers ignores the tensors that its class has no place for: a pooler beside a masked-LM head,
a second head. What its classes have is data, `recipes/model_classes.json`, measured by `authoring`,
so that a plan imports neither torch nor transformers.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from shardkit.recipe.catalog import find_recipe_folder

CLASSES_FILE = "model_classes.json"
SETS = ("modules", "needs", "ties", "buffers", "single_rows")


@dataclass(frozen=True, slots=True)
class FullName:
    """A tensor's name, numbers as `*`.

    `lacks_prefix` says whether no class has it under that name, so that it may be one of the base
    model's, saved without the prefix.
    """

    pattern: str
    lacks_prefix: bool


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A model class of transformers.

    Attributes:
        name: Its name.
        prefix: The base model's module, which checkpoints saved from the base model lack.
        modules: The modules that it has, numbers as `*`, and what is inside of them with them.
        needs: Of these, those of which a checkpoint has a tensor: the base model, and heads.
        ties: Heads that it needs unless they are tied to the embeddings.
        buffers: Tensors that it makes anew, and that older checkpoints have stored.
        single_rows: Tensors of which it has one row, and another class of the type has more.
        skips: Regular expressions of names that it leaves out on purpose.
        renames: Names in the checkpoints of other classes, numbers as `*`, and what its own have in
            their place.
        place: The module of other classes that it is, such as the decoder alone; empty for most.
        tie_fields: The config's fields that tie `ties`, if one of them is true, and their defaults.
    """

    name: str
    prefix: str
    modules: frozenset[str]
    needs: frozenset[str]
    ties: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    single_rows: frozenset[str] = frozenset()
    skips: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    tie_fields: Mapping[str, bool] = field(default_factory=dict)
    place: str = ""

    def has(self, name: FullName) -> bool:
        """Whether it has a tensor."""
        return not self.modules.isdisjoint(self._list_owners(name))

    def find_missing(self, names: Iterable[FullName]) -> str:
        """A module that it needs of which there is no tensor; empty if there is none."""
        every = list(names)
        owners = {owner for name in every for owner in self._list_owners(name)}
        owners.update(o for n in every for o in list_ancestors(f"{self.prefix}.{n.pattern}"))
        return min(self.needs - owners, default="")

    def lacks_head(self, names: Iterable[FullName], config: Mapping[str, Any]) -> bool:
        """Whether a head is missing that its config does not tie."""
        fields = self.tie_fields.items()
        if not fields or any(_read_flag(config, field, default) for field, default in fields):
            return False
        owners = {owner for name in names for owner in self._list_owners(name)}
        heads = {_last_word(tie) for tie in self.ties & owners}  # one may have several names
        return any(_last_word(tie) not in heads for tie in self.ties)

    def _list_owners(self, name: FullName) -> list[str]:
        """The tensor's name and those of the modules that it is in, as this class has them.

        A base model's own names have no prefix, whoever saved them.
        """
        prefix = f"{self.prefix}." if self.prefix else ""
        if name.lacks_prefix:
            return list_ancestors(f"{prefix}{name.pattern}")
        names = [name.pattern, self.renames.get(name.pattern, "")]
        names += [each.removeprefix(prefix) for each in names]
        return [owner for each in dict.fromkeys(names) for owner in list_ancestors(each)]


@dataclass(frozen=True, slots=True)
class LoadedTensors:
    """What transformers makes of a checkpoint.

    Attributes:
        model_class: The class; empty if it is not known.
        unloaded: The tensors that the class does not load.
        missing: A module that the class needs and the checkpoint lacks; empty if there is none.
        better_class: If a module is missing, a class that the checkpoint is complete for.
    """

    model_class: str = ""
    unloaded: frozenset[str] = frozenset()
    missing: str = ""
    better_class: str = ""


def find_loaded_tensors(
    config: Mapping[str, Any], names: Mapping[str, Sequence[str]], single_rows: Collection[str] = ()
) -> LoadedTensors:
    """The class of a config, or if transformers has no such class, the one its tensors fit best.

    Args:
        config: The contents of config.json.
        names: The checkpoint's tensors, by their names with `*` for numbers.
        single_rows: Such names of those that have one row.

    Example:
        >>> bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
        >>> names = "bert.pooler.dense.weight", "cls.predictions.transform.dense.weight"
        >>> sorted(find_loaded_tensors(bert, {name: [name] for name in names}).unloaded)
        ['bert.pooler.dense.weight']
    """
    classes = read_classes(str(config.get("model_type")))
    every_module = frozenset[str]().union(*(each.modules for each in classes))
    full_names = {pattern: _find_full_name(pattern, every_module) for pattern in names}
    known = {full for full in full_names.values() if any(c.has(full) for c in classes)}
    buffers = frozenset[str]().union(*(each.buffers for each in classes))
    foreign = {full for full in set(full_names.values()) - known if full.pattern not in buffers}
    chosen = _find_stated_class(classes, config)
    missing = chosen.find_missing(known) if chosen and not foreign else ""
    if chosen and missing.startswith(f"{chosen.prefix}."):
        missing = ""  # of the base model, which may have other names there: who loads it can tell
    best = None
    if chosen is None or missing:
        best = _choose_class(classes, config, known, single_rows, is_whole=not foreign)
        closest = min(classes, key=lambda each: sum(not each.has(n) for n in known), default=None)
        if chosen and best and any(chosen.has(n) and not best.has(n) for n in known):
            missing = ""  # its own names in memory, which transformers loads too
        chosen = chosen or best or (closest if known else None)
    if chosen is None:
        return LoadedTensors()
    unloaded = frozenset(
        name
        for full in full_names.values()
        if full not in known or not chosen.has(full)
        for name in names[full.pattern]
        if full not in foreign or _skips(chosen, name)
    )
    if missing and not best:  # older names, which the class's own table renames
        return LoadedTensors(chosen.name)
    return LoadedTensors(chosen.name, unloaded, missing, best.name if best and missing else "")


def _find_stated_class(
    classes: Sequence[ModelClass], config: Mapping[str, Any]
) -> ModelClass | None:
    """The first class that config.json names and transformers has."""
    stated = config.get("architectures")
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    return next((each for name in names for each in classes if each.name == name), None)


def _find_full_name(pattern: str, every_module: frozenset[str]) -> FullName:
    return FullName(pattern, lacks_prefix=every_module.isdisjoint(list_ancestors(pattern)))


def _choose_class(
    classes: Sequence[ModelClass],
    config: Mapping[str, Any],
    names: Collection[FullName],
    single_rows: Collection[str],
    is_whole: bool,
) -> ModelClass | None:
    """The first class that needs nothing else, of those that leave the fewest tensors out.

    Of classes that differ in the number of rows, the one that has as many.

    If the names are not the whole checkpoint's, nothing can be said to be missing.
    """
    every_single = frozenset[str]().union(*(each.single_rows for each in classes))
    telling = every_single & {name.pattern for name in names}
    rows = telling & frozenset(single_rows)
    known = [each for each in classes if each.needs or len(classes) == 1]
    complete = [c for c in known if not (c.single_rows & telling) - rows]  # which it cannot load
    if is_whole:
        complete = [
            c for c in complete if not c.find_missing(names) and not c.lacks_head(names, config)
        ]

    def count_misfits(each: ModelClass) -> tuple[int, int]:
        return sum(not each.has(n) for n in names), len((each.single_rows & telling) ^ rows)

    return min(complete, key=count_misfits, default=None)


def _read_flag(config: Mapping[str, Any], field: str, default: bool) -> bool:
    """A field of a config or of a table in it."""
    table, _, key = field.rpartition(".")
    owner = config.get(table) if table else config
    return bool(owner.get(key, default)) if isinstance(owner, Mapping) else default


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]


def _skips(chosen: ModelClass, name: str) -> bool:
    """Whether a class leaves out a tensor that no class of the type is known to have."""
    return any(re.search(skip, name) for skip in chosen.skips)


def list_ancestors(name: str) -> list[str]:
    """A tensor's name and those of the modules it is in.

    Example:
        >>> list_ancestors("a.b.c")
        ['a', 'a.b', 'a.b.c']
    """
    parts = name.split(".")
    return [".".join(parts[: at + 1]) for at in range(len(parts))]


def read_classes(model_type: str) -> list[ModelClass]:
    """The classes of a type, in the order in which one of several is chosen; empty if unknown."""
    entry = _read_file(find_recipe_folder() / CLASSES_FILE).get(model_type, {})
    return [_decode_class(name, value) for name, value in entry.items()]


def list_buffers(model_type: str) -> list[str]:
    """The buffers of a type's classes that older checkpoints have stored, numbers as `*`."""
    return sorted({name for each in read_classes(model_type) for name in each.buffers})


def list_words(model_type: str) -> set[str]:
    """The words in the names of the modules that a type's classes have or need."""
    names = {name for each in read_classes(model_type) for name in each.modules | each.needs}
    return {word for name in names for word in name.split(".")}


def _decode_class(name: str, value: Mapping[str, Any]) -> ModelClass:
    modules, needs, ties, buffers, rows = (frozenset(value[key]) for key in SETS)
    sets = modules, needs, ties, buffers, rows
    rest = tuple(value["skips"]), value["renames"], value["tie_fields"], value["place"]
    return ModelClass(name, value["prefix"], *sets, *rest)


def encode_classes(classes: Iterable[ModelClass]) -> dict[str, Any]:
    """The classes of a type as JSON values."""
    return {
        each.name: {
            "prefix": each.prefix,
            **{key: sorted(getattr(each, key)) for key in SETS},
            "skips": list(each.skips),
            "renames": dict(sorted(each.renames.items())),
            "tie_fields": dict(each.tie_fields),
            "place": each.place,
        }
        for each in classes
    }


@cache
def _read_file(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table
