"""Which slices of which tensors depend on each other, found from the model's own derivatives.

A layer can end a parallel region if each of its input features depends on only some output features
of the layers before it: those of one head, or one feature of a feed-forward layer. The gradient of
the layer's weight for one input feature is, up to a factor, that feature's activation. Its own
gradient, a second derivative of the output, is exactly zero for every element of every tensor that
the feature does not depend on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardkit.authoring.draft.tensor_origins import LoadedModel, StoredTensor

PRESCREEN = 3  # features that are tried before all are
MAX_FEATURES = 64  # features that are tried of a wide layer
MAX_HEAD_EMBEDDING = 64  # an embedding narrower than this may be one of heads, not of tokens


@dataclass(frozen=True)
class Dependency:
    """How the input features of a layer depend on one tensor.

    Attributes:
        tensor: The tensor.
        by_dim: For each dimension of the tensor a boolean matrix of shape `[features, length]`:
            whether a feature depends on any element at an index of that dimension.
    """

    tensor: StoredTensor
    by_dim: tuple[Any, ...]

    def is_partial(self, dim: int) -> bool:
        """Whether some of the features depend on only some indices of dimension `dim`."""
        matrix = self.by_dim[dim]
        return bool(matrix.any()) and not bool(matrix.all())


@dataclass(frozen=True)
class RowCandidate:
    """A layer that may be row-parallel and so end a region.

    Attributes:
        tensors: Its tensors on disk; several if experts are stored one by one.
        dim: The dimension of their input features.
        norms: Modules whose scale counts as a constant factor, as it is for a norm whose mean is
            reduced over the ranks.
        reduced: Modules whose output counts as a constant, as it is for a row-parallel layer.
    """

    tensors: tuple[StoredTensor, ...]
    dim: int
    norms: tuple[str, ...] = ()
    reduced: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """The recipe pattern of its tensors."""
        return self.tensors[0].pattern

    @property
    def owner(self) -> str:
        """The module that holds its tensors."""
        return self.tensors[0].owner

    @property
    def length(self) -> int:
        """The number of its input features."""
        return self.tensors[0].shape[self.dim]


@dataclass(frozen=True)
class LayerDependencies:
    """What one candidate's input features depend on.

    Attributes:
        candidate: The layer.
        features: The indices of the input features that were tried.
        dependencies: What they depend on; empty if they depend on nothing in part.
        added: Tensors that only add to the module's output: biases stored beside its weight.
        executed: Whether the model ran the module.
    """

    candidate: RowCandidate
    features: tuple[int, ...]
    dependencies: tuple[Dependency, ...]
    added: tuple[StoredTensor, ...] = ()
    executed: bool = True


def find_dependencies(loaded: LoadedModel, candidate: RowCandidate) -> LayerDependencies:
    """Find which slices of the tensors near a layer its input features depend on."""
    near = _near_tensors(loaded, candidate.tensors[0])
    stride = -(-candidate.length // MAX_FEATURES)
    indices = tuple(range(0, candidate.length, stride))
    output = _first_output_of(loaded, candidate)
    derivatives = _feature_activations(loaded, output, candidate, indices)
    if derivatives is None:
        return LayerDependencies(candidate, (), (), executed=False)
    total, activations = derivatives
    sample = sorted({0, len(activations) // PRESCREEN, len(activations) - 1})
    few = _measure(loaded, [activations[index] for index in sample], near)
    if not any(d.is_partial(dim) for d in few for dim in d.tensor.output_dims):
        return LayerDependencies(candidate, (), ())
    dependencies = _measure(loaded, activations, near)
    added = _added_tensors(loaded, total, candidate, dependencies)
    return LayerDependencies(candidate, indices, tuple(dependencies), added)


def _near_tensors(loaded: LoadedModel, last: StoredTensor) -> list[StoredTensor]:
    """The tensors of a layer's block, and those outside of all blocks except wide embeddings."""
    same_block = [t for t in loaded.tensors if t.layer == last.layer]
    outside = [t for t in loaded.tensors if not t.layer and last.layer]
    return same_block + [
        tensor
        for tensor in outside
        if tensor.kind != "embedding" or tensor.shape[-1] < MAX_HEAD_EMBEDDING
    ]


