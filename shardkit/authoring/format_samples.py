"""The quantized checkpoints that formats are proven on: models and statements, kept as data."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.authoring.quantize import quantize_folder
from shardkit.authoring.samples import Sample, make_sample, read_samples
from shardkit.recipe.catalog import find_recipe_folder
from shardkit.recipe.formats import Format, list_formats
from shardkit.recipe.formats.format import FOLDER

OPTIONS = "options"
PLAIN = ("embed", "lm_head", "norm", "router", ".gate.", "sinks")  # what formats leave in 16 bits


@dataclass(frozen=True)
class FormatSample:
    """A format as a config states it.

    Attributes:
        name: Its name: the format's, or that with what is optional.
        form: The format.
        statement: What config.json says.
        options: The suffixes of optional tensors that are written, too.
    """

    name: str
    form: Format
    statement: Mapping[str, Any]
    options: tuple[str, ...] = ()


def list_format_samples() -> Iterator[FormatSample]:
    """Every format that can be split, as often as there are statements of it."""
    path = find_recipe_folder() / FOLDER / "samples" / "statements.toml"
    forms = {form.name: form for form in list_formats()}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        statement = {key: value for key, value in table.items() if key != OPTIONS}
        form = next(form for at, form in sorted(forms.items(), reverse=True) if name.startswith(at))
        yield FormatSample(name, form, statement, tuple(table.get(OPTIONS, ())))


def list_format_models() -> list[Sample]:
    """The models that are quantized."""
    return list(read_samples(find_recipe_folder() / FOLDER / "samples" / "models.toml"))


def make_quantized(model: Sample, sample: FormatSample, folder: Path) -> Path:
    """Save a model in a format. Returns `folder`."""
    make_sample(model, folder)
    quantize_folder(folder, sample.form, sample.statement, choose_weights, sample.options)
    return folder


def choose_weights(name: str) -> bool:
    """Whether a tensor of a model is one that formats quantize."""
    return not any(part in name for part in PLAIN) and not name.endswith("bias")
