"""Layouts read in another way: the recipe, the text that is right and the wrong one in its place,
the module that diverges first, and the tensor to blame.
"""

LAYOUT_FAULTS = {
    "Q, K, V blocks read as interleaved": (
        "gpt2", '"3 heads"', '"heads 3"', "transformer.h.0.attn.c_proj", "c_attn.weight",
    ),
    "interleaved q, k, v read as blocks": (
        "gpt_neox", '"heads 3"', '"3 heads"', "gpt_neox.layers.0.attention.dense",
        "query_key_value.weight",
    ),
    "gate and up cut as one axis": (
        "phi3", '"2 ffn"', '"ffn 2"', "model.layers.0.mlp.down_proj", "gate_up_proj.weight",
    ),
}  # fmt: skip

# Of a Llama, whose layers run their MLP on what they have added their attention to.
SEQUENTIAL_SUMS_JOINED = (
    "[module_attributes]",
    """[joint_sums]
"layers.*" = { of = ["self_attn.o_proj", "mlp.down_proj"], at = "mlp.down_proj" }

[module_attributes]""",
)
