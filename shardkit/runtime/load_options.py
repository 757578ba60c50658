"""How ranks load a shard folder: the options of `load` and `launch`, as a request carries them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shardkit.dtypes import torch_name
from shardkit.errors import UsageError
from shardkit.runtime.packing import Dequantize, check_dequantize


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

    def __post_init__(self) -> None:
        check_dequantize(self.dequantize)
        if self.mmap and self.verify:
            raise UsageError(
                "verify checks what is read, and with mmap nothing is: leave out one of them, or"
                " run `shardkit verify SHARDS --level files` before"
            )

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return asdict(self) | {"dtype": torch_name(self.dtype) if self.dtype else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LoadOptions":
        """The options of `to_json`."""
        name = values["dtype"]
        return cls(**{**values, "dtype": getattr(torch, name) if name else None})
