"""A small random model of the kind that is asked for, saved as transformers saves it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.authoring.draft.shrink_config import shrunk, ways
from shardkit.checkpoint.config_check import check_config
from shardkit.checkpoint.weight_files import read_config
from shardkit.errors import RecipeError

SMALL = 3_000_000  # parameters
AS_IS = 2_000_000
CLASSES = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT",
    "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "PRETRAINING", "",
)  # fmt: skip
UNBUILT = (
    AttributeError, AssertionError, ArithmeticError, ImportError, IndexError, KeyError, LookupError,
    NotImplementedError, RuntimeError, TypeError, ValueError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A small model's folder, its class, and in words the config that it was made from."""

    folder: Path
    model_class: str
    made_from: str
    changed: tuple[str, ...] = ()


def make_tiny(model: str, work: Path) -> Tiny:
    """Save a small model of a type, or of the type of the config.json in a folder.

    Raises RecipeError where transformers knows no such type, or no small one can be built and run,
    and CheckpointError for a config that should reach no builder.
    """
    folder = Path(model)
    source = read_config(folder) if (folder / "config.json").is_file() else {}
    check_config(source, (), folder)
    model_type = str(source.get("model_type", "")) or model
    cls, config = _config(model_type, source)
    name = class_name(config, source)
    what = f"the config of {folder.resolve().name}" if source else "the type's default config"
    fault = ""
    refused: tuple[type[Exception], ...] = (*UNBUILT, *_strict_errors())
    for way, table in enumerate(_tables(config.to_dict(), source, cls, name)):
        try:
            small = cls.from_dict(table)
            _save(name, small, work / f"tiny-{way}")
            return Tiny(work / f"tiny-{way}", name, what, _changes(config.to_dict(), table))
        except refused as error:
            fault = fault or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise RecipeError(
        f"{model}: no small model of it can be made ({fault}); give a folder with the config.json"
        " of a small one"
    )


def _strict_errors() -> tuple[type[Exception], ...]:
    """What config classes that check their fields raise."""
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)


def class_name(config: Any, source: Mapping[str, Any]) -> str:
    """The model class: the config's own, or what this type is mostly used as.

    Raises RecipeError for a type of which transformers has no model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in source.get("architectures") or ():
        if hasattr(transformers, str(name)):
            return str(name)
    for task in CLASSES:
        table = getattr(modeling_auto, f"MODEL_{f'FOR_{task}_' if task else ''}MAPPING_NAMES")
        found = table.get(config.model_type)
        if found and (config.is_encoder_decoder or task not in CLASSES[:2]):
            return str(found if isinstance(found, str) else found[0])
    raise RecipeError(f"{config.model_type}: transformers has no model class for it alone")


def _config(model_type: str, source: Mapping[str, Any]) -> tuple[Any, Any]:
    """The config class of a type, and its config: the source's own or the default one."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"{model_type}: no folder with a config.json, and no model_type of transformers"
        )
    cls: Any = CONFIG_MAPPING[model_type]
    refused: tuple[type[Exception], ...] = (*UNBUILT, *_strict_errors())
    try:
        return cls, cls.from_dict(dict(source)) if source else cls()
    except refused as error:
        told = " ".join(str(error).split())[:200]
        raise RecipeError(f"{model_type}: its config cannot be made: {told}") from None


def _tables(
    full: dict[str, Any], source: Mapping[str, Any], cls: Any, name: str
) -> Iterator[dict[str, Any]]:
    """The configs to try: a folder's own where it is small, then smaller and smaller changes."""
    if source and _parameters(name, cls.from_dict(dict(source))) <= AS_IS:
        yield dict(source)
    for way in ways():
        yield shrunk(full, way)


def _save(name: str, config: Any, folder: Path) -> None:
    """Save a random model, and see that it runs."""
    import torch
    import transformers

    from shardkit.authoring.masked_sum import load
    from shardkit.authoring.samples import save_random
    from shardkit.runtime.model_runner import no_cache_options
    from shardkit.verification.dummy_inputs import make_inputs

    if (count := _parameters(name, config)) > SMALL:
        raise ValueError(f"{count} parameters are not small")
    save_random(getattr(transformers, name), config, folder)
    model = load(folder)
    with torch.inference_mode():
        model(**make_inputs(model), **no_cache_options(model))


def _parameters(name: str, config: Any) -> int:
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config)
    return sum(p.numel() for p in model.parameters())


def _changes(full: Mapping[str, Any], small: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that were made small, as `name = value`."""
    return tuple(
        f"{key} = {json.dumps(value)}"
        for key, value in small.items()
        if type(value) in (int, list) and full.get(key) != value
    )
