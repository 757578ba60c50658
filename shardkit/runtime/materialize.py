"""Fills a model on the meta device from tensors of a shard, and makes what no shard stores."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from shardkit.errors import ManifestError
from shardkit.planning.placement import Placement
from shardkit.runtime.conversion import Conversion

MAX_COMPUTED = 4 << 30  # bytes that a model computes for itself: tables of positions, masks


def placements_by_parameter(
    model: PreTrainedModel, placements: Mapping[str, Placement], plan: list[Conversion]
) -> dict[str, Placement]:
    """Each of the model's tensors that the shards make, and the placement it is made of.

    Converts tensors of the whole shapes, without data, and raises ManifestError where one is not
    the shape the model has: a config that is not the weights'.
    """
    state, placed = model.state_dict(), {}
    for conversion in plan:
        sources = [placements[name] for name, _ in conversion.sources]
        whole = {p.spec.name: torch.empty(p.spec.shape, device="meta") for p in sources}
        for name, tensor in conversion.run(whole, model).items():
            if name not in state or state[name].shape != tensor.shape:
                have = tuple(state[name].shape) if name in state else "no such tensor"
                raise ManifestError(
                    f"{conversion.sources[0][0]}: makes {name} {tuple(tensor.shape)}, but"
                    f" config.json says {have}"
                )
            placed[name] = sources[0]
    return placed


def find_tied_placements(
    model: PreTrainedModel, placed: Mapping[str, Placement], missing: set[str]
) -> dict[str, Placement]:
    """The placements of tensors that are not stored because they are tied to one that is."""
    tied: dict[str, Placement] = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        names = {target, source}
        stored = [placed[name] for name in names if name in placed]
        stored += [tied[name] for name in names if name in tied]
        tied.update({name: stored[0] for name in names & missing if stored})
    return tied


def fill_parameters(
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    plan: list[Conversion],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Convert tensors, as soon as all that one is made of have come, and put them in the model."""
    keep = tuple(model._get_dtype_plan(dtype))
    owner = {name: at for at, part in enumerate(plan) for name, _ in part.sources}
    waiting: dict[int, dict[str, torch.Tensor]] = {}
    for source, read in tensors:
        at = owner[source]
        waiting.setdefault(at, {})[source] = read.to(device)
        if len(waiting[at]) < len(plan[at].sources):
            continue
        for name, tensor in plan[at].run(waiting.pop(at), model).items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            wanted = getattr(module, leaf).dtype
            if any(part in name for part in keep):
                wanted = torch.float32
            set_tensor(module, leaf, tensor.to(wanted))


def zero_tensors(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Zero what only rank 0 adds: a bias inside a region that is summed over the ranks."""
    for name in names:
        model.get_parameter_or_buffer(name).zero_()


def set_tensor(owner: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer, whatever shape it had, marked as not to be initialised."""
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = tensor = nn.Parameter(tensor, requires_grad=False)
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def tie_and_initialize(model: PreTrainedModel, missing: set[str], device: torch.device) -> None:
    """Tie what is tied, and make what no checkpoint stores: the buffers a model computes.

    Raises ManifestError for a weight that is neither stored, tied nor computed: transformers would
    make it up at random.
    """
    left = set(missing)
    model.tie_weights(missing_keys=left, recompute_mapping=False)
    left = {name for name in left if _is_meta(model, name)}
    computed = model._keys_to_ignore_on_load_missing or []
    for name in sorted(left):
        if not any(re.search(pattern, name) for pattern in computed):
            raise ManifestError(f"{name}: {type(model).__name__} needs it, and no shard holds it")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    made = sum(tensor.nbytes for _, tensor in tensors if tensor.device.type == "meta")
    if made > MAX_COMPUTED:
        raise ManifestError(
            f"config.json: {type(model).__name__} would compute tables of {made} bytes for itself,"
            f" more than the {MAX_COMPUTED} allowed"
        )
    for name, tensor in tensors:
        if tensor.device.type == "meta":
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            made = torch.empty_like(tensor, device=device)
            if leaf in owner._buffers:
                owner._buffers[leaf] = made
            else:
                owner._parameters[leaf] = nn.Parameter(made, requires_grad=False)
        else:
            tensor._is_hf_initialized = True
    model.initialize_weights()


def _is_meta(model: PreTrainedModel, name: str) -> bool:
    return bool(model.get_parameter_or_buffer(name).device.type == "meta")
