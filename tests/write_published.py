"""Writes recipes/proofs/PUBLISHED.md: published checkpoints, planned as they are published.

python -m tests.write_published, if ../shared has their configs. It also writes served.json: the
plans of the checkpoints that are most served over several GPUs, for the page of families.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.plan import FAULTS, make_published
from shardkit.authoring.publishing import format_table
from shardkit.authoring.served import SERVED, describe_plan, plan_served
from shardkit.errors import RecipeError, ShardkitError
from shardkit.planning import Plan, make_plan
from shardkit.recipe import find_recipe
from shardkit.recipe.formats import group_checkpoint
from shardkit.tensor import TensorSpec, TensorTable
from tests.helpers.published import PUBLISHED, read_published_config, read_published_specs

PROOFS = Path(__file__).resolve().parents[1] / "recipes" / "proofs"
PAGE = PROOFS / "PUBLISHED.md"
TP_SIZE = 8
LAST_KNOWN = "kimi-k2.5"  # after it comes one that transformers has no class for
# Of checkpoints whose config.json is not at hand: the type whose default config is theirs, or
# another checkpoint of the same model, and what differs.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax-m3-mxfp8": ("minimax_m3_vl", {}),
    "qwen3-32b-awq": ("qwen3-32b-fp8", {}),
    "glm-5.1-w8a8-ascend": ("glm-5.2-fp8", {"quantization_config": None}),
    "glm-4.5-fp8": (
        "glm4_moe",
        {
            "architectures": ["Glm4MoeForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 92,
            "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
            "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
            "first_k_dense_replace": 3, "vocab_size": 151552,
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
                },
            },
        },
    ),
}  # fmt: skip


def list_published() -> list[str]:
    """Every checkpoint of which something is known."""
    return sorted(path.name for path in PUBLISHED.iterdir() if path.is_dir())


def has_names(name: str) -> bool:
    """Whether the names of a checkpoint's tensors are known."""
    folder = PUBLISHED / name
    return any([*folder.glob("tensor_table.tsv"), *folder.glob("*_params_map.json.gz")])


def read_config_of(name: str) -> dict[str, Any]:
    """A checkpoint's config, made up from another's if it is not at hand."""
    stated = read_published_config(name)
    if name not in BASES:
        return stated
    base, fields = BASES[name]
    is_type = base in CONFIG_MAPPING
    table = CONFIG_MAPPING[base]().to_dict() if is_type else read_published_config(base)
    return {**table, **fields, **stated}


def list_tensors_of(name: str) -> tuple[list[TensorSpec], dict[str, Any]]:
    """A checkpoint's tensors and config. Raises RecipeError for one that no class is known of."""
    if has_names(name):
        return read_published_specs(name), read_config_of(name)
    try:
        return make_published(name, PUBLISHED)
    except FAULTS as error:
        raise RecipeError(str(error).splitlines()[0]) from None


def render_published() -> str:
    """The page in Markdown."""
    return "\n".join(_render_lines()) + "\n"


def _render_lines() -> Iterator[str]:
    rows = [_plan_row(name) for name in list_published()]
    planned = sum("refused" not in row[4:6] for row in rows)
    yield "# Published checkpoints"
    yield ""
    yield "Written by `python -m tests.write_published`; do not edit."
    yield ""
    yield (
        f"{planned} of {len(rows)} published checkpoints, most of them quantized, are planned over"
        f" {TP_SIZE} ranks, and mixtures with whole experts on each (*ep*), too. *Names*: those of"
        " every tensor as published, with shapes and dtypes; of the others, those of transformers'"
        " class, quantized as the published config says. The columns have the largest rank's bytes"
        " and its ratio to the mean."
    )
    yield ""
    titles = ["checkpoint", "names", "tensors:", "formats", "tp 8:", "ep 8:", "notes"]
    yield from format_table(titles, rows)


def _plan_row(name: str) -> list[str]:
    names = "published" if has_names(name) else "of the class"
    try:
        specs, config = list_tensors_of(name)
        recipe = find_recipe(config)
    except ShardkitError as refusal:
        return [name, names, "", "", "refused", "refused", str(refusal)]
    schemes = group_checkpoint(TensorTable.of(specs), config).schemes
    cells, notes = [], dict[str, None]()
    for expert_parallel in (False, True):
        try:
            plan = make_plan(specs, recipe, config, TP_SIZE, expert_parallel)
        except ShardkitError as refusal:
            is_dense = "can place whole on a rank" in str(refusal)
            cells.append("dense" if is_dense else "refused")
            notes |= {} if is_dense else {str(refusal): None}
            continue
        cells.append(describe_plan(plan))
        if not expert_parallel and plan.grouping.schemes:
            notes |= {_describe_blocks(plan): None}
    formats = ", ".join(scheme.format.title for scheme in schemes) or "16 bits"
    return [name, names, f"{len(specs):,}", formats, *cells, "; ".join(filter(None, notes))]


def _describe_blocks(plan: Plan) -> str:
    return ", ".join(
        f"{count:,} {name} in blocks of {block}"
        for name, unit in plan.units.items()
        for count, block in unit.blocks.items()
    )


def list_served() -> Iterable[str]:
    """The checkpoints that are most served, in order."""
    for name in CHECKPOINTS:
        yield name
        if name == LAST_KNOWN:
            yield "kimi-k3"


def write_served() -> None:
    """Plan the checkpoints that are most served, and store what became of it."""
    rows = []
    for name in list_served():
        try:
            specs, config = list_tensors_of(name)
        except ShardkitError as refusal:
            rows.append({"checkpoint": name, "model_type": "", "refusal": str(refusal)})
            continue
        rows.append({"checkpoint": name, **plan_served(specs, config)})
    lines = ",\n".join(map(json.dumps, rows))
    (PROOFS / SERVED).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write_served()
    PAGE.write_text(render_published(), encoding="utf-8")
