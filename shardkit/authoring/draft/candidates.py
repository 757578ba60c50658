"""Everything of a small model that might be sharded, before any of it is proven."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from shardkit.authoring.draft.dependencies import Last, Meeting, probe
from shardkit.authoring.draft.regions import Count, Region, counts_of, find_region
from shardkit.authoring.draft.tensor_origins import LEAF, NUMBER, Small, Stored

FEW_OUTPUTS = 16  # of a router or a classifier, which is no large layer
FEW_NUMBERS = 2048  # of a bare parameter


@dataclass
class Survey:
    """The vocabulary's patterns, the regions found, and what was looked at in vain, and why."""

    vocab: tuple[str, ...]
    regions: list[Region] = field(default_factory=list)
    in_vain: dict[str, str] = field(default_factory=dict)

    @property
    def taken(self) -> set[str]:
        """The patterns that have a rule."""
        return {*self.vocab, *(p for region in self.regions for p in region.patterns)}


def survey(small: Small, say: Callable[[str], object]) -> Survey:
    """Look at every layer: first as it is, then with the sums found beside it taken as given."""
    found = Survey(vocabulary(small))
    for again in (False, True):
        for lasts in candidates(small):
            if lasts[0].pattern in found.taken:
                continue
            sums = _sums(small, lasts[0], found) if again else ()
            if again and not sums:
                continue
            say(f"looking at {lasts[0].pattern}")
            region = _look(small, lasts, sums, found)
            if region is not None and _fits(region, found.regions):
                found.regions.append(region)
                found.in_vain.pop(lasts[0].pattern, None)
    return found


def vocabulary(small: Small) -> tuple[str, ...]:
    """The patterns of the input embeddings and the output layer, and of what is tied to them."""
    ends = _ends(small.model)
    own = {id(p) for end in ends if end is not None for p in end.parameters(recurse=False)}
    if ends[0] is None or not own:
        return ()
    named = list(small.model.named_parameters(remove_duplicate=False))
    places = {small.offsets[n] for n, p in named if id(p) in own and n in small.offsets}
    stored = [t for t in small.tensors if int(t.positions.min()) in places]
    patterns = [t.pattern for t in stored]
    kept = {t.owner for t in stored}
    tied = [n for n, p in named if id(p) in own and n.rpartition(".")[0] not in kept]
    patterns += [NUMBER.sub("*", LEAF.sub("", name)) for name in tied]
    return tuple(dict.fromkeys(patterns))


def _ends(model: Any) -> tuple[Any, Any]:
    """The input embeddings and the output layer; none for a model that has no such thing."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # how transformers says so for models that only see
        return None, None


def candidates(small: Small) -> Iterator[list[Stored]]:
    """The tensors of each layer that may end a region, one layer of each pattern."""
    seen: set[str] = set()
    for tensor in small.tensors:
        if tensor.last_dims and tensor.pattern not in seen:
            seen.add(tensor.pattern)
            yield [
                t for t in small.tensors
                if (t.pattern, t.owner, t.shape) == (tensor.pattern, tensor.owner, tensor.shape)
            ]  # fmt: skip


def leftovers(
    small: Small, taken: set[str], in_vain: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """What stays on every rank: the patterns of small modules, and of large ones with a reason."""
    known = {t.name: t for t in small.tensors}
    little: dict[str, None] = {}
    large: dict[str, str] = {}
    for name in small.shapes:
        tensor = known.get(name)
        pattern = NUMBER.sub("*", LEAF.sub("", name))
        if pattern in taken:
            continue
        if tensor is not None and _is_large(tensor):
            large[pattern] = in_vain.get(pattern, "no layer after it takes its parts one by one")
        elif pattern not in large:
            little[pattern] = None
    return [p for p in little if p not in large], large


def _look(
    small: Small, lasts: Sequence[Stored], sums: Sequence[str], found: Survey
) -> Region | None:
    """The region that a layer ends, over whole-width norms where it has those."""
    counts = counts_of(small.config, small.model.config.attribute_map, lasts[0].name)
    plain: Region | None = None
    for dim in lasts[0].last_dims:
        for norms in ((), _norms(small, lasts[0])):
            if norms or plain is None:
                region = _region(small, Last(tuple(lasts), dim, norms, tuple(sums)), counts, found)
                if region is not None and any(axis.style == "norm" for axis in region.columns):
                    return region
                plain = plain or (region if not norms else None)
        if plain is not None:
            return plain
    return None


def _region(small: Small, last: Last, counts: Sequence[Count], found: Survey) -> Region | None:
    pattern = last.tensors[0].pattern
    try:
        seen = probe(small, last)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        told = str(error).split("\n")[0][:120]
        found.in_vain.setdefault(pattern, f"it could not be looked into: {told}")
        return None
    region = find_region(seen, counts) if seen.meetings else None
    if not seen.ran:
        found.in_vain.setdefault(pattern, "nothing ran it, so nothing is known of it")
    if region is None and _takes_parts(seen.meetings):
        found.in_vain.setdefault(
            pattern,
            "what it takes has parts, but no notation for how they lie, or no config field that"
            " counts them, was found",
        )
    return region


def _takes_parts(meetings: Sequence[Meeting]) -> bool:
    return any(
        m.tensor.kind in ("linear", "conv1d", "conv", "other")
        and len(m.tensor.shape) > 1
        and m.partial(m.tensor.out_dim)
        for m in meetings
    )


def _sums(small: Small, last: Stored, found: Survey) -> tuple[str, ...]:
    """The layers beside this one that end regions: what they put out is summed, so it is whole."""
    parent = f"{last.owner.rpartition('.')[0]}."
    rows = {region.row.owner for region in found.regions}
    return tuple(sorted(owner for owner in rows if owner.startswith(parent)))


def _norms(small: Small, last: Stored) -> tuple[str, ...]:
    """The norms beside a layer that have one weight for each feature, and no bias."""
    parent, found = f"{last.owner.rpartition('.')[0]}.", []
    for tensor in small.tensors:
        near = tensor.kind == "norm" and tensor.owner.startswith(parent)
        bias = getattr(small.model.get_submodule(tensor.owner), "bias", None)
        if near and len(tensor.shape) == 1 and bias is None:
            found.append(tensor.owner)
    return tuple(dict.fromkeys(found))


def _fits(region: Region, others: Sequence[Region]) -> bool:
    """Whether what it shares with regions before it is divided alike, and never row and column."""
    rules = {axis.pattern: axis for other in others for axis in other.rules}
    return all(
        axis.pattern not in rules
        or (rules[axis.pattern].style, rules[axis.pattern].text) == (axis.style, axis.text)
        for axis in region.rules
    )


def _is_large(tensor: Stored) -> bool:
    if tensor.kind in ("embedding", "norm") or len(tensor.shape) < 2 or tensor.shape[0] == 1:
        return False
    if tensor.kind in ("conv", "other"):
        return prod(tensor.shape) >= FEW_NUMBERS
    return min(tensor.shape) > FEW_OUTPUTS
