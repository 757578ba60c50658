"""The checkpoints that are most served over several GPUs."""

# A checkpoint, and the class that it is saved from.
CHECKPOINTS = {
    "deepseek-v4-flash": "DeepseekV4ForCausalLM",
    "deepseek-r1": "DeepseekV3ForCausalLM",
    "qwen3.5-397b-a17b-nvfp4": "Qwen3_5MoeForConditionalGeneration",
    "glm-5-fp8": "GlmMoeDsaForCausalLM",
    "kimi-k2.5": "Kimi_K25ForConditionalGeneration",
    "minimax-m3-mxfp8": "MiniMaxM3SparseForConditionalGeneration",
    "qwen3.6-35b-a3b-nvfp4": "Qwen3_5MoeForConditionalGeneration",
    "qwen3.8": "Qwen3_5MoeForCausalLM",
    "gpt-oss-120b": "GptOssForCausalLM",
    "minimax-m2": "MiniMaxM2ForCausalLM",
    "llama-3.3-70b": "LlamaForCausalLM",
    "qwen3-235b-a22b-fp8": "Qwen3MoeForCausalLM",
    "glm-4.5": "Glm4MoeForCausalLM",
    "deepseek-v3.2": "DeepseekV32ForCausalLM",
    "nemotron-3-super-120b-a12b-nvfp4": "NemotronHForCausalLM",
    "qwen3-vl-30b-a3b": "Qwen3VLMoeForConditionalGeneration",
    "gemma-4-26b-a4b-nvfp4": "Gemma4ForConditionalGeneration",
    "gemma-3-27b": "Gemma3ForConditionalGeneration",
    "mistral-large-4": "MistralLarge4ForConditionalGeneration",
    "mimo-v2-flash": "MiMoV2FlashForCausalLM",
    "step-3.7-flash-fp8": "Step3p7ForConditionalGeneration",
    "hy3": "HYV3ForCausalLM",
    "llama-4-scout": "Llama4ForConditionalGeneration",
    "qwen2.5-72b": "Qwen2ForCausalLM",
    "qwen2.5-vl-72b": "Qwen2_5_VLForConditionalGeneration",
}
# Of names whose config.json is not at hand, what differs from their class's defaults. These have
# the 25.6 billion parameters besides the embedding, and the 400 million of SigLIP, that
# arXiv:2503.19786 gives.
STATED = {
    "gemma-3-27b": {
        "text_config": {
            "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
        },
        "vision_config": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
        },
    },
}  # fmt: skip
