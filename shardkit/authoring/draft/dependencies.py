"""Which parts of which tensors meet, found by derivatives of the model itself.

A layer may end a parallel region if each of its input features depends on some output features of
the layers before it only: on one head's, on one feature's of a feed-forward layer.  Its weight's
gradient for one input feature is, up to a factor, that feature's activation; which elements of
other tensors that depends on is a second derivative, exact zeros where it depends on none.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardkit.authoring.draft.tensor_origins import Small, Stored

FEW = 3
MOST = 64  # features that are probed of a wide layer
NARROW = 64  # of an embedding that may be one of heads, not of the model's width


@dataclass(frozen=True)
class Meeting:
    """How one tensor meets the input features of a layer.

    `by_dim[d]` is a boolean matrix `[features probed, length of dimension d]`.
    """

    tensor: Stored
    by_dim: tuple[Any, ...]

    def partial(self, dim: int) -> bool:
        """Whether along `dim` some input features meet some indices only."""
        found = self.by_dim[dim]
        return bool(found.any()) and not bool(found.all())


@dataclass(frozen=True)
class Last:
    """A layer that may end a region: its tensors on disk, and the dimension of its input features.

    `norms` are modules whose scale is taken as a given factor, as of a norm whose mean is summed
    over the ranks; `sums` modules whose output is taken as given, as a row-parallel layer's is.
    """

    tensors: tuple[Stored, ...]
    dim: int
    norms: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What is known of one layer that might be row-parallel.

    `summed` are tensors that only add to what its module puts out: biases kept beside its weight.
    `ran` is whether the model has run it.
    """

    last: Last
    features: tuple[int, ...]
    meetings: tuple[Meeting, ...]
    summed: tuple[Stored, ...] = ()
    ran: bool = True


