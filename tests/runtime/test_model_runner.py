"""One model run by transformers, whatever its class keeps of the calls before."""

from pathlib import Path

import torch

from shardkit.authoring.samples import list_samples, make_sample
from shardkit.runtime.model_runner import ModelRunner
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.models import greedy_options, select_prompt

CLASS_THAT_KEEPS_OPTIONS = "pop2piano"  # in its generation config


def test_a_call_of_generate_asks_for_what_it_returns(tmp_path: Path) -> None:
    sample = next(each for each in list_samples() if each.name == CLASS_THAT_KEEPS_OPTIONS)
    model = sample.model_class.from_pretrained(make_sample(sample, tmp_path / "model"))
    runner = ModelRunner(model.eval(), torch.device("cpu"))
    prompt, options = select_prompt(make_inputs(model)), greedy_options(2)
    greedy = runner.generate(prompt, options, with_logits=True)
    assert greedy.logits is not None
    again = runner.generate(prompt, options)
    assert again.logits is None
    assert torch.equal(again.ids, greedy.ids)
