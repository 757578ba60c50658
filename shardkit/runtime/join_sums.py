"""Has modules of a rank's model summed together that the manifest lists so."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shardkit.errors import ManifestError
from shardkit.planning import Plan
from shardkit.recipe import JointSum, match_joint_sums
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.joint_sum import (
    EarlierGroup,
    JointGroup,
    PartialGroup,
    Summands,
    set_group,
    sum_output,
)


@dataclass(frozen=True, slots=True)
class Joint:
    """Modules of one model that are summed together.

    Attributes:
        summands: The paths of those that leave their summands to another.
        place: The path of the one whose output is the sum.
    """

    summands: tuple[str, ...]
    place: str

    def is_inside(self, path: str) -> bool:
        """Whether a module is inside of the one that sums."""
        return path.startswith(f"{self.place}.")


def join_sums(model: nn.Module, plan: Plan, group: TensorParallelGroup) -> None:
    """Give modules that are summed together the groups for it.

    Args:
        model: The rank's model, its modules in their parallel forms.
        plan: What the manifest says.
        group: The ranks.

    Raises:
        ManifestError: If the model has modules to be summed together, and none to sum them.
    """
    for joint in find_joints(model, plan) if group.tp_size > 1 else ():
        place = model.get_submodule(joint.place)
        earlier: Summands = {p: None for p in joint.summands if not joint.is_inside(p)}
        for path in joint.summands:
            is_earlier = path in earlier
            partial = EarlierGroup(group, path, earlier) if is_earlier else PartialGroup(group)
            set_group(model.get_submodule(path), partial)
        if sums_over_ranks(place):
            set_group(place, JointGroup(group, group, earlier))
        else:
            sum_output(place, JointGroup(group, PartialGroup(group), earlier))


def find_joints(model: nn.Module, plan: Plan) -> Iterator[Joint]:
    """The modules of a rank's model that are summed together: two summands or more.

    Raises ManifestError if there is none to sum them.
    """
    if not plan.joint_sums:
        return
    paths = {path for path, module in model.named_modules() if sums_over_ranks(module)}
    for rule, layer, names in match_joint_sums(plan.joint_sums, paths):
        names &= {path.removeprefix(f"{layer}.") for path in paths}
        if len(names) > 1:
            yield _find_joint(model, rule, layer, names)


def _find_joint(model: nn.Module, rule: JointSum, layer: str, names: set[str]) -> Joint:
    inside = (name for name, _ in model.get_submodule(layer).named_modules())
    place = next(filter(rule.match_place, inside), "")
    if not place:
        raise ManifestError(f"joint_sums: {layer} has no module {rule.at!r}")
    others = sorted(f"{layer}.{name}" for name in names - {place})
    return Joint(tuple(others), f"{layer}.{place}")


def sums_over_ranks(module: nn.Module) -> bool:
    """Whether a module, in its parallel form, has a group to sum over."""
    return isinstance(getattr(module, "group", None), TensorParallelGroup)
