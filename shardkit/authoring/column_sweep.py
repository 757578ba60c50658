"""Examines all samples of every recipe for a column of the page of families."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from shardkit.authoring.rank_pool import RankPool
from shardkit.authoring.samples import Sample, find_samples
from shardkit.authoring.stored_results import ResultsFile, StoredResult
from shardkit.authoring.sweep import (
    PAGE,
    SWEEP_RESULTS,
    digest_inputs,
    list_alone,
    list_stale,
    render_page,
)
from shardkit.recipe import Recipe


class ColumnResult(StoredResult, Protocol):
    """The result of a recipe: its digest, then the entries of its samples."""

    @property
    def summary(self) -> str:
        """What the page says, in a few words."""

    @property
    def faults(self) -> list[str]:
        """What was wrong, by sample."""


Result = TypeVar("Result", bound=ColumnResult)


@dataclass(frozen=True)
class ColumnSweep(Generic[Result]):
    """What a column shows of every recipe that stands by itself.

    Attributes:
        results: Where its results are stored.
        examine: The entries of one sample, as JSON objects.
    """

    results: ResultsFile[Result]
    examine: Callable[[Recipe, Sample, RankPool], Iterable[dict[str, Any]]]

    def run(
        self, recipes: Sequence[Recipe], folder: Path, only_stale: bool = False
    ) -> Iterator[tuple[Recipe, Result]]:
        """Examine recipes, store each result as it is done, and write the page at the end.

        Args:
            recipes: All recipes; what is stored of any other is dropped.
            folder: Where the results are stored.
            only_stale: Whether to leave out those whose results are up to date.
        """
        stored, alone = self.results.read(folder), list_alone(recipes)
        with RankPool() as pool:
            for recipe in list_stale(stored, alone) if only_stale else alone:
                samples = find_samples(recipe)
                entries = [entry for s in samples for entry in self.examine(recipe, s, pool)]
                stored[recipe.name] = result = self.results.kind(digest_inputs(recipe), entries)
                kept = {each.name: stored[each.name] for each in alone if each.name in stored}
                self.results.write(folder, kept)
                yield recipe, result
        (folder / PAGE).write_text(render_page(SWEEP_RESULTS.read(folder), recipes, folder))
