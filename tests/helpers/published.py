"""Tables of the real names, shapes and dtypes of published checkpoints, if they are there."""

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from shardkit.tensor import TensorSpec
from tests.helpers.real_inputs import SHARED

PUBLISHED = SHARED / "fixtures" / "published"
CONFIGS = ("config.json", "config.transcribed.json", "config.core.transcribed.json")
QUANTIZATION = ("quantization_config.transcribed.json",)
NUMBERS = re.compile(r"(?<![^.])(\d+(?:-\d+)?(?:,(?:\.\.\.|\d+(?:-\d+)?))*)(?![^.])")


def read_published_config(name: str) -> dict[str, Any]:
    """A checkpoint's config, with what stands beside it of quantization."""
    folder = PUBLISHED / name
    config: dict[str, Any] = {}
    for file in (*CONFIGS, *QUANTIZATION):
        if (folder / file).exists():
            config |= json.loads((folder / file).read_text())
    path = folder / "hf_quant_config.json"
    if "quantization_config" not in config and path.exists():
        config["quantization_config"] = json.loads(path.read_text())
    return config


def read_published_specs(name: str) -> list[TensorSpec]:
    """Every tensor of a checkpoint."""
    path = PUBLISHED / name / "hf_ckpt_params_map.json.gz"
    if path.exists():
        table = json.loads(gzip.decompress(path.read_bytes()))
        return [TensorSpec(n, each["dtype"], tuple(each["shape"])) for n, each in table.items()]
    lines = (PUBLISHED / name / "tensor_table.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith(("#", "name\t"))]
    return [
        TensorSpec(tensor, dtype, tuple(json.loads(shape)))
        for pattern, _, _, shape, dtype, _ in rows
        for tensor in expand_names(pattern)
    ]


def expand_names(pattern: str) -> Iterator[str]:
    """The names that ranges stand for: `layers.0-2,4,...,8.w`."""
    parts = NUMBERS.split(pattern)
    for numbers in itertools.product(*map(expand_numbers, parts[1::2])):
        names = [*parts]
        names[1::2] = map(str, numbers)
        yield "".join(names)


def expand_numbers(text: str) -> list[int]:
    """The numbers of a list of ranges; an ellipsis goes on as the two before it do."""
    numbers: list[int] = []
    is_open = False
    for item in text.split(","):
        if item == "...":
            is_open = True
            continue
        first, _, last = item.partition("-")
        if is_open:
            numbers += range(
                numbers[-1] + numbers[-1] - numbers[-2], int(first), numbers[-1] - numbers[-2]
            )
            is_open = False
        numbers += range(int(first), int(last or first) + 1)
    return numbers
