"""Results of sweeps as a checkout stores them: a JSON file, with a line for each name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar


class StoredResult(Protocol):
    """A dataclass of JSON values."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def digest(self) -> str:
        """The digest of what was examined; the result of another is stale."""


Result = TypeVar("Result", bound=StoredResult)


@dataclass(frozen=True)
class ResultsFile(Generic[Result]):
    """Where results of one kind are stored, by name.

    Attributes:
        file_name: The file in the folder of results.
        kind: The dataclass of a result.

    Example:
        >>> BLOCK_RESULTS.read(folder)["llama"].summary  # doctest: +SKIP
        '17 of 17'
    """

    file_name: str
    kind: Callable[..., Result]

    def read(self, folder: Path) -> dict[str, Result]:
        """The stored results; none if there are none yet."""
        path = folder / self.file_name
        if not path.exists():
            return {}
        return {name: self.kind(**entry) for name, entry in json.loads(path.read_text()).items()}

    def write(self, folder: Path, results: Mapping[str, Result]) -> None:
        """Store results instead of those that are there."""
        lines = [f"{json.dumps(name)}: {json.dumps(asdict(r))}" for name, r in results.items()]
        (folder / self.file_name).write_text("{\n" + ",\n".join(lines) + "\n}\n")
