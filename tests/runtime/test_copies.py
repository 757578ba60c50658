"""How many bytes of tensors a collective over shared memory writes: not one more than it must."""

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.distributed.shared_memory import (
    SLOT_BYTES,
    TOKEN_BYTES,
    SharedMemoryTransport,
    create_memory,
    explain_absence,
    open_memory,
)

TOKEN = b"c" * TOKEN_BYTES
ONE_SLOT, MANY_SLOTS = 6 * 64, 3 * SLOT_BYTES // 4 + 12
pytestmark = pytest.mark.skipif(bool(explain_absence()), reason=explain_absence())


class WrittenBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what every operation of torch's writes; a view or an empty tensor: 0."""

    total = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(each.alias_info and not each.alias_info.is_write for each in returns)
        if not is_view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            outputs = result if isinstance(result, (list, tuple)) else [result]
            self.total += sum(each.nbytes for each in outputs if isinstance(each, torch.Tensor))
        return result


def count_written(size: int, call: Callable[[TensorParallelGroup], Any]) -> list[int]:
    """The bytes that each of `size` ranks writes in its second such call; slots are set up by the
    first."""
    fd, counts = create_memory(size, TOKEN), [-1] * size

    def run(rank: int) -> None:
        memory = open_memory(os.getpid(), fd, size, TOKEN)
        side = SharedMemoryTransport(memory, rank, [os.getpid()] * size, 20.0)
        group = TensorParallelGroup(rank, size, torch.device("cpu"), transport=side)
        call(group)
        with WrittenBytes() as written:  # type: ignore[no-untyped-call]
            call(group)
        counts[rank] = written.total

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return counts


parametrized = pytest.mark.parametrize(
    ("size", "count"), [(2, ONE_SLOT), (3, ONE_SLOT), (2, MANY_SLOTS), (3, MANY_SLOTS)]
)


@parametrized
def test_a_sum_is_one_copy_and_the_additions(size: int, count: int) -> None:
    x = torch.ones(count)
    written = count_written(size, lambda group: group.all_reduce(x))
    assert written == [x.nbytes + (size - 1) * x.nbytes] * size


@parametrized
def test_a_rounded_sum_sends_half_and_widens_once(size: int, count: int) -> None:
    """Over more than two ranks the sum is rounded, too."""
    x = torch.ones(count)
    written = count_written(size, lambda group: group.all_reduce(x, torch.bfloat16))
    rounding = x.nbytes // 2 + x.nbytes if size > 2 else 0
    assert written == [x.nbytes // 2 + x.nbytes + (size - 1) * x.nbytes + rounding] * size


@parametrized
@pytest.mark.parametrize("uneven", [False, True])
def test_a_concatenation_copies_a_part_to_its_slot_and_all_from_there(
    size: int, count: int, uneven: bool
) -> None:
    width = count // 6
    sizes = [width - uneven * rank for rank in range(size)]
    parts = [torch.ones(2, 3, each) for each in sizes]
    written = count_written(size, lambda group: group.all_gather(parts[group.tp_rank], sizes))
    total = sum(part.nbytes for part in parts)
    assert written == [part.nbytes + total for part in parts]


@parametrized
def test_a_broadcast_is_one_copy_on_every_rank(size: int, count: int) -> None:
    x = torch.ones(count)
    written = count_written(size, lambda group: group.broadcast(x.clone()))
    assert written == [x.nbytes + x.nbytes] * size  # the clone, which is the test's own
