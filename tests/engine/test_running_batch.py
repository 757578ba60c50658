"""Rows that join and leave a running batch: token for token what `generate` gives each alone."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from shardkit.runtime.batching.abilities import find_abilities
from shardkit.runtime.batching.batch_runner import BatchRunner, JoiningPrompt
from shardkit.runtime.batching.cache_layers import resize_layer
from shardkit.runtime.batching.running_batch import group_prompts
from shardkit.runtime.batching.support import describe_obstacle
from shardkit.runtime.layers.experts import choose_expert_kernel
from shardkit.runtime.model_runner import ModelRunner, run_inference
from tests.helpers.model_samples import VARIANTS, make

CPU = torch.device("cpu")
JOINING = (  # attention that is grouped, sliding, latent, with sinks; a mixture; recurrence
    "llama-two-kv-heads", "gemma3_text", "gpt2", "bloom", "gpt_oss", "deepseek_v3", "mamba",
)  # fmt: skip
MORE = (
    "qwen3", "mistral", "gemma2", "opt", "phi3", "falcon-grouped", "mixtral", "qwen3_moe",
    "llama4_text", "falcon_h1", "kimi_linear",
)  # fmt: skip
REFUSING = {
    "t5": "it has an encoder",
    "bert": "it does not generate",
    "deepseek_v32": "its cache has a DynamicIndexedLayer",
}
NEW = 12  # tokens of each request


def load(name: str, folder: Path) -> PreTrainedModel:
    make(name, folder / name, "float64")
    model_class = VARIANTS[name].model_class
    model: PreTrainedModel = model_class.from_pretrained(folder / name, dtype=torch.float64).eval()
    choose_expert_kernel(model)
    return model


def generate_alone(
    model: PreTrainedModel, prompt: list[int], options: dict[str, object]
) -> list[int]:
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
    inputs["attention_mask"] = inputs["attention_mask"].long()
    seed = options.get("seed")
    plain = {n: v for n, v in options.items() if n != "seed"} | {"min_new_tokens": NEW}
    runner = ModelRunner(model, CPU)
    made = runner.generate(inputs, plain, seed=seed if isinstance(seed, int) else None)
    return made.ids[0, len(prompt) :].tolist()


def make_requests(vocabulary: int) -> Iterator[tuple[int, list[int], dict[str, object]]]:
    """Greedy and sampled ones, with the step at which each comes."""
    choose = random.Random(5)
    for number in range(10):
        prompt = [choose.randrange(3, vocabulary) for _ in range(choose.choice([1, 2, 5, 9, 17]))]
        options: dict[str, object] = {"do_sample": False, "max_new_tokens": NEW}
        if number % 3 == 0:
            options |= {"do_sample": True, "top_k": 20, "temperature": 0.7, "seed": number}
        elif number % 3 == 1:
            options |= {"repetition_penalty": 1.3}
        yield choose.choice([0, 0, 3, 4, 9]), prompt, options | {"min_new_tokens": NEW}


@pytest.mark.parametrize(
    "name", [*JOINING, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)]
)
def test_rows_that_join_and_leave_generate_what_each_would_alone(name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    assert find_abilities(ModelRunner(model, CPU)).obstacle == ""
    requests = list(make_requests(model.config.vocab_size))
    runner = BatchRunner(model, CPU, is_sampler=True)
    made: dict[int, list[int]] = {}
    for step in range(NEW + 10):
        tokens = {n: ids[-1] for n, ids in made.items() if len(ids) < NEW}
        join = [
            JoiningPrompt(number, prompt, options, None)
            for number, (at, prompt, options) in enumerate(requests)
            if at == step
        ]
        result = runner.run_step(tokens, join)
        assert not result.failed
        for number, choice in result.choices.items():
            made.setdefault(number, []).append(choice.token)
    for number, (_, prompt, options) in enumerate(requests):
        assert made[number][:NEW] == generate_alone(model, prompt, options), (number, options)


@pytest.mark.parametrize("name", REFUSING)
def test_a_model_whose_rows_cannot_join_says_why(name: str, tmp_path: Path) -> None:
    assert describe_obstacle(load(name, tmp_path), CPU) == REFUSING[name]


def test_a_cache_whose_rows_are_mixed_up_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resize_wrongly(layer: object, length: int) -> None:
        resize_layer(layer, length)
        layer.keys = layer.keys.roll(1, -2)  # type: ignore[attr-defined]

    model = load("llama-two-kv-heads", tmp_path)
    with run_inference(model.dtype):
        assert describe_obstacle(model, CPU) == ""
        monkeypatch.setattr("shardkit.runtime.batching.running_batch.resize_layer", resize_wrongly)
        assert "a sequence that joined had other logits" in describe_obstacle(model, CPU)


def test_prompts_run_together_unless_they_would_be_mostly_padding() -> None:
    assert group_prompts([3, 9, 5], may_pad=True) == [[1, 2, 0]]
    assert group_prompts([3000, 10, 2900, 8], may_pad=True) == [[0, 2, 1], [3]]
    assert group_prompts([4, 9, 4], may_pad=False) == [[1], [0, 2]]
