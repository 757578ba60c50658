"""Fills a model on the meta device from tensors of a shard, and makes what no shard stores."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from shardkit.errors import ManifestError
from shardkit.planning.placement import Placement
from shardkit.runtime.conversion import Conversion
from shardkit.runtime.packed import PackedTensor, compute_tensor
from shardkit.runtime.packing import RecordLayout

MAX_COMPUTED = 4 << 30  # bytes that a model computes for itself: tables of positions, masks


def placements_by_parameter(
    model: PreTrainedModel, placements: Mapping[str, Placement], conversions: list[Conversion]
) -> dict[str, Placement]:
    """Each of the model's tensors that the shards make, and the placement it is made of.

    Raises as `match_conversions` does.
    """
    matched = match_conversions(model, placements, conversions)
    return {name: placements[conversion.sources[0][0]] for name, conversion in matched.items()}


def match_conversions(
    model: PreTrainedModel, placements: Mapping[str, Placement], conversions: list[Conversion]
) -> dict[str, Conversion]:
    """Each of the model's tensors that the shards make, and the conversion that makes it.

    Converts tensors of the whole shapes, without data, and raises ManifestError if one has not
    the shape that the model has: a config that is not the weights'.
    """
    state, by_parameter = model.state_dict(), {}
    for conversion in conversions:
        sources = [placements[name] for name, _ in conversion.sources]
        whole = {p.spec.name: torch.empty(p.spec.shape, device="meta") for p in sources}
        for name, tensor in conversion.run(whole, model).items():
            if name not in state or state[name].shape != tensor.shape:
                have = tuple(state[name].shape) if name in state else "no such tensor"
                raise ManifestError(
                    f"{conversion.sources[0][0]}: makes {name} {tuple(tensor.shape)}, but"
                    f" config.json says {have}"
                )
            by_parameter[name] = conversion
    return by_parameter


def find_tied_placements(
    model: PreTrainedModel, by_parameter: Mapping[str, Placement], missing: set[str]
) -> dict[str, Placement]:
    """The placements of tensors that are not stored because they are tied to one that is."""
    tied: dict[str, Placement] = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        names = {target, source}
        stored = [by_parameter[name] for name in names if name in by_parameter]
        stored += [tied[name] for name in names if name in tied]
        tied.update({name: stored[0] for name in names & missing if stored})
    return tied


def fill_parameters(
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    conversions: list[Conversion],
    dtype: torch.dtype,
    count_lengths: Callable[[str], Sequence[int]],
    is_packed: bool,
) -> None:
    """Convert each of the model's tensors once all that it is made of are read, and set it.

    Args:
        model: The model.
        tensors: Names on disk, and tensors; quantized weights are packed ones.
        conversions: What makes the model's tensors of them.
        dtype: The model's.
        count_lengths: How much of each section of a tensor on disk this rank has.
        is_packed: Whether packed tensors stay so. They are converted before they are computed.
    """
    keep = tuple(model._get_dtype_plan(dtype))
    by_source = {name: at for at, c in enumerate(conversions) for name, _ in c.sources}
    incomplete: dict[int, dict[str, torch.Tensor]] = {}
    for source, tensor in tensors:
        at = by_source[source]
        conversion, parts = conversions[at], incomplete.setdefault(at, {})
        parts[source] = tensor
        if len(parts) < len(conversion.sources):
            continue
        with torch.inference_mode(False), RecordLayout():  # type: ignore[no-untyped-call]
            converted = conversion.run(incomplete.pop(at), model, count_lengths)
        for name, value in converted.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            keeps_float32 = any(part in name for part in keep)
            target_dtype = torch.float32 if keeps_float32 else getattr(module, leaf).dtype
            typed = value.to(target_dtype)
            set_tensor(module, leaf, _own_memory(typed if is_packed else compute_tensor(typed)))


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, without the rest of a larger one that it is a view of and would keep alive."""
    if isinstance(tensor, PackedTensor):
        return tensor
    is_whole = tensor.untyped_storage().nbytes() <= tensor.nbytes
    return tensor if is_whole else tensor.clone()


def zero_tensors(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Zero what only rank 0 adds: a bias inside a region that is summed over the ranks."""
    for name in names:
        model.get_parameter_or_buffer(name).zero_()


def set_tensor(owner: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer, whatever shape it had, marked as not to be initialized."""
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
    untied = set(missing)
    model.tie_weights(missing_keys=untied, recompute_mapping=False)
    untied = {name for name in untied if _is_empty(model.get_parameter_or_buffer(name))}
    computed = model._keys_to_ignore_on_load_missing or []
    for name in sorted(untied):
        if not any(re.search(pattern, name) for pattern in computed):
            raise ManifestError(f"{name}: {type(model).__name__} needs it, and no shard holds it")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    nbytes = sum(tensor.nbytes for _, tensor in tensors if _is_empty(tensor))
    if nbytes > MAX_COMPUTED:
        raise ManifestError(
            f"config.json: {type(model).__name__} would compute tables of {nbytes} bytes for"
            f" itself, more than the {MAX_COMPUTED} allowed"
        )
    for name, tensor in tensors:
        if _is_empty(tensor):
            _allocate(model, name, tensor, device)
        else:
            tensor._is_hf_initialized = True
    model.initialize_weights()


def _allocate(
    model: PreTrainedModel, name: str, tensor: torch.Tensor, device: torch.device
) -> None:
    """Give a tensor on the meta device memory, for the model to initialize."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    memory = torch.empty_like(tensor, device=device)
    if leaf in owner._buffers:
        owner._buffers[leaf] = memory
    else:
        owner._parameters[leaf] = nn.Parameter(memory, requires_grad=False)


def _is_empty(tensor: torch.Tensor) -> bool:
    """Whether nothing was set: what is set is marked, and may be to come on the meta device."""
    return tensor.device.type == "meta" and not getattr(tensor, "_is_hf_initialized", False)
