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
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from shardkit.authoring.cross_loading import load_other
from shardkit.authoring.samples import Sample, list_samples
from shardkit.authoring.saved_names import SavedNames, make_classes
from shardkit.checkpoint import Checkpoint
from shardkit.errors import MODEL_ERRORS
from shardkit.recipe.model_classes import ModelClass, encode_classes
from shardkit.runtime.models.registry import find_model_class
from shardkit.tensor import generalize_name

FEW_CLASSES = 4  # of a type, each of which is loaded as each other one
# transformers' mappings from types to classes, those of models that generate first: of classes
# that a checkpoint's tensors fit alike, the first is chosen.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_PRETRAINING", "MODEL_FOR_SEQUENCE_CLASSIFICATION",
)  # fmt: skip


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
    """Note what classes load of the checkpoints of the first class and of base models.

    Names that transformers renames, and buffers that it does not miss, are told only by loading.
    """
    present = [cls for cls in classes if cls.__name__ in saved]
    sources = [cls for cls in present if cls.__name__.endswith("Model")]
    sources = present if len(present) <= FEW_CLASSES else [present[0], *sources]
    prefixes = re.compile("|".join(rf"^{each.prefix}\." for each in saved.values() if each.prefix))
    for cls in present:
        each = saved[cls.__name__]
        for source in dict.fromkeys(sources):
            loaded = load_other(cls, scratch / source.__name__, scratch / cls.__name__)
            if loaded is None:
                continue
            each.loads[source.__name__] = loaded.names
            if loaded.is_whole:
                each.sources.add(source.__name__)
            prefix = "^" + re.escape(f"{each.prefix}.") if loaded.is_whole else prefixes
            trim = partial(re.compile(prefix).sub, "", count=1)
            for name, other in loaded.renames.items():
                if name not in each.some and trim(name) != trim(other):
                    each.renames.setdefault(name, other)


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
        return {generalize_name(spec.name) for spec in specs}
