"""What configs call the numbers that size a model, as one list of names for each kind.

Names that only count a part of a model (an encoder's layers, a decoder's heads) have lists of
their own: who wants the decoder's number asks for `DECODER_LAYERS + LAYERS`.
"""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")
ENCODER_LAYERS = ("encoder_layers", "num_encoder_layers")
LAYER_GROUPS = ("num_hidden_groups",)
DEPTH = ("depth",)  # of a vision tower
LAYER_TYPES = ("layers_block_type", "layer_types")  # lists with an entry for each layer
# Layers that only predict further tokens are stored after the last that the config counts.
PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")

HIDDEN_SIZE = ("hidden_size", "d_model", "n_embd", "n_embed")
OTHER_WIDTHS = ("dim",)  # a hidden size in some configs, something else in others
HEAD_DIM = ("head_dim", "d_kv")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
DECODER_HEADS = ("decoder_attention_heads",)
ENCODER_HEADS = ("encoder_attention_heads",)
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
VOCAB_SIZE = ("vocab_size",)
# Rows that a class's embedding has beyond the vocabulary, by a field that only its config has.
VOCAB_EXTRA_ROWS = {"cross_attention_layers": 8}

# Tables of a config that describe a tower beside the language model, and the language model's own.
TEXT_TABLE = "text_config"
TOWER_TABLES = ("vision_config", "audio_config")

# Modules of a tower, as tensors' names have them.
VISION_MODULES = frozenset(("vision_tower", "vision_model", "visual", "vision_encoder"))
AUDIO_MODULES = frozenset(("audio_tower", "audio_model"))
PROJECTORS = frozenset(("multi_modal_projector", "connector"))

# What a config has if some of its layers keep something else than keys and values, or share them.
NON_KV_STATE = (
    "kv_lora_rank", "num_kv_shared_layers", "attn_layer_period", "attn_layer_indices",
    "hybrid_override_pattern", "layers_block_type", "ssm_cfg", "state_size", "mamba_d_state",
    "linear_num_key_heads", "lru_width", "block_types", "ssm_state_size", "conv_L_cache",
)  # fmt: skip
KV_LAYER_TYPES = frozenset(
    ("full_attention", "sliding_attention", "chunked_attention", "attention")
)
DTYPE = ("dtype", "torch_dtype")
QUANTIZATION = ("quantization_config", "compression_config")