def probe(small: Small, last: Last) -> Probe:
    """Find what meets the input features of a layer; no meetings where nothing meets it in part."""
    near, length = _near(small, last.tensors[0]), last.tensors[0].shape[last.dim]
    wanted = tuple(range(0, length, -(-length // MOST)))
    with _outputs(small, last) as first:
        gradients = _feature_gradients(small, first, last, wanted)
        if gradients is None:
            return Probe(last, (), (), ran=False)
        value, features = gradients
        few = sorted({0, len(features) // FEW, len(features) - 1})
        if not any(m.partial(d) for m in _meetings(small, [features[i] for i in few], near)
                   for d in out_dims(m.tensor)):  # fmt: skip
            return Probe(last, (), ())
        found = _meetings(small, features, near)
        return Probe(last, wanted, tuple(found), _added(small, value, last.tensors, found))


def _near(small: Small, last: Stored) -> list[Stored]:
    """The tensors of the layer's own block, and those outside of any block but wide embeddings."""
    own = [t for t in small.tensors if t.layer == last.layer]
    other = [t for t in small.tensors if not t.layer and last.layer]
    return own + [t for t in other if t.kind != "embedding" or t.shape[-1] < NARROW]


def out_dims(tensor: Stored) -> tuple[int, ...]:
    """The dimensions that may be output features, the likeliest first; none of a plain norm."""
    many = len(tensor.shape)
    if tensor.kind == "norm" and many == 1:
        return ()
    if tensor.kind == "conv":
        return (0,)
    if tensor.kind == "other" and many > 1:
        return tuple(dict.fromkeys((many - 2, many - 1, 0)))
    return (tensor.out_dim,)


@contextmanager
def _outputs(small: Small, last: Last) -> Iterator[Any]:
    """Run the model; what the module puts out at its first call, with its history."""
    import torch

    from shardkit.runtime.model_runner import no_cache_options
    from shardkit.verification.dummy_inputs import make_inputs

    calls: list[Any] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        calls.append(output[0] if isinstance(output, tuple) else output)

    hooks = [(last.tensors[0].owner, keep), *((name, _as_factor) for name in last.norms),
             *((name, _as_given) for name in last.sums)]  # fmt: skip
    handles = [small.model.get_submodule(name).register_forward_hook(h) for name, h in hooks]
    try:
        with torch.enable_grad():
            small.model.requires_grad_(True)
            small.model(**make_inputs(small.model), **no_cache_options(small.model))
        yield calls[0] if calls else None
    finally:
        for handle in handles:
            handle.remove()


def _as_factor(module: Any, args: Any, output: Any) -> Any:
    """A norm's output with the same value, whose derivatives take its scale as a given number."""
    scale = (output / args[0].where(args[0] != 0, 1)).detach()
    weight = module.weight
    return args[0] * scale + args[0].detach() * (weight - weight.detach())


def _as_given(_module: Any, _args: Any, output: Any) -> Any:
    return output.detach()


def _feature_gradients(small: Small, output: Any, last: Last, wanted: Sequence[int]) -> Any:
    """The output as one number, and of each input feature a number that only it determines."""
    import torch

    if output is None or not torch.is_tensor(output) or output.grad_fn is None:
        return None
    path = last.tensors[0].owner
    owner = small.model.get_submodule(path)
    named = [(f"{path}.{n}", p) for n, p in owner.named_parameters(recurse=False)]
    generator = torch.Generator().manual_seed(1)
    value = (output * torch.rand(output.shape, generator=generator)).sum()
    made = torch.autograd.grad(value, [p for _, p in named], create_graph=True, allow_unused=True)
    flat = {n: (g.flatten(), small.offsets[n]) for (n, _), g in zip(named, made, strict=True)
            if g is not None and n in small.offsets}  # fmt: skip
    features: list[Any] = []
    for index in wanted:
        parts = [t.positions.select(last.dim, index).flatten() for t in last.tensors]
        features.append(_weighted(flat, torch.cat(parts), generator))
    return None if any(f is None for f in features) else (value, features)


def _weighted(flat: dict[str, Any], positions: Any, generator: Any) -> Any:
    """The gradients at these positions, each times a random number, summed."""
    import torch

    for gradient, start in flat.values():
        if start <= int(positions.min()) and int(positions.max()) < start + len(gradient):
            own = gradient[positions - start]
            return (own * torch.rand(own.shape, generator=generator)).sum()
    return None


def _meetings(small: Small, features: Sequence[Any], near: Sequence[Stored]) -> list[Meeting]:
    """Which indices of the near tensors each feature depends on."""
    import torch

    owners = {t.owner for t in near}
    names = [n for n in small.offsets if n.rpartition(".")[0] in owners]
    parameters = [small.model.get_parameter(name) for name in names]
    total = sum(p.numel() for p in small.model.parameters())
    rows = torch.zeros((len(features), total), dtype=torch.bool)
    for row, feature in zip(rows, features, strict=True):
        if feature.grad_fn is None:
            continue
        made = torch.autograd.grad(feature, parameters, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, made, strict=True):
            if gradient is not None:
                start = small.offsets[name]
                row[start : start + gradient.numel()] = gradient.flatten() != 0
    return [Meeting(t, _by_dim(rows, t)) for t in near]


def _by_dim(rows: Any, tensor: Stored) -> tuple[Any, ...]:
    own = rows[:, tensor.positions]
    dims = range(1, own.ndim)
    return tuple(
        own.any(dim=tuple(o for o in dims if o != d)) if own.ndim > 2 else own for d in dims
    )


def _added(
    small: Small, value: Any, lasts: Sequence[Stored], found: Sequence[Meeting]
) -> tuple[Stored, ...]:
    """Tensors of the same module that add to its output and meet none of its input features."""
    import torch

    names = {t.name for t in lasts}
    beside = [
        m.tensor for m in found
        if m.tensor.owner == lasts[0].owner and m.tensor.name not in names
        and m.tensor.kind == "other" and not any(bool(d.any()) for d in m.by_dim)
    ]  # fmt: skip
    if not beside:
        return ()
    parameters = dict(small.model.get_submodule(lasts[0].owner).named_parameters(recurse=False))
    made = torch.autograd.grad(value, list(parameters.values()), retain_graph=True,
                               allow_unused=True)  # fmt: skip
    used = {f"{lasts[0].owner}.{n}" for n, g in zip(parameters, made, strict=True) if g is not None}
    starts = {small.offsets[n] for n in used if n in small.offsets}
    return tuple(t for t in beside if int(t.positions.min()) in starts)
