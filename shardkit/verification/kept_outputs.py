"""What the reference's blocks output in one pass: beyond a few, on disk.

So the memory that a verification takes does not grow with the number of layers by what each of them
outputs. The file has no name, and is gone with the process.
"""

import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import IO

import torch

from shardkit.errors import OutputError
from shardkit.files import read_exactly, write_all
from shardkit.verification.blocks import BlockCall

MAX_KEPT = 16 << 20  # bytes that stay in memory: those of a small model need no file


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """Where in the file a tensor is, and what it is like."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class KeptOutputs(MutableMapping[BlockCall, list[torch.Tensor]]):
    """The outputs of each call, in the order they were kept; not to be changed in place."""

    def __init__(self, most: int = MAX_KEPT) -> None:
        self._most = most
        self._calls: dict[BlockCall, list[torch.Tensor] | list[_StoredTensor]] = {}
        self._nbytes = 0
        self._file: IO[bytes] | None = None
        self._last: tuple[BlockCall, list[torch.Tensor]] | None = None

    def __setitem__(self, call: BlockCall, outputs: list[torch.Tensor]) -> None:
        """Keep a call's outputs. Raises OutputError if there is no room on disk for them."""
        self._last = None
        nbytes = sum(output.nbytes for output in outputs)
        if self._nbytes + nbytes <= self._most:
            self._nbytes += nbytes
            self._calls[call] = outputs
            return
        try:
            self._calls[call] = [self._store(output) for output in outputs]
        except OSError as error:
            raise OutputError(f"{tempfile.gettempdir()}: {error.strerror}") from None

    def __getitem__(self, call: BlockCall) -> list[torch.Tensor]:
        if self._last is not None and self._last[0] == call:
            return self._last[1]
        outputs = [
            self._read(each) if isinstance(each, _StoredTensor) else each
            for each in self._calls[call]
        ]
        self._last = call, outputs  # which every rank asks for in turn
        return outputs

    def __delitem__(self, call: BlockCall) -> None:
        del self._calls[call]
        self._last = None

    def __iter__(self) -> Iterator[BlockCall]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, call: object) -> bool:
        return call in self._calls

    def clear(self) -> None:
        """Keep nothing, and remove the file."""
        self._calls.clear()
        self._nbytes, self._last = 0, None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _store(self, output: torch.Tensor) -> _StoredTensor:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 -- for all calls
            weakref.finalize(self, self._file.close)
        start = self._file.tell()
        write_all(self._file.fileno(), _view_bytes(output.contiguous()))
        return _StoredTensor(start, output.dtype, output.shape)

    def _read(self, stored: _StoredTensor) -> torch.Tensor:
        assert self._file is not None
        output = torch.empty(stored.shape, dtype=stored.dtype)
        read_exactly(self._file.fileno(), _view_bytes(output), stored.start)
        return output


def _view_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
