"""What ranks store more than once because they share blocks of quantized weights."""

from shardkit.layout import choose_block, num_indices
from shardkit.planning.layout_plan import Plan


def list_shared_blocks(plan: Plan) -> list[str]:
    """Units of which there are fewer blocks than ranks, in words: `1,280 ffn in blocks of 128`."""
    return [
        f"{count:,} {name} in blocks of {block}"
        for name, unit in plan.units.items()
        for count, block in unit.blocks.items()
        if choose_block(unit.shared_by or count, plan.tp_size, block) != block
    ]


def count_shared_bytes(plan: Plan) -> int:
    """The bytes of blocks that ranks store beyond what they compute of them, on all ranks."""
    total = 0
    for group in plan.groups:
        layout, spec = group.layout, group.first.spec
        if layout.dim is None or layout.block_size == 1:
            continue
        covers = [cover for rank in plan.mesh.ranks() for cover in layout.cover(rank)]
        stored = sum(cover.stop - cover.start for cover in covers)
        wanted = sum(num_indices(cover.wanted) for cover in covers)
        length = sum(map(len, layout.sections))
        total += (stored - wanted) * spec.nbytes // length * group.count
    return total
