"""Surveys a tiny model for everything that might be sharded, before any of it is proven."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from shardkit.authoring.draft.dependencies import (
    Dependency,
    LayerDependencies,
    RowCandidate,
    find_dependencies,
)
from shardkit.authoring.draft.regions import ParallelRegion, find_region
from shardkit.authoring.draft.tensor_origins import (
    LoadedModel,
    StoredTensor,
    name_pattern,
)
from shardkit.authoring.draft.unit_counts import UnitCount, list_unit_counts

StatusCallback = Callable[[str], object]  # shows what is being done
MAX_ROUTER_OUTPUTS = 16  # a router's or a classifier's, which is not a large layer
MIN_LARGE_ELEMENTS = 2048  # of a bare parameter


@dataclass
class Survey:
    """What might be sharded.

    Attributes:
        vocab: The patterns of the vocabulary's modules.
        regions: The regions found.
        rejected: Patterns of layers that end no region, and why.
    """

    vocab: tuple[str, ...]
    regions: list[ParallelRegion] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def ruled_patterns(self) -> set[str]:
        """The patterns that have a rule."""
        return {*self.vocab, *(p for region in self.regions for p in region.patterns)}


def survey_model(loaded: LoadedModel, report: StatusCallback) -> Survey:
    """Look for a region at every layer, twice.

    The second time, the outputs of the row-parallel layers next to a layer count as constants: they
    are summed over the ranks, so that every rank has all of them.
    """
    survey = Survey(list_vocab_patterns(loaded))
    for second_pass in (False, True):
        for tensors in list_row_tensors(loaded):
            pattern = tensors[0].pattern
            if pattern in survey.ruled_patterns:
                continue
            reduced = _reduced_siblings(tensors[0], survey) if second_pass else ()
            if second_pass and not reduced:
                continue
            report(f"looking at {pattern}")
            region = _find_layer_region(loaded, tensors, reduced, survey)
            if region is not None and _is_consistent(region, survey.regions):
                survey.regions.append(region)
                survey.rejected.pop(pattern, None)
    return survey


def list_vocab_patterns(loaded: LoadedModel) -> tuple[str, ...]:
    """The patterns of the input embeddings, the output layer, and of what is tied to them."""
    model = loaded.model
    embeddings, head = _vocab_modules(model)
    modules = [module for module in (embeddings, head) if module is not None]
    parameters = {id(p) for module in modules for p in module.parameters(recurse=False)}
    if embeddings is None or not parameters:
        return ()
    named = list(model.named_parameters(remove_duplicate=False))
    names = [name for name, parameter in named if id(parameter) in parameters]
    starts = {loaded.offsets[name] for name in names if name in loaded.offsets}
    stored = [t for t in loaded.tensors if int(t.positions.min()) in starts]
    owners = {tensor.owner for tensor in stored}
    tied = [name for name in names if name.rpartition(".")[0] not in owners]
    patterns = [tensor.pattern for tensor in stored] + [name_pattern(name) for name in tied]
    return tuple(dict.fromkeys(patterns))


def _vocab_modules(model: Any) -> tuple[Any, Any]:
    """The input embeddings and the output layer; None for what a model lacks."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # how transformers says so for vision models
        return None, None


def list_row_tensors(loaded: LoadedModel) -> Iterator[list[StoredTensor]]:
    """The tensors of each layer that may be row-parallel, for one layer of each pattern."""
    patterns: set[str] = set()
    for tensor in loaded.tensors:
        if tensor.row_dims and tensor.pattern not in patterns:
            patterns.add(tensor.pattern)
            key = tensor.pattern, tensor.owner, tensor.shape
            yield [t for t in loaded.tensors if (t.pattern, t.owner, t.shape) == key]


