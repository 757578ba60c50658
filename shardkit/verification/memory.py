"""How much memory a verification takes, from the manifest alone: upper bounds."""

import math
import re
from collections import Counter

from shardkit.dtypes import DTYPES
from shardkit.shards import Manifest

PROCESS_BYTES = 450_000_000  # of a process that has imported torch and transformers
WIDEST = 8  # bytes of a value of the reference, which is float64
DEQUANTIZED = 4  # bytes of a value of a quantized weight of the source, which is float32
PASSES = 2  # records that are kept: of one without a cache, and of one with it
TOKENS = 64  # of all texts, those of two steps included; images may fill more
NUMBER = re.compile(r"\.\d+(?=\.|$)")


def estimate_real_ranks(manifest: Manifest, dtype: str | None) -> int:
    """Bytes that real ranks take with the unsharded model, whole, in its own and a wider dtype.

    Args:
        manifest: The split.
        dtype: What to compute in; None means the dtype that most weights are stored in.
    """
    specs = [p.spec for p in manifest.plan.weights]
    count = sum(math.prod(spec.shape) for spec in specs)
    width = max((DTYPES[spec.dtype].bits for spec in specs), default=32) // 8
    if dtype is not None:
        width = next(d.bits for d in DTYPES.values() if d.torch_name == dtype) // 8
    wider = 8 if width >= 4 else 4
    return count * (wider + 2 * width) + (manifest.tp_size + 1) * PROCESS_BYTES


def estimate_turns(manifest: Manifest) -> int:
    """Bytes that ranks in turns take: the largest block in float64, and twice as it is stored.

    The stored tensors of a block are kept until every unsharded model has had them, and a tensor
    that the model stacks out of several is one more copy. What every block outputs is kept, too.
    """
    counts: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    outputs: dict[str, int] = {}
    quantized = {weight.name for weight in manifest.plan.grouping.weights.values()}
    for placement in manifest.plan.weights:
        spec, block = placement.spec, name_block(placement.spec.name)
        is_quantized = spec.name in quantized
        width = DEQUANTIZED if is_quantized else DTYPES[spec.dtype].bits / 8
        counts[block] += math.prod(spec.shape)
        stored[block] += math.ceil(math.prod(spec.shape) * width)
        is_layer = NUMBER.search(spec.name) is not None
        if len(spec.shape) == 1 or not is_layer:
            outputs[block] = max(outputs.get(block, 0), *spec.shape, 1)
    largest = max((counts[b] * WIDEST + 2 * stored[b] for b in counts), default=0)
    return PROCESS_BYTES + largest + PASSES * TOKENS * WIDEST * sum(outputs.values())


def name_block(tensor: str) -> str:
    """The block that a tensor is of, by its name: to its first number, or else its module.

    Example:
        >>> name_block("model.layers.3.mlp.up_proj.weight"), name_block("lm_head.weight")
        ('model.layers.3', 'lm_head')
    """
    match = NUMBER.search(tensor)
    return tensor[: match.end()] if match else tensor.rpartition(".")[0]
