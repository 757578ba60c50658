"""Time of a plan at the real size of the checkpoints that are most served over several GPUs.

    python -m benchmarks.plan [--configs FOLDER] [--tp 8 --tp 16] [--rounds 3] [--as-published]
                              [NAME ...]

Each checkpoint is made of its config alone: the names and shapes that transformers' class saves,
in bfloat16, as files with true headers and holes for the data, and an index of them.  A plan runs
in a process of its own, beside one that only imports torch, whose time shows how fast the machine
is.  Times are of the clock, and of the processor, which other work on the machine changes less.  A
config comes from FOLDER/NAME/config.json if it is there, else from the class's defaults.  With
--as-published a checkpoint has the tensors that are published, if there is a table of them, or else
those of the quantization that its published config states.
"""

import argparse
import copy
import fnmatch
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.core_model_loading import revert_weight_conversion

from benchmarks.checkpoints import CHECKPOINTS, STATED
from shardkit.authoring.format_samples import choose_weights
from shardkit.authoring.model_classes import list_classes
from shardkit.checkpoint.header import encode_header
from shardkit.config_fields import AUDIO_MODULES, PROJECTORS, VISION_MODULES
from shardkit.errors import MODEL_ERRORS, RecipeError
from shardkit.recipe.formats import Scheme, WeightKind, find_schemes
from shardkit.recipe.formats.grouping import expect_shape
from shardkit.runtime.models.registry import find_model_class
from shardkit.tensor import TensorSpec
from tests.helpers.published import PUBLISHED, read_published_config, read_published_specs

CONFIGS = PUBLISHED
FILE_BYTES = 5_000_000_000  # as much as a published file has; some have ten times as much
TABLES = ("hf_ckpt_params_map.json.gz", "tensor_table.tsv")
LISTS_OF_PLAIN = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
TOWERS = VISION_MODULES | AUDIO_MODULES | PROJECTORS  # which publishers leave as they are
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FAULTS: tuple[type[Exception], ...] = (*MODEL_ERRORS, RecipeError)


def make_config(name: str, model_class: Any, folder: Path) -> Any:
    """The published config without its quantization, or what is known of it."""
    path = folder / name / "config.json"
    table = json.loads(path.read_text()) if path.exists() else copy.deepcopy(STATED.get(name, {}))
    for part in (table, *(value for value in table.values() if isinstance(value, dict))):
        part.pop("quantization_config", None)
    return model_class.config_class.from_dict(table)


def list_specs(model: transformers.PreTrainedModel) -> list[TensorSpec]:
    """What a model saves, ties once, in bfloat16."""
    ties = model.all_tied_weights_keys or {}
    state = {name: t for name, t in model.state_dict().items() if name not in ties}
    saved: Mapping[str, torch.Tensor] = revert_weight_conversion(model, state)
    return [TensorSpec(name, "BF16", tuple(t.shape)) for name, t in saved.items()]


def read_quantization(name: str, folder: Path) -> dict[str, Any]:
    """What the published files of a checkpoint say of quantization, as a config would."""
    for path in sorted((folder / name).glob("*config*.json"), key=lambda path: len(path.name)):
        table = json.loads(path.read_text())
        for part in (table, *(value for value in table.values() if isinstance(value, dict))):
            if part.get("quantization_config"):
                return {"quantization_config": part["quantization_config"]}
    path = folder / name / "hf_quant_config.json"
    return {"quantization_config": json.loads(path.read_text())} if path.exists() else {}


def list_plain_modules(stated: dict[str, Any]) -> tuple[frozenset[str], list[re.Pattern[str]]]:
    """The modules that a quantization leaves as they are, as every writer spells them.

    Returns names, and the patterns of those that are spelled as one: some lists have 700 names.
    """
    inner = stated.get("quantization")
    table = {**stated, **inner} if isinstance(inner, dict) else stated
    lists = [table.get(key) for key in LISTS_OF_PLAIN]
    every = {str(each) for names in lists if isinstance(names, list) for each in names}
    spelled = {name for name in every if name.startswith("re:") or set("*?[") & set(name)}
    patterns = [
        name.removeprefix("re:") if name.startswith("re:") else fnmatch.translate(name)
        for name in sorted(spelled)
    ]
    return frozenset(every - spelled), [re.compile(text) for text in patterns]


def quantize_specs(specs: list[TensorSpec], quantization: dict[str, Any]) -> list[TensorSpec]:
    """The tensors that store these weights by the first scheme of a quantization."""
    schemes = find_schemes(quantization)
    names, patterns = list_plain_modules(quantization["quantization_config"])
    names |= TOWERS
    stored: list[TensorSpec] = []
    for spec in (each for whole in specs for each in unstack_experts(whole, schemes[-1])):
        module = spec.name.removesuffix(".weight")
        parts = [module, *module.split(".")]
        is_plain = not names.isdisjoint(parts) or any(
            pattern.match(part) for pattern in patterns for part in parts
        )
        stored += [spec] if is_plain else store_weight(spec, schemes[-1])
    return stored


