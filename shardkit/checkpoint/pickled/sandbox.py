"""A process of its own that turns one pickled weights file into a safetensors file.

    python -m shardkit.checkpoint.pickled.sandbox IN OUT    # two open file descriptors

The one place where a pickle is read: its archive is checked first, by weights_only, without
mmap, within limits on memory, time and output. The parent trusts nothing of it: the file that is
written is read as strictly as any other. An error is one line on stdout, and exit code 3.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from shardkit.checkpoint.header import MAX_TENSORS, check_name, encode_header
from shardkit.checkpoint.pickled.archive import ArchiveError, Extents, check_archive
from shardkit.dtypes import BY_TORCH_NAME, torch_name
from shardkit.errors import first_line
from shardkit.files import write_all
from shardkit.strict_json import JsonError, quote
from shardkit.tensor import TensorSpec

if TYPE_CHECKING:
    import torch

FAILED = 3
OLDEST = (2, 10)  # before, a storage of another size than its record's corrupts memory
COPIES = 4  # how often its bytes may be written: tied tensors are written under each name
SPARE = 512 << 20
UNPICKLER = "WeightsUnpickler error:"  # what torch says before it is advice to trust the file


def main(source: int, out: int) -> None:
    """Convert a file. Raises ArchiveError or JsonError for one that is not what it should be."""
    size = os.fstat(source).st_size
    with os.fdopen(source, "rb") as file:
        extents = check_archive(file, size)
        import torch

        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
            raise ArchiveError(f"torch {torch.__version__} reads pickles unsafely; 2.10 is needed")
        _limit_resources(size)
        _check_same_records(file, extents)
        file.seek(0)
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    tensors = dict(_check_tensors(value, torch))
    _check_total(tensors.values(), size)
    _write(out, tensors)


def _limit_resources(size: int) -> None:
    """No more memory than the file's bytes and a copy of its largest tensor, and an end to it."""
    with open("/proc/self/statm", "rb") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    for kind, most in {
        resource.RLIMIT_AS: mapped + 2 * size + SPARE,
        resource.RLIMIT_CPU: 120 + size // 10_000_000,
        resource.RLIMIT_FSIZE: COPIES * size + SPARE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(kind, (most, most))


def _check_same_records(file: BinaryIO, extents: Extents) -> None:
    """torch's own reader sees the members that were checked, where they were checked."""
    import torch

    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    torch_extents = {
        name: (reader.get_record_offset(name), reader.get_record_size(name))  # type: ignore[attr-defined]
        for name in reader.get_all_records()
    }
    if torch_extents != extents:
        raise ArchiveError("zipfile and torch disagree about this archive's contents")


def _check_tensors(value: Any, torch: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The tensors of a flat table, each one's bytes all its own storage's."""
    if not isinstance(value, dict) or len(value) > MAX_TENSORS:
        raise ArchiveError(f"holds a {type(value).__name__}, not a table of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise ArchiveError(f"holds {quote(name)}, a {kind}; only tensors by name are read")
        check_name(name)
        tensor = tensor.detach()
        dtype = torch_name(tensor.dtype)
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or dtype not in BY_TORCH_NAME
        ):
            raise ArchiveError(f"{quote(name)} is not a plain tensor: {dtype}, {tensor.layout}")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ArchiveError(
                f"{quote(name)} is {tensor.numel() * tensor.itemsize} bytes, but only"
                f" {tensor.untyped_storage().nbytes()} are stored"
            )
        yield name, tensor.resolve_conj().resolve_neg()


def _check_total(tensors: Any, size: int) -> None:
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    if total > COPIES * size:
        raise ArchiveError(f"tensors of {total} bytes in a file of {size}: too many share theirs")


def _write(out: int, tensors: "dict[str, torch.Tensor]") -> None:
    specs = [
        TensorSpec(name, BY_TORCH_NAME[torch_name(t.dtype)].name, tuple(t.shape))
        for name, t in tensors.items()
    ]
    write_all(out, memoryview(encode_header(specs, {"format": "pt"})))
    for tensor in tensors.values():
        whole = tensor.contiguous()
        nbytes = whole.numel() * whole.itemsize
        if nbytes:
            data = (ctypes.c_char * nbytes).from_address(whole.data_ptr())
            write_all(out, memoryview(data).cast("B"))


def _describe_error(fault: BaseException) -> str:
    """An error of whatever library, in one printable line."""
    if isinstance(fault, MemoryError):
        return "needs more memory than its size allows"
    advice_free = str(fault).partition(UNPICKLER)[2].strip()
    return first_line(ArchiveError(advice_free) if advice_free else fault)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except (ArchiveError, JsonError) as fault:
        print(_describe_error(fault))
        sys.exit(FAILED)
    except Exception as fault:
        print(f"cannot be unpickled as weights: {_describe_error(fault)}")
        sys.exit(FAILED)
