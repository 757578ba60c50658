"""Writes recipes/proofs/PUBLISHED.md: published quantized checkpoints, planned by their real names.

python -m tests.write_published, where ../shared has their tables.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from shardkit.authoring.publishing import format_table
from shardkit.errors import ShardkitError
from shardkit.planning import Plan, make_plan, summarize_plan
from shardkit.recipe import find_recipe
from tests.helpers.published import PUBLISHED, read_published_config, read_published_specs

PAGE = Path(__file__).resolve().parents[1] / "recipes" / "proofs" / "PUBLISHED.md"
TP_SIZE = 8
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
    """The checkpoints whose tensors are known."""
    tables = [*PUBLISHED.glob("*/tensor_table.tsv"), *PUBLISHED.glob("*/*_params_map.json.gz")]
    return sorted({path.parent.name for path in tables})


def read_config_of(name: str) -> dict[str, Any]:
    """A checkpoint's config, made up from another's where it is not at hand."""
    stated = read_published_config(name)
    if name not in BASES:
        return stated
    base, fields = BASES[name]
    is_type = base in CONFIG_MAPPING
    table = CONFIG_MAPPING[base]().to_dict() if is_type else read_published_config(base)
    return {**table, **fields, **stated}


def render_published() -> str:
    """The page in Markdown."""
    return "\n".join(_render_lines()) + "\n"


def _render_lines() -> Iterator[str]:
    rows = [_plan_row(name) for name in list_published()]
    planned = sum(row[3] != "refused" for row in rows)
    yield "# Published checkpoints"
    yield ""
    yield "Written by `python -m tests.write_published`; do not edit."
    yield ""
    yield (
        f"{planned} of {len(rows)} quantized checkpoints, by the names, shapes and dtypes of all"
        f" their tensors as published, are planned over {TP_SIZE} ranks."
    )
    yield ""
    titles = ["checkpoint", "tensors:", "formats", "largest rank:", "over the mean:", "notes"]
    yield from format_table(titles, rows)


def _plan_row(name: str) -> list[str]:
    config, specs = read_config_of(name), read_published_specs(name)
    try:
        plan = make_plan(specs, find_recipe(config), config, TP_SIZE)
    except ShardkitError as refusal:
        return [name, f"{len(specs):,}", "", "refused", "", str(refusal).split(";")[0]]
    summary = summarize_plan(plan)
    formats = ", ".join(scheme.format.title for scheme in plan.grouping.schemes)
    largest = f"{max(summary.loaded_bytes) / 1e9:.1f} GB"
    ratio = f"{summary.imbalance.ratio:.2f}"
    return [name, f"{len(specs):,}", formats, largest, ratio, _describe_blocks(plan)]


def _describe_blocks(plan: Plan) -> str:
    return ", ".join(
        f"{count:,} {name} in blocks of {block}"
        for name, unit in plan.units.items()
        for count, block in unit.blocks.items()
    )


if __name__ == "__main__":
    PAGE.write_text(render_published(), encoding="utf-8")
