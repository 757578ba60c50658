"""Every argument of the `forward` of four models, with a value that matters."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from shardkit.verification.dummy_inputs import make_inputs

CACHES = {"past_key_values", "encoder_outputs"}  # refused by name, as generate's table has it
NO_VALUE = {"mm_encoder_outputs"}  # what a model hands to itself between two of its own calls
OUTPUTS = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
Inputs = dict[str, Any]


def list_forward(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, Inputs]:
    """Forward passes by the argument that each is about.

    Args:
        model: The model, unsharded.
        names: The arguments that its forward has.
    """
    plain: Inputs = dict(make_inputs(model))
    ids = plain["decoder_input_ids" if "decoder_input_ids" in plain else "input_ids"]
    size, length = ids.shape
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    rows: dict[str, Inputs] = {name: plain for name in plain}
    rows |= {
        "attention_mask": {"attention_mask": torch.ones_like(plain["input_ids"])},
        "decoder_attention_mask": {"decoder_attention_mask": mask.flip(1)},
        "position_ids": {"position_ids": torch.arange(3, 3 + length).expand(size, -1)},
        "token_type_ids": {"token_type_ids": mask},
        "labels": {"labels": ids},  # one tensor twice
        "logits_to_keep": {"logits_to_keep": 2},
        "use_cache": {"use_cache": False},
        "vision_feature_layer": {"vision_feature_layer": -1},
        "vision_feature_select_strategy": {"vision_feature_select_strategy": "default"},
        "image_sizes": {"image_sizes": torch.tensor([[32, 32]] * size)},
        "mm_token_type_ids": {"mm_token_type_ids": plain["input_ids"].eq(205).long()},
    }
    rows |= list_vectors(model, plain, ids, mask)
    if "pixel_values_videos" in names:
        rows |= dict.fromkeys(("pixel_values_videos", "video_grid_thw"), show_video(model, plain))
    rows = {name: row for name, row in rows.items() if name in names}
    calls = {name: {**plain, **row} for name, row in rows.items()}
    calls |= {name: {**plain, name: value} for name, value in OUTPUTS.items()}
    return {n: {k: v for k, v in call.items() if v is not None} for n, call in calls.items()}


def show_video(model: PreTrainedModel, plain: Mapping[str, torch.Tensor]) -> Inputs:
    """The same images, as a video of one frame each."""
    config: Any = model.config
    is_image = plain["input_ids"].eq(config.image_token_id)
    return {
        "input_ids": plain["input_ids"].masked_fill(is_image, config.video_token_id),
        "mm_token_type_ids": 2 * is_image.long(),
        "pixel_values_videos": plain["pixel_values"], "pixel_values": None,
        "video_grid_thw": plain["image_grid_thw"], "image_grid_thw": None,
    }  # fmt: skip


def list_vectors(
    model: PreTrainedModel, plain: Inputs, ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, Inputs]:
    """Vectors instead of tokens, as far as a model of this kind takes any, and masks for them."""
    width = model.get_input_embeddings().weight.shape[1]

    def spread(like: torch.Tensor) -> torch.Tensor:
        size, length = like.shape
        return torch.linspace(-1, 1, size * length * width).view(size, length, width)

    vectors = spread(ids)
    if not plain.keys() - {"input_ids", "attention_mask"}:
        other: Inputs = {"encoder_hidden_states": vectors, "encoder_attention_mask": mask}
        return {
            "attention_mask": {"attention_mask": mask},
            "inputs_embeds": {"inputs_embeds": vectors, "input_ids": None},
            "encoder_hidden_states": {"encoder_hidden_states": vectors},
            "encoder_attention_mask": other,
        }
    if "decoder_input_ids" in plain:
        own = {"inputs_embeds": spread(plain["input_ids"]), "input_ids": None}
        other = {"decoder_inputs_embeds": vectors, "decoder_input_ids": None}
        return {"inputs_embeds": own, "decoder_inputs_embeds": other}
    # Of text and images: embeddings in which the images' places are those of the text.
    embeds = model.get_input_embeddings()(plain["input_ids"]).detach()
    return {"inputs_embeds": {"inputs_embeds": embeds, "input_ids": None}}