def list_replicated(
    loaded: LoadedModel, ruled: set[str], reasons: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """What stays on every rank.

    Args:
        loaded: The model.
        ruled: The patterns that have a rule.
        reasons: Why some of the others have none.

    Returns:
        The patterns of small modules, and those of large ones, each with its reason.
    """
    by_name = {tensor.name: tensor for tensor in loaded.tensors}
    small: dict[str, None] = {}
    large: dict[str, str] = {}
    for name in loaded.shapes:
        tensor, pattern = by_name.get(name), name_pattern(name)
        if pattern in ruled:
            continue
        if tensor is not None and _is_large(tensor):
            large[pattern] = reasons.get(pattern, "no layer after it uses its output in parts")
        elif pattern not in large:
            small[pattern] = None
    return [pattern for pattern in small if pattern not in large], large


def _find_layer_region(
    loaded: LoadedModel, tensors: Sequence[StoredTensor], reduced: Sequence[str], survey: Survey
) -> ParallelRegion | None:
    """The region that a layer ends; if possible, one with norms over a width that is divided."""
    aliases = loaded.model.config.attribute_map
    counts = list_unit_counts(loaded.config, aliases, tensors[0].name)
    norms = _sibling_norms(loaded, tensors[0])
    for dim in tensors[0].row_dims:
        candidate = RowCandidate(tuple(tensors), dim, (), tuple(reduced))
        plain = _find_candidate_region(loaded, candidate, counts, survey)
        if norms:
            candidate = RowCandidate(tuple(tensors), dim, norms, tuple(reduced))
            wide = _find_candidate_region(loaded, candidate, counts, survey)
            if wide is not None and any(rule.style == "norm" for rule in wide.columns):
                return wide
        if plain is not None:
            return plain
    return None


def _find_candidate_region(
    loaded: LoadedModel, candidate: RowCandidate, counts: Sequence[UnitCount], survey: Survey
) -> ParallelRegion | None:
    """The region that one candidate ends; if there is none, the survey keeps the reason."""
    pattern = candidate.pattern
    try:
        layer = find_dependencies(loaded, candidate)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        fault = str(error).split("\n")[0][:120]
        survey.rejected.setdefault(pattern, f"its derivatives could not be computed: {fault}")
        return None
    region = find_region(layer, counts) if layer.dependencies else None
    if region is None and (reason := _explain_rejection(layer)):
        survey.rejected.setdefault(pattern, reason)
    return region


def _explain_rejection(layer: LayerDependencies) -> str:
    """Why a layer ends no region; empty if its features all depend on everything."""
    if not layer.executed:
        return "the model did not run it"
    if any(_is_divisible(dependency) for dependency in layer.dependencies):
        return "its input has parts, but no axis or no config field was found that describes them"
    return ""


def _is_divisible(dependency: Dependency) -> bool:
    tensor = dependency.tensor
    return (
        tensor.kind in ("linear", "conv1d", "conv", "other")
        and len(tensor.shape) > 1
        and dependency.is_partial(tensor.output_dim)
    )


def _reduced_siblings(last: StoredTensor, survey: Survey) -> tuple[str, ...]:
    """The row-parallel layers next to a layer, whose output is summed over the ranks."""
    parent = f"{last.owner.rpartition('.')[0]}."
    rows = {region.row.owner for region in survey.regions}
    return tuple(sorted(owner for owner in rows if owner.startswith(parent)))


def _sibling_norms(loaded: LoadedModel, last: StoredTensor) -> tuple[str, ...]:
    """The norms next to a layer that have one weight for each feature, and no bias."""
    parent = f"{last.owner.rpartition('.')[0]}."
    norms = []
    for tensor in loaded.tensors:
        is_sibling = tensor.kind == "norm" and tensor.owner.startswith(parent)
        bias = getattr(loaded.model.get_submodule(tensor.owner), "bias", None)
        if is_sibling and len(tensor.shape) == 1 and bias is None:
            norms.append(tensor.owner)
    return tuple(dict.fromkeys(norms))


def _is_consistent(region: ParallelRegion, others: Sequence[ParallelRegion]) -> bool:
    """Whether tensors that it shares with other regions have the same style and axis in each."""
    rules = {rule.pattern: rule for other in others for rule in other.rules}
    return all(
        (rules[rule.pattern].style, rules[rule.pattern].axis) == (rule.style, rule.axis)
        for rule in region.rules
        if rule.pattern in rules
    )


def _is_large(tensor: StoredTensor) -> bool:
    if tensor.kind in ("embedding", "norm") or len(tensor.shape) < 2 or tensor.shape[0] == 1:
        return False
    if tensor.kind in ("conv", "other"):
        return prod(tensor.shape) >= MIN_LARGE_ELEMENTS
    return min(tensor.shape) > MAX_ROUTER_OUTPUTS
