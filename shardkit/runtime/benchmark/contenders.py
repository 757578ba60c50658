"""What is measured in one run, and what of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shardkit.errors import UsageError
from shardkit.shards import read_manifest

Kind = Literal["shards", "unsharded", "transformers"]
LIBRARIES: dict[Kind, str] = {
    "unsharded": "unsharded",
    "shards": "shardkit",
    "transformers": "transformers",
}


@dataclass(frozen=True, slots=True)
class Contender:
    """A model in one way: a shard folder, or an unsharded checkpoint over some ranks.

    `compiles` says whether its decoding is compiled.
    """

    kind: Kind
    folder: Path
    ranks: int
    compiles: bool = False

    @property
    def name(self) -> str:
        """`shardkit tp 2 compiled`."""
        name = LIBRARIES[self.kind]
        ranks = "" if self.kind == "unsharded" else f" tp {self.ranks}"
        return f"{name}{ranks}{' compiled' * self.compiles}"


@dataclass(frozen=True, slots=True)
class Workload:
    """What each contender runs.

    Attributes:
        batches: How many sequences at once, one measurement for each number.
        prompt_tokens: The length of every prompt.
        new_tokens: How many tokens follow the first one.
        dtype: What to compute in; empty for the checkpoint's own.
        device: "cpu" or "cuda"; empty for a GPU if there is one.
        reduce_dtype: What shards' sums are sent in; empty for the activations' own dtype.
    """

    batches: tuple[int, ...] = (1,)
    prompt_tokens: int = 64
    new_tokens: int = 32
    dtype: str = ""
    device: str = ""
    reduce_dtype: str = ""

    def to_json(self) -> dict[str, Any]:
        """As `read_workload` takes it."""
        return {**asdict(self), "batches": list(self.batches)}


def read_workload(value: dict[str, Any]) -> Workload:
    """A workload from its JSON."""
    return Workload(**{**value, "batches": tuple(value["batches"])})


def list_contenders(
    shards: Sequence[Path], source: Path | None, peers: Sequence[str], compiles: bool = False
) -> list[Contender]:
    """Every contender, the baseline first: the unsharded model if there is one, else the first.

    Args:
        shards: Shard folders, of one model.
        source: The checkpoint that they are of.
        peers: "transformers" for its own tensor parallelism over as many ranks.
        compiles: Whether the model also runs with compiled decoding, unsharded and in each folder.

    Raises:
        ManifestError: If a folder is no shard folder.
        UsageError: If folders are of different models or of as many ranks, or a peer lacks a
            checkpoint.
    """
    manifests = [read_manifest(folder) for folder in shards]
    sizes = [manifest.mesh.world_size for manifest in manifests]
    if len({manifest.source.fingerprint for manifest in manifests}) > 1:
        raise UsageError("the shard folders are of different checkpoints; measure one at a time")
    if len(set(sizes)) < len(sizes):
        raise UsageError(
            f"two shard folders have {_find_twice(sizes)} ranks; give one of each size"
        )
    if peers and source is None:
        raise UsageError("--peer needs --against SOURCE, the unsharded checkpoint that it runs")
    contenders = list(_make_contenders(shards, sizes, source, peers))
    if compiles:
        compilable = [each for each in contenders if each.kind != "transformers"]
        contenders += [replace(each, compiles=True) for each in compilable]
    return contenders


def _make_contenders(
    shards: Sequence[Path], sizes: Sequence[int], source: Path | None, peers: Sequence[str]
) -> Iterator[Contender]:
    if source is not None:
        yield Contender("unsharded", source, 1)
    for size, folder in sorted(zip(sizes, shards, strict=True)):
        yield Contender("shards", folder, size)
    for size in sorted(set(sizes) - {1}):
        if source is not None and "transformers" in peers:
            yield Contender("transformers", source, size)


def _find_twice(sizes: Sequence[int]) -> int:
    return next(size for at, size in enumerate(sizes) if size in sizes[:at])
