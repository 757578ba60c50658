"""What configs call the numbers that size a model, as one list of names for each kind.

Names that only count a part of a model (an encoder's layers, a decoder's heads) have lists of
their own: who wants the decoder's number asks for `DECODER_LAYERS + LAYERS`.
"""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")
ENCODER_LAYERS = ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers")
LAYER_GROUPS = ("num_hidden_groups",)
LAYERS_PER_STACK = ("num_layers_per_stack",)  # stacks that take turns, each several times
DEPTH = ("depth",)  # of a vision tower
LAYER_TYPES = ("layers_block_type", "layer_types")  # lists with an entry for each layer
# Modules that are stored once for several layers, and the type of these layers.
REPEATED_BLOCKS = {"shared_transf": "hybrid", "shared_transformer": "hybrid"}
# Layers that only predict further tokens are stored after the last that the config counts.
PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")

HIDDEN_SIZE = ("hidden_size", "d_model", "n_embd", "n_embed")
OTHER_WIDTHS = ("dim", "embed_dim")  # a hidden size in some configs, something else in others
HEAD_DIM = ("head_dim", "d_kv", "dim_head")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
DECODER_HEADS = ("decoder_attention_heads", "decoder_num_attention_heads")
ENCODER_HEADS = ("encoder_attention_heads", "encoder_num_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
VOCAB_SIZE = ("vocab_size",)
# Rows that a class's embedding has beyond the vocabulary, by a field that only its config has.
VOCAB_EXTRA_ROWS = {"cross_attention_layers": 8, "audio_vocab_size": 1}
VOCAB_FURTHER = ("additional_vocab_size",)  # fields that count such rows
VOCAB_PROMPTS = ("prompt_types", "prompt_length")  # rows for each token of each kind of prompt
POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")

# Tables of a config that describe a tower beside the language model, and the language model's own.
TEXT_TABLE = "text_config"
DECODER_TABLES = ("decoder", "decoder_config")  # of models whose encoder has one, too
TOWER_TABLES = ("vision_config", "audio_config")

# Modules of a tower, as tensors' names have them.
VISION_MODULES = frozenset(
    (
        "vision_tower", "vision_model", "visual", "vision_encoder", "image_tower", "video_tower",
        "vision_backbone", "vit", "sam_model", "qwen2_model", "image_encoder", "vqmodel",
    )
)  # fmt: skip
# Modules of a mixture: its experts, and one of them alone if it is not called by its number.
EXPERTS_MODULE, EXPERT_PREFIX = "experts", "expert_"
AUDIO_MODULES = frozenset(("audio_tower", "audio_model", "sound_encoder", "perception"))
PROJECTORS = frozenset(
    (
        "multi_modal_projector", "connector", "aligner", "vision_projection", "mm_projector",
        "resampler_model", "patch_merge_mlp", "vit_large_projector", "vision_language_adapter",
        "mlp1", "sound_projection", "projector", "mlp_AR", "layerwise_projectors",
        "spatial_projectors", "perceiver_resampler", "qformer", "image_to_text_projection",
    )
)  # fmt: skip
# How recipes begin the names of a tower's units, whatever its modules are called.
TOWER_UNITS = ("vision_", "audio_")
# Modules of a language model whose keys and values are an image's, made once for each.
CROSS_MODULES = frozenset(("cross_attn",))

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token")
TWO_STREAMS = "bi_data"  # a model that has it generates by two passes through every layer
# A table of hashes is read once for each of these lengths of groups of bytes, and each function.
HASHED_LENGTHS = "encoder_hash_byte_group_size"
HASH_FUNCTIONS = ("encoder_hash_byte_group_nb_functions",)
FEATURES_READ = "composer_vocab_size"  # by an encoder that could look up the decoder's tokens
EMBEDDED_TWICE = "has_lora_adapter"  # a prompt's tokens are looked up again where sound is put in
GLOBAL_TOKENS = "num_global_tokens"  # what an encoder runs beside its own tokens

# What configs say of what is kept for each token.
KV_LATENT = ("kv_lora_rank",)  # one latent vector for the keys and values of all heads, ...
ROPE_KEY = ("qk_rope_head_dim",)  # ... and one key with positions
KV_SHARED = ("num_kv_shared_layers",)  # the last layers, which use another's keys and values
EXPANDED_KV = ("new_decoder_architecture",)  # keys and values are kept once for each query head
# Of models that keep a state of a fixed size, and of those that keep nothing.
FIXED_STATE = ("state_size", "lru_width", "rescale_every")
UNCACHED = ("use_lang_emb", "afn")
# Hidden states instead of keys and values, hashes, or the keys of an indexer beside them.
OTHER_CACHES = (
    "mem_len", "index_head_dim", "indexer_head_dim", "ssm_cfg", "lsh_attn_chunk_length"
)  # fmt: skip
DTYPE = ("dtype", "torch_dtype")
QUANTIZATION = ("quantization_config", "compression_config")
# What such a table has besides: which modules it is of, and tables for some of them.
QUANTIZED_LISTS = (
    "ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "quantization",
    "config_groups", "quantized_layers",
)  # fmt: skip
# Files beside config.json that say the same, and the method that they are of.
QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
