"""How large the buffers of a copy may be, and whether it fits into the memory that is allowed.

The upper bound is of the whole process: what it takes already, what it keeps of every tensor of
every file, and the largest of the phases that follow one another.
"""

import math
import os

from shardkit.layout import num_indices
from shardkit.output.available_memory import (
    check_memory,
    choose_max_memory,
    measure_resident_memory,
)
from shardkit.output.rows import PACKED_BYTES
from shardkit.output.stream import BUFFER_BYTES, NUM_BUFFERS, NUM_CORES
from shardkit.planning import Plan
from shardkit.shards.integrity import READ_BYTES, THREADS

SMALLEST_BUFFER = 64 << 10
PIECE_BYTES = 1100  # of a tensor in a file: its place, digest and line; measured 800
SPARE_BYTES = 24 << 20  # threads, modules that are imported late (NumPy: 12 MB), companion files


def choose_buffer_bytes(what: str, pieces: int, limit: int | None, replicas: float = 0.0) -> int:
    """The largest buffers with which a copy takes no more memory than is allowed.

    Args:
        what: The command, for an error.
        pieces: How many tensors all files have, counted in each file.
        limit: The bytes that the process may take; None for what is free, less a margin.
        replicas: Of the shards that are read: `measure_replicas` of their plan.

    Raises:
        UsageError: Even with the smallest buffers it would take more.
    """
    resident = measure_resident_memory()
    phases = min(THREADS, os.cpu_count() or 1) * READ_BYTES
    base = resident + pieces * PIECE_BYTES + NUM_CORES * PACKED_BYTES + SPARE_BYTES
    allowed = limit if limit is not None else resident + choose_max_memory(None)

    def estimate(buffer_bytes: int) -> int:
        return base + max(phases, math.ceil(NUM_BUFFERS * (1 + replicas) * buffer_bytes))

    buffer_bytes = BUFFER_BYTES
    while buffer_bytes > SMALLEST_BUFFER and estimate(buffer_bytes) > allowed:
        buffer_bytes //= 2
    check_memory(estimate(buffer_bytes), allowed, what)
    return buffer_bytes


def measure_replicas(plan: Plan) -> float:
    """What all ranks store of a block, as a multiple of it, if that is more than a buffer; else 0.

    Only of blocks of rows: of a tensor that is divided along another dimension than its first.
    """
    stored = [0.0]
    for group in plan.groups:
        placement, dim = group.first, group.layout.dim
        if dim and (axis := placement.spec.shape[dim]):
            ranks = plan.mesh.ranks()
            stored.append(sum(num_indices(placement.spans(rank)) for rank in ranks) / axis)
    return largest if (largest := max(stored)) > 1 else 0.0
