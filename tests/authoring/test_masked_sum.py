"""Layouts mean what the models mean: proven by transformers alone, and by its own plans."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from shardkit.authoring.masked_sum import (
    load_reference,
    masked_sum_errors,
    match_parameters,
    plan_folder,
)
from shardkit.recipe.catalog import find_recipe
from shardkit.recipe.recipe import Recipe
from tests.helpers.model_samples import VARIANTS, SampleFolder, make
from tests.helpers.runtime_helpers import altered

WRONG = 0.05  # the mildest fault is off by twice that

QKV = "heads + kv_heads + kv_heads"
ANY = ("[units]", '[units]\nany = "*"')

# A fault, the variant it is planted in, and what is replaced in its recipe.
FAULTS: dict[str, tuple[str, *tuple[tuple[str, str], ...]]] = {
    "q, k and v blocks read head by head": ("gpt2", ('"3 heads"', '"heads 3"')),
    "Conv1D cut along its inputs": ("gpt2", ('"transformer.h.*.mlp.c_fc",', "")),
    "each head's q, k and v read as blocks": ("gpt_neox", ('"heads 3"', '"3 heads"')),
    "the same with alibi": ("bloom", ('"heads 3"', '"3 heads"')),
    "kv heads read apart from their q": ("falcon-grouped", ("kv_heads (heads + 2)", QKV)),
    "one k and v divided with q": ("falcon-7b", ('"heads + 2"', '"any"'), ANY),
    "one k and v divided among blocks": ("gpt_bigcode", ('"heads + 2"', '"any"'), ANY),
    "quarters read head by head": ("codegen", ('"4 3 quarter"', '"4 quarter 3"')),
    "quarters read as one": ("codegen", ('"4 quarter"', '"quarter"')),
    "gate and up cut as one axis": ("phi3", ('"2 ffn"', '"any"'), ANY),
    "gate and up read in pairs": ("phi3", ('"2 ffn"', '"ffn 2"')),
    "k and v of other ranks' heads": ("phi3", (QKV, "heads + kv_heads 2")),
    "k and v before q": ("phi3", (QKV, "kv_heads + kv_heads + heads")),
    "w2 cut unlike w1 and w3": ("mixtral", ('w2" = "ffn"', 'w2" = "2 any"'), ANY),
    "kv heads dealt without their q": ("llama-9-heads-3-kv", (', shared_by = "heads"', "")),
    "position biases cut by buckets": ("t5", ("fan_in_fan_out", "# fan_in_fan_out")),
}

# transformers' name of a style, and ours for it.  What its plans leave whole is left out.
SAME = {
    "colwise": "column", "packed_colwise": "column", "rowwise": "row", "packed_rowwise": "row",
    "embedding_rowwise": "vocab", "rowwise_split_input": "row", "mla_kv_a_proj": "replicate",
    "replicate": "replicate", "embedding_colwise": "vocab replicate",
    "replicated_with_grad_allreduce": "replicate",
    # Cut there and gathered again at once; here what comes after it is divided as well.
    "colwise_gather_output": "vocab column row",
}  # fmt: skip

# Where the two differ on purpose, by model type.
DIFFERENT = {
    # The layers with sparse activations take a mean over the width, which is whole for it.
    "gemma3n_text": {"gate_proj", "up_proj", "down_proj"},
    # Stored [experts, in, out]: there a style is of the dimension's place, here of its meaning.
    "llama4_text": {"gate_up_proj", "down_proj"},
    "llama4": {
        "gate_up_proj",
        "down_proj",
        "linear",
        "linear_1",
    },  # projectors: once for each image
    "aria_text": {"gate_up_proj", "down_proj"},
    "longcat_flash": {"gate_up_proj", "down_proj"},  # whole: some experts add the hidden state
    "inkling_text": {"lm_head"},
    "inkling2_text": {"embed_tokens", "lm_head"},  # of another layout there
    # Indexers choose the same tokens on every rank, and tables of several tokens are read whole.
    "qwen4_exp_text": {"index_qk_proj", "ngram_embedding", "input_mix_weight_down"},
    "muse_glimmer": {"patch_embedding", "vision_projection"},  # small, and run once for each image
    "doge": {"q_proj", "k_proj", "v_proj", "dt_proj", "o_proj"},  # whole: one mask of all heads
}
PLANNED = {
    sample.model: name
    for name, sample in reversed(VARIANTS.items())
    if sample.model_class.config_class.base_model_tp_plan and "awkward" not in sample.group
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleFolder:
    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else make(name, path)

    return get


def own_recipe(source: Path) -> Recipe:
    return find_recipe(transformers.AutoConfig.from_pretrained(source).to_dict())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layout_misses_the_sum_though_it_tiles_every_tensor(
    fault: str, source: SampleFolder, tmp_path: Path
) -> None:
    name, *changes = FAULTS[fault]
    whole = source(name)
    wrong = altered(own_recipe(whole).name, tmp_path, *changes)
    errors = masked_sum_errors(whole, wrong, 2, tmp_path)
    assert max(errors.values()) > WRONG, errors


@pytest.mark.parametrize("model", PLANNED)
def test_recipes_agree_with_transformers_own_plans(model: str, source: SampleFolder) -> None:
    whole = source(PLANNED[model])
    loaded, recipe = load_reference(whole), own_recipe(whole)
    ours = {
        re.sub(
            r"\.\d+\.", ".*.", parameter.removesuffix(".bias").removesuffix(".weight")
        ): p.style.name
        for parameter, p in match_parameters(loaded, plan_folder(whole, recipe, 2)).items()
    }
    both = {entry: (loaded.tp_plan[entry], ours[entry]) for entry in ours.keys() & loaded.tp_plan}
    assert both or not loaded.tp_plan
    differ = {
        entry.rpartition(".")[2]
        for entry, (theirs, own) in both.items()
        if own not in SAME[theirs].split()
    }
    assert differ == DIFFERENT.get(VARIANTS[PLANNED[model]].model_type, set())
