"""A tiny random model of a given type, saved as transformers saves models."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.authoring.draft.failure import DraftError
from shardkit.authoring.draft.shrink_config import list_strategies, shrink_config
from shardkit.checkpoint import read_config
from shardkit.checkpoint.config_check import check_config
from shardkit.errors import MODEL_ERRORS
from shardkit.strict_json import quote

MAX_PARAMETERS = 3_000_000
MAX_PARAMETERS_AS_IS = 2_000_000  # of a given config that is not shrunk
ENCODER_DECODER_TASKS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
TASKS = (
    *ENCODER_DECODER_TASKS,
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "PRETRAINING",
    "",
)


@dataclass(frozen=True)
class TinyModel:
    """A tiny model's folder, its class, and in words the config that it is made from.

    `changes` are the fields that were made small, as `name = value`.
    """

    folder: Path
    class_name: str
    origin: str
    changes: tuple[str, ...] = ()


def make_tiny_model(model: str, folder: Path) -> TinyModel:
    """Save a tiny random model.

    Args:
        model: A model type of transformers, or a folder with a config.json.
        folder: Where to put the model's own folder.

    Raises:
        DraftError: transformers does not know the type, or no tiny model of it can be built and
            run.
        CheckpointError: The folder's config.json is not to be trusted.
    """
    source_folder = Path(model)
    source = read_config(source_folder) if (source_folder / "config.json").is_file() else {}
    check_config(source, (), source_folder)
    config_class, config = _load_config(model, source)
    class_name = choose_class_name(config, source)
    origin = (
        f"the config of {source_folder.resolve().name}" if source else "the type's default config"
    )
    fault, errors = "", _model_errors()
    full = config.to_dict()
    for index, table in enumerate(_list_tables(full, source)):
        limit = MAX_PARAMETERS_AS_IS if source and index == 0 else MAX_PARAMETERS
        try:
            tiny_folder = folder / f"tiny-{index}"
            _save_model(class_name, config_class.from_dict(table), tiny_folder, limit)
            return TinyModel(tiny_folder, class_name, origin, _list_changes(full, table))
        except errors as error:
            fault = fault or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise DraftError(
        "tiny model",
        f"{model}: no small model of it can be made ({fault}); give a folder with the config.json"
        " of a small one",
        fault,
    )


def choose_class_name(config: Any, source: Mapping[str, Any]) -> str:
    """The model class: the config's own if it takes such a config, or that of the type's most
    usual task.

    Raises:
        DraftError: transformers has no model class for the type.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in source.get("architectures") or ():
        stated: Any = getattr(transformers, str(name), None)
        config_class = getattr(stated, "config_class", None)
        if isinstance(config_class, type) and isinstance(config, config_class):
            return str(name)
    for task in TASKS:
        table = getattr(modeling_auto, f"MODEL_{f'FOR_{task}_' if task else ''}MAPPING_NAMES")
        names = table.get(config.model_type)
        if names and (config.is_encoder_decoder or task not in ENCODER_DECODER_TASKS):
            return str(names if isinstance(names, str) else names[0])
    raise DraftError(
        "model class", f"{config.model_type}: transformers has no model class for it alone"
    )


def _model_errors() -> tuple[type[Exception], ...]:
    """What may be raised by a model class, or by a config class that checks its fields."""
    from huggingface_hub.errors import StrictDataclassError

    return (*MODEL_ERRORS, OSError, StopIteration, StrictDataclassError)


def _describe_unknown(model: str, source: Mapping[str, Any]) -> str:
    """Why transformers has no config for a model."""
    from transformers import __version__

    if not source:
        return f"{model}: neither a folder with a config.json nor a model_type of transformers"
    if "model_type" not in source:
        return f"{model}/config.json: no model_type; add that of a model of transformers"
    return (
        f"{model}/config.json: transformers {__version__} has no model_type"
        f" {quote(source['model_type'])}"
    )


def _load_config(model: str, source: Mapping[str, Any]) -> tuple[Any, Any]:
    """The config class of a type, and its config: the source's own or the default one."""
    from transformers import CONFIG_MAPPING

    model_type = str(source.get("model_type", "")) if source else model
    if model_type not in CONFIG_MAPPING:
        raise DraftError("model class", _describe_unknown(model, source))
    config_class: Any = CONFIG_MAPPING[model_type]
    errors = _model_errors()
    try:
        config = config_class.from_dict(dict(source)) if source else config_class()
    except errors as error:
        fault = " ".join(str(error).split())[:200]
        raise DraftError(
            "tiny model", f"{model_type}: transformers cannot build its config: {fault}", fault
        ) from None
    return config_class, config


def _list_tables(full: dict[str, Any], source: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The configs to try: the folder's own if there is one, then one of each strategy."""
    if source:
        yield dict(source)
    for strategy in list_strategies():
        yield shrink_config(full, strategy)


def _save_model(class_name: str, config: Any, folder: Path, limit: int) -> None:
    """Save a random model, and run it once. Raises ValueError if it has too many parameters."""
    import torch
    import transformers

    from shardkit.authoring.hooks import run_with_hooks
    from shardkit.authoring.masked_sum import load_reference
    from shardkit.authoring.samples import save_random_model

    if (count := _count_parameters(class_name, config)) > limit:
        raise ValueError(f"{count} parameters are not small")
    save_random_model(getattr(transformers, class_name), config, folder)
    model = load_reference(folder)
    with torch.inference_mode():
        run_with_hooks(model)


def _count_parameters(class_name: str, config: Any) -> int:
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, class_name)._from_config(config)
    return sum(p.numel() for p in model.parameters())


def _list_changes(full: Mapping[str, Any], table: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that were made small, as `name = value`."""
    return tuple(
        f"{key} = {json.dumps(value)}"
        for key, value in table.items()
        if type(value) in (int, list) and full.get(key) != value
    )
