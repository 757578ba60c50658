"""How ranks load a shard folder: the options of `load` and `launch`, as a request carries them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shardkit.dtypes import torch_name
from shardkit.errors import UsageError
from shardkit.runtime.distributed.rounded_sums import check_reduce_dtype
from shardkit.runtime.packing import Dequantize, check_dequantize

DTYPES = ("dtype", "reduce_dtype")  # which JSON has by torch's names


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a rank does with its shard, the same on every rank.

    Attributes:
        dtype: What to run in; None for the checkpoint's own.
        verify: Whether to check each shard's SHA-256 while loading it.
        dequantize: When quantized weights are computed: in the "forward", each time, in the memory
            of the shard; or once, at "load", for speed, in that of weights in `dtype`.
        mmap: Whether weights that need no change stay in the mapped file, and are read when they
            are first used: for who trusts the folder. If a file is changed while it is in use, so
            are the weights; if it is cut shorter, the process ends by SIGBUS.
        compile: Whether decoding is compiled.
        reduce_dtype: torch.bfloat16 to send the summands of wider activations in it, in half the
            bytes, which rounds them; None for sums in the activations' own dtype.

    Raises:
        UsageError: If one is not what it can be, or does not go with another.

    Example:
        >>> LoadOptions.from_json(LoadOptions(torch.bfloat16).to_json()).dtype
        torch.bfloat16
    """

    dtype: torch.dtype | None = None
    verify: bool = False
    dequantize: Dequantize = "forward"
    mmap: bool = False
    compile: bool = False
    reduce_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_dequantize(self.dequantize)
        check_reduce_dtype(self.reduce_dtype)
        if self.mmap and self.verify:
            raise UsageError(
                "verify checks what is read, and with mmap nothing is: leave out one of them, or"
                " run `shardkit verify SHARDS --level files` before"
            )

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        names = {name: getattr(self, name) for name in DTYPES}
        dtypes = {key: torch_name(each) if each else None for key, each in names.items()}
        return asdict(self) | dtypes

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LoadOptions":
        """The options of `to_json`."""
        names = {name: values[name] for name in DTYPES}
        dtypes = {key: getattr(torch, name) if name else None for key, name in names.items()}
        return cls(**{**values, **dtypes})