def _first_output_of(loaded: LoadedModel, candidate: RowCandidate) -> Any:
    """The candidate's output at its first call, with its history; None if it was not called."""
    import torch

    from shardkit.authoring.hooks import Hook, first_output, run_with_hooks

    outputs: list[Any] = []

    def keep_output(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(first_output(output))

    hooks: list[tuple[str, Hook]] = [(candidate.owner, keep_output)]
    hooks += [(name, _scale_as_constant) for name in candidate.norms]
    hooks += [(name, _output_as_constant) for name in candidate.reduced]
    with torch.enable_grad():
        loaded.model.requires_grad_(True)
        run_with_hooks(loaded.model, hooks)
    return outputs[0] if outputs else None


def _scale_as_constant(module: Any, args: Any, output: Any) -> Any:
    """A norm's output with the same value, but with derivatives as if its scale were a constant."""
    scale = (output / args[0].where(args[0] != 0, 1)).detach()
    weight = module.weight
    return args[0] * scale + args[0].detach() * (weight - weight.detach())


def _output_as_constant(_module: Any, _args: Any, output: Any) -> Any:
    return output.detach()


def _feature_activations(
    loaded: LoadedModel, output: Any, candidate: RowCandidate, indices: Sequence[int]
) -> tuple[Any, list[Any]] | None:
    """The output as one number, and for each input feature a number that only it determines."""
    import torch

    if output is None or not torch.is_tensor(output) or output.grad_fn is None:
        return None
    generator = torch.Generator().manual_seed(1)
    total = (output * torch.rand(output.shape, generator=generator)).sum()
    flat = {
        name: (gradient.flatten(), loaded.offsets[name])
        for name, gradient in _own_gradients(loaded, candidate.owner, total, True).items()
        if name in loaded.offsets
    }
    activations: list[Any] = []
    for index in indices:
        positions = [t.positions.select(candidate.dim, index).flatten() for t in candidate.tensors]
        activations.append(_weighted_sum(flat, torch.cat(positions), generator))
    return None if any(value is None for value in activations) else (total, activations)


def _own_gradients(
    loaded: LoadedModel, owner: str, total: Any, create_graph: bool
) -> dict[str, Any]:
    """The gradients of a number for a module's own parameters, of those that it depends on."""
    import torch

    module = loaded.model.get_submodule(owner)
    named = [(f"{owner}.{name}", p) for name, p in module.named_parameters(recurse=False)]
    gradients = torch.autograd.grad(
        total, [p for _, p in named], retain_graph=True, create_graph=create_graph,
        allow_unused=True,
    )  # fmt: skip
    pairs = zip(named, gradients, strict=True)
    return {name: gradient for (name, _), gradient in pairs if gradient is not None}


def _weighted_sum(flat: Mapping[str, Any], positions: Any, generator: Any) -> Any:
    """The sum of the gradients at these positions, each times a random number."""
    import torch

    for gradient, start in flat.values():
        if start <= int(positions.min()) and int(positions.max()) < start + len(gradient):
            values = gradient[positions - start]
            return (values * torch.rand(values.shape, generator=generator)).sum()
    return None


def _measure(
    loaded: LoadedModel, activations: Sequence[Any], near: Sequence[StoredTensor]
) -> list[Dependency]:
    """Which indices of the near tensors each activation depends on."""
    import torch

    owners = {tensor.owner for tensor in near}
    names = [name for name in loaded.offsets if name.rpartition(".")[0] in owners]
    parameters = [loaded.model.get_parameter(name) for name in names]
    total = sum(p.numel() for p in loaded.model.parameters())
    rows = torch.zeros((len(activations), total), dtype=torch.bool)
    for row, activation in zip(rows, activations, strict=True):
        if activation.grad_fn is None:
            continue
        gradients = torch.autograd.grad(
            activation, parameters, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                start = loaded.offsets[name]
                row[start : start + gradient.numel()] = gradient.flatten() != 0
    return [Dependency(tensor, _reduce_by_dim(rows, tensor)) for tensor in near]


def _reduce_by_dim(rows: Any, tensor: StoredTensor) -> tuple[Any, ...]:
    """For each dimension of a tensor, whether a row is set anywhere at each of its indices."""
    elements = rows[:, tensor.positions]
    dims = range(1, elements.ndim)
    if len(dims) <= 1:
        return (elements,) * len(dims)
    return tuple(elements.any(dim=tuple(other for other in dims if other != dim)) for dim in dims)


def _added_tensors(
    loaded: LoadedModel,
    total: Any,
    candidate: RowCandidate,
    dependencies: Sequence[Dependency],
) -> tuple[StoredTensor, ...]:
    """Tensors of the same module that add to its output and that no input feature depends on."""
    names = {tensor.name for tensor in candidate.tensors}
    unrelated = [
        dependency.tensor
        for dependency in dependencies
        if dependency.tensor.owner == candidate.owner
        and dependency.tensor.name not in names
        and dependency.tensor.kind == "other"
        and not any(bool(matrix.any()) for matrix in dependency.by_dim)
    ]
    if not unrelated:
        return ()
    gradients = _own_gradients(loaded, candidate.owner, total, False)
    starts = {loaded.offsets[name] for name in gradients if name in loaded.offsets}
    return tuple(tensor for tensor in unrelated if int(tensor.positions.min()) in starts)
