"""Where a checkout publishes the proofs of recipes, and the tables of these pages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.errors import OutputError
from shardkit.recipe.catalog import find_recipe_folder


def find_proofs_folder() -> Path:
    """The folder `recipes/proofs` of the checkout that this package runs from.

    Raises:
        OutputError: The package is installed, not run from a checkout.
    """
    folder = find_recipe_folder()
    if not (folder.parent / "pyproject.toml").is_file():
        raise OutputError(
            f"{folder} is not in a checkout of shardkit; results can be written only from one"
            " (pip install -e .)"
        )
    return folder / "proofs"


def format_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The lines of a Markdown table; a column whose title ends in a colon is right-aligned."""
    yield f"| {' | '.join(title.removesuffix(':') for title in titles)} |"
    yield f"|{'|'.join('---:' if title.endswith(':') else '---' for title in titles)}|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def name_layout(proof: Mapping[str, Any]) -> str:
    """A proof's number of ranks, and `ep` if each had whole experts."""
    return f"{proof['tp_size']}{' ep' if proof.get('expert_parallel') else ''}"
