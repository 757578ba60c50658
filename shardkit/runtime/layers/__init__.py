"""Parallel forms of the layers of transformers' models.

Shapes: `B` batch, `T` tokens, `H` heads, `D` head_dim, `V` vocabulary.
"""