def unstack_experts(spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    """Experts one by one, as quantized checkpoints have them, unless the format has a stack."""
    module, _, leaf = spec.name.rpartition(".")
    if len(spec.shape) != 3 or leaf not in STACKS or scheme.format.codes.follows_parameter:
        return [spec]
    count, out, inputs = spec.shape
    names = STACKS[leaf]
    return [
        TensorSpec(f"{module}.{at}.{name}.weight", spec.dtype, (out // len(names), inputs))
        for at in range(count)
        for name in names
    ]


def store_weight(spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    """What a scheme stores of a weight; the weight itself if it is none that formats quantize."""
    form = scheme.format
    is_stack = form.codes.follows_parameter
    is_linear = len(spec.shape) == 3 if is_stack else spec.name.endswith(".weight")
    block = max((number for number in scheme.numbers.values() if number), default=1)
    is_whole = min(spec.shape[-2:], default=0) >= block  # what is less than a block is left plain
    if not is_linear or not is_whole or len(spec.shape) < 2 or not choose_weights(spec.name):
        return [spec]
    base = spec.name if is_stack else spec.name.removesuffix(".weight")
    out, inputs = spec.shape[-2:] if not form.transposed else spec.shape[:-3:-1]
    weight = WeightKind(scheme, (*spec.shape[:-2], out, inputs))
    lead = spec.shape[:-2]
    needed = [each for each in form.tensors if not each.optional]
    return [
        TensorSpec(
            each.name_after(base),
            each.dtypes[0],
            (*lead, *expect_shape(weight, each, each.dtypes[0])),
        )
        for each in needed
    ]


def make_checkpoint(name: str, configs: Path) -> tuple[list[TensorSpec], dict[str, Any]]:
    """The tensors of a name's class in bfloat16, and its config."""
    published = read_published_config(name)
    stated = published.get("architectures") or ["class for it"]
    class_name = CHECKPOINTS.get(name, stated[0])
    model_class = find_model_class(class_name)
    if model_class is None and published.get("model_type") in CONFIG_MAPPING:
        model_class = list_classes(published["model_type"])[0]  # its own name is the vendor's
    if model_class is None:
        raise ValueError(f"transformers has no {class_name}")
    config = make_config(name, model_class, configs)
    with torch.device("meta"):
        model = model_class(config)
    config.architectures = [model_class.__name__]
    return list_specs(model), json.loads(config.to_json_string(use_diff=False))


def make_published(name: str, configs: Path) -> tuple[list[TensorSpec], dict[str, Any]]:
    """The tensors of a name as they are published, and the config that says how."""
    if configs == PUBLISHED and any((configs / name / table).exists() for table in TABLES):
        config = read_published_config(name)
        if "model_type" not in config:  # it has what is said of quantization only
            config = make_checkpoint(name, configs)[1] | config
        return read_published_specs(name), config
    specs, config = make_checkpoint(name, configs)
    quantization = read_quantization(name, configs)
    return (quantize_specs(specs, quantization) if quantization else specs), config | quantization


def write_checkpoint(specs: list[TensorSpec], config: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint without data, in as many files as its bytes need."""
    files: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if files[-1] and used + spec.nbytes > FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(spec)
        used += spec.nbytes
    weight_map: dict[str, str] = {}
    for at, each in enumerate(files):
        path = folder / f"model-{at + 1:05}-of-{len(files):05}.safetensors"
        head = encode_header(each, {"format": "pt"})
        path.write_bytes(head)
        os.truncate(path, len(head) + sum(spec.nbytes for spec in each))
        weight_map |= {spec.name: path.name for spec in each}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config))


def time_command(arguments: list[str], rounds: int) -> tuple[float, float]:
    """The median seconds of a command in a process of its own, by the clock and the processor.

    Raises CalledProcessError.
    """
    clock, processor = [], []
    for _ in range(rounds):
        used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(arguments, check=True, capture_output=True, text=True)
        clock.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)
    return statistics.median(clock), statistics.median(processor)


def show_seconds(seconds: tuple[float, float]) -> str:
    """A cell of the table."""
    return f"{seconds[0]:6.2f} s ({seconds[1]:5.2f} s)"


def measure(name: str, configs: Path, tp_sizes: list[int], rounds: int, as_published: bool) -> str:
    """A line of the table for one checkpoint."""
    plan = [sys.executable, "-m", "shardkit", "plan"]
    with tempfile.TemporaryDirectory(prefix="shardkit-") as scratch:
        try:
            make = make_published if as_published else make_checkpoint
            specs, config = make(name, configs)
            write_checkpoint(specs, config, Path(scratch))
        except FAULTS as error:
            return f"{name:34} {str(error).splitlines()[0][:90]}"
        cells = []
        for tp_size in tp_sizes:
            try:
                seconds = time_command([*plan, scratch, "--tp", str(tp_size)], rounds)
                cells.append(show_seconds(seconds))
            except subprocess.CalledProcessError as error:
                cells.append(error.stderr.strip().splitlines()[-1])
    return f"{name:34} {len(specs):7} {'  '.join(cells)}"


def main() -> None:
    """Measure the checkpoints asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    parser.add_argument("--tp", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as-published", action="store_true")
    options = parser.parse_args()
    tp_sizes = options.tp or [8, 16]
    torch_seconds = time_command([sys.executable, "-c", "import torch"], options.rounds)
    print(f"{'import torch':34} {'':7} {show_seconds(torch_seconds)}")
    for name in options.names or CHECKPOINTS:
        published = options.as_published
        print(measure(name, options.configs, tp_sizes, options.rounds, published), flush=True)


if __name__ == "__main__":
    main()
