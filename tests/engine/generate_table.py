"""Every argument of transformers' `generate`, with a value that matters to a model that generates.

A row's name begins with the argument that it is about; a completeness test reads it there.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 3}
RETURNED = {**GREEDY, "return_dict_in_generate": True}
SAMPLED = {"max_new_tokens": 6, "do_sample": True}
Options = dict[str, Any]
SAMPLERS: Options = {
    "temperature": 0.5, "top_k": 3, "top_p": 0.6, "min_p": 0.2, "top_h": 0.4, "typical_p": 0.5,
    "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "renormalize_logits": True,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 5.0},
}  # fmt: skip
SEARCHES: Options = {
    "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True,
    "diversity_penalty": 0.5, "num_beam_groups": 3, "constraints": [], "low_memory": True,
}  # fmt: skip
OUTPUTS: Options = dict.fromkeys(
    ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states",
     "output_attentions"), True,
)  # fmt: skip
PLAIN: Options = {
    "min_new_tokens": 5, "repetition_penalty": 1.4, "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5), "guidance_scale": 1.5, "token_healing": False,
    "use_cache": False, "cache_implementation": "static", "cache_config": {},
    "max_cache_len": 64, "prefill_chunk_size": 2, "disable_compile": True,
    "prompt_lookup_num_tokens": 2, "bos_token_id": 1,
    "max_matching_ngram_size": 1, "num_assistant_tokens": 3, "is_assistant": False,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.3,
    "assistant_early_exit": 1, "assistant_lookbehind": 4, "target_lookbehind": 4,
    "assistant_ensemble_weight": 0.5, "speculation_type": "dflash", "use_mtp": False,
    "dola_layers": "low", "penalty_alpha": 0.6,     "num_beams": 3,
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "logits_processor": [abs], "stopping_criteria": [abs], "prefix_allowed_tokens_fn": abs,
    "compile_config": CompileConfig(), "continuous_batching_config": object(),
    "custom_generate": abs, "trust_remote_code": True, "assistant_model": object(),
    "assistant_tokenizer": object(), "streamer": object(), "tokenizer": object(), "max_time": 1.0,
    "past_key_values": object(), "encoder_outputs": object(), "synced_gpus": True,
    "num_beams": 2.5, "bad_words_ids": [object()],
}  # fmt: skip
OWN = {"kwargs", "self", "transformers_version"}  # of generate or its config, but no arguments


def list_generate(inputs: Mapping[str, torch.Tensor], first: list[int]) -> dict[str, Options]:
    """Calls of `generate` by name, each with all of its arguments.

    Args:
        inputs: What the model needs, of one row.
        first: The tokens that it then generates greedily, at least 3.
    """
    rows = {name: {**SAMPLED, name: value} for name, value in SAMPLERS.items()}
    rows |= {name: {**BEAMS, name: value} for name, value in SEARCHES.items()}
    rows |= {name: {**RETURNED, name: value} for name, value in OUTPUTS.items()}
    rows |= {name: {**GREEDY, name: value} for name, value in PLAIN.items()}
    rows |= {name: {**GREEDY, **options} for name, options in list_tokens(first).items()}
    length = inputs["input_ids"].shape[1]
    rows |= {
        "max_new_tokens": GREEDY,
        "max_length": {"max_length": length + 4, "do_sample": False},
        "min_length": {**GREEDY, "min_length": length + 6, "eos_token_id": first[1]},
        "no length at all": {"do_sample": False},
        "do_sample": SAMPLED,
        "generation_config": {"generation_config": GenerationConfig(**GREEDY)},
        "output_scores of beams": {**BEAMS, **RETURNED, "output_scores": True},
        "stop_strings": {**GREEDY, "stop_strings": [" time"]},
        "negative_prompt_ids": {
            **GREEDY, "guidance_scale": 1.5, "negative_prompt_ids": inputs["input_ids"],
            "negative_prompt_attention_mask": torch.ones_like(inputs["input_ids"]),
        },
    }  # fmt: skip
    rows["negative_prompt_attention_mask"] = rows["negative_prompt_ids"]
    calls = {name: {**inputs, **options} for name, options in rows.items()}
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    return calls | {"inputs": {"inputs": inputs["input_ids"], **others, **GREEDY}}


def list_tokens(first: list[int]) -> dict[str, Options]:
    """Arguments that name tokens, given those that come first without them."""
    one, two, three = first[:3]
    return {
        "eos_token_id": {"eos_token_id": [two, 2]},
        "pad_token_id": {"pad_token_id": 0},
        "decoder_start_token_id": {"decoder_start_token_id": two},
        "bad_words_ids": {"bad_words_ids": [[one], [two, three]]},
        "force_words_ids": {"force_words_ids": [[three]], "num_beams": 3},
        "suppress_tokens": {"suppress_tokens": [one]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [one]},
        "sequence_bias": {"sequence_bias": [[[one], -10.0]]},
        "forced_bos_token_id": {"forced_bos_token_id": two},
        "forced_eos_token_id": {"forced_eos_token_id": three},
    }
