"""Which modules each model class of transformers has, measured on the bundled samples.

Each class that transformers has for a model type is built from the type's samples and saved, and
the names in the files are compared. The result, `recipes/model_classes.json`, is what a plan
decides by, which never imports transformers.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from shardkit.authoring.samples import Sample, list_samples
from shardkit.checkpoint import Checkpoint
from shardkit.errors import MODEL_ERRORS
from shardkit.recipe.model_classes import NUMBERS, ModelClass, encode_classes, list_ancestors
from shardkit.runtime.models.registry import find_model_class

# transformers' mappings from types to classes, those of models that generate first: of classes
# that a checkpoint's tensors fit alike, the first is chosen.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_PRETRAINING", "MODEL_FOR_SEQUENCE_CLASSIFICATION",
)  # fmt: skip


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
    """

    prefix: str
    some: set[str] = field(default_factory=set)
    every: set[str] | None = None
    tied: set[str] = field(default_factory=set)
    skips: set[str] = field(default_factory=set)
    buffers: set[str] = field(default_factory=set)
    single_rows: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)

    def add(self, names: set[str], model: PreTrainedModel) -> None:
        """Count a model of the class in, and the names that it saves."""
        ties = tuple(model._tied_weights_keys or ())
        stored = {NUMBERS.sub("*", name) for name in model.state_dict()} | names
        self.tied |= {name for name in stored if any(re.search(tie, name) for tie in ties)}
        self.some |= names | self.tied
        self.every = names if self.every is None else self.every & names
        self.buffers |= {NUMBERS.sub("*", n) for n, _ in model.named_buffers()} - stored
        self.skips |= set(model._keys_to_ignore_on_load_unexpected or ())


def write_model_classes(path: Path, model_types: Iterable[str] | None = None) -> None:
    """Measure the classes of these types, or of all that have samples, and store them."""
    samples: dict[str, list[Sample]] = {}
    for sample in list_samples():
        samples.setdefault(sample.model_type, []).append(sample)
    stored = json.loads(path.read_text()) if path.exists() else {}
    for model_type in sorted(samples.keys() & set(samples if model_types is None else model_types)):
        stored[model_type] = encode_classes(measure_classes(samples[model_type]))
    lines = (f"{json.dumps(name)}: {json.dumps(stored[name])}" for name in sorted(stored))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def measure_classes(samples: Sequence[Sample]) -> list[ModelClass]:
    """The classes of one model type, by what each saves."""
    saved: dict[str, SavedNames] = {}
    classes = list_classes(samples[0].model_type)
    for at, sample in enumerate(samples):
        config = sample.make_config()
        with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
            for cls, model, folder in _save_each(classes, config, Path(scratch)):
                each = saved.setdefault(cls.__name__, SavedNames(model.base_model_prefix))
                each.add(list_stored_names(folder), model)
                each.single_rows |= list_stored_names(folder, single_rows=True)
            if at == 0:
                _load_as_others(classes, Path(scratch), saved)
    order = [cls.__name__ for cls in classes if cls.__name__ in saved]
    return make_classes({name: saved[name] for name in order})


def _save_each(
    classes: Sequence[type[PreTrainedModel]], config: PreTrainedConfig, scratch: Path
) -> Iterator[tuple[type[PreTrainedModel], PreTrainedModel, Path]]:
    """A model of each class that the config suits, and where it is saved."""
    for cls in classes:
        folder = scratch / cls.__name__
        try:
            model = build_model(cls, deepcopy(config))  # which some classes change
            model.save_pretrained(folder)
        except MODEL_ERRORS:
            continue
        yield cls, model, folder


def _load_as_others(
    classes: Sequence[type[PreTrainedModel]], scratch: Path, saved: Mapping[str, SavedNames]
) -> None:
    """Note which classes load the checkpoints of the first class and of the base model.

    Names that transformers renames, and buffers that it does not miss, are told only by its report.
    """
    present = [cls for cls in classes if cls.__name__ in saved]
    bases = [cls for cls in present if cls.__name__.endswith("Model")]
    for source in dict.fromkeys([*present[:1], *bases]):
        for cls in present:
            try:
                _, report = cls.from_pretrained(scratch / source.__name__, output_loading_info=True)
            except MODEL_ERRORS:
                continue
            if not report["missing_keys"] and not report["mismatched_keys"]:
                saved[cls.__name__].sources.add(source.__name__)


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
    every_name = {full for each in saved.values() for full in _add_prefix(each.some, each, union)}
    more_rows = {name for each in saved.values() for name in each.some - each.single_rows}
    classes = []
    for name, each in saved.items():
        always = each.every or set()
        inside = {n for n in always if n.startswith(f"{each.prefix}.") or _is_base(n, each, union)}
        tied = {full for full in each.tied if not full.startswith(f"{each.prefix}.")}
        sources = [_add_prefix(saved[n].some, saved[n], union) for n in each.sources]
        missed = _add_prefix(always - each.tied, each, union).intersection(*sources)
        heads = missed - _add_prefix(inside, each, union)
        base = {_find_child(full) for full in missed - heads}
        modules = collapse_modules(_add_prefix(each.some, each, union), every_name)
        needs = collapse_modules(heads, every_name) | base
        ties = collapse_modules(tied, every_name)
        rest = frozenset(each.buffers), frozenset(each.single_rows & more_rows)
        skips = tuple(sorted(each.skips))
        classes.append(ModelClass(name, each.prefix, modules, needs, ties, *rest, skips))
    return classes


def _add_prefix(names: set[str], each: SavedNames, union: set[str]) -> set[str]:
    """Names with the base model's prefix before all of them if the class is the base model."""
    is_base = any(_is_base(name, each, union) for name in each.some)
    if not is_base or any(name.startswith(f"{each.prefix}.") for name in each.some):
        return {f"{each.prefix}.{n}" if _is_base(n, each, union) else n for n in names}
    return {f"{each.prefix}.{name}" for name in names}


def _find_child(full: str) -> str:
    """The module of the base model that a tensor is in, by the name of which the base is first."""
    return ".".join(full.split(".")[:2])


def _is_base(name: str, each: SavedNames, union: set[str]) -> bool:
    """Whether other classes have a name with the base model's prefix before it."""
    return f"{each.prefix}.{name}" in union


def collapse_modules(names: set[str], every_name: set[str]) -> frozenset[str]:
    """The largest modules of which all tensors are among these names.

    Example:
        >>> sorted(collapse_modules({"a.b.w", "a.c.w", "d.w"}, {"a.b.w", "a.c.w", "d.w", "d.b"}))
        ['a', 'd.w']
    """
    partial = {ancestor for name in every_name - names for ancestor in list_ancestors(name)}
    return frozenset(
        next((ancestor for ancestor in list_ancestors(name) if ancestor not in partial), name)
        for name in names
    )


def list_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Every class that transformers has for a type, those it maps the type to first.

    A type that adds nothing but a config is mapped to the classes of another.
    """
    mappings = [getattr(modeling_auto, f"{name}_MAPPING_NAMES", {}) for name in MAPPINGS]
    mappings += [
        getattr(modeling_auto, name)
        for name in sorted(dir(modeling_auto))
        if name.startswith("MODEL_FOR") and name.endswith("_MAPPING_NAMES")
    ]
    mappings.append(modeling_auto.MODEL_MAPPING_NAMES)
    names: list[str] = []
    for mapping in mappings:
        entry = mapping.get(model_type, ())
        names += [entry] if isinstance(entry, str) else entry
    config_class = CONFIG_MAPPING[model_type]
    module = config_class.__module__.replace(".configuration_", ".modeling_")
    if find_spec(module):
        names += getattr(import_module(module), "__all__", ())
    every = [find_model_class(name) for name in dict.fromkeys(names)]
    classes = [cls for cls in every if cls is not None and cls.config_class is not None]
    own = [cls for cls in classes if cls.config_class is config_class]
    return own or classes


def build_model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class. Raises one of MODEL_ERRORS if the config does not suit the class."""
    model = cls(config)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{cls.__name__} has no parameters of its own")
    return model


def list_stored_names(folder: Path, single_rows: bool = False) -> set[str]:
    """The names of a checkpoint's tensors, or of those with a single row, numbers as `*`."""
    with Checkpoint(folder) as checkpoint:
        specs = [s for s in checkpoint.specs() if not single_rows or s.shape[:1] == (1,)]
        return {NUMBERS.sub("*", spec.name) for spec in specs}
