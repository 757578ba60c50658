"""Fields of a JSON value from a file that may be hostile: of the type and size expected, or a
JsonError that names the field.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from shardkit.files import is_plain_name
from shardkit.strict_json import JsonError, quote

MAX_INT = 1 << 62
HEX = set("0123456789abcdef")
T = TypeVar("T")


class JsonObject:
    """A JSON object with exactly the keys expected, each read as what it has to be."""

    def __init__(self, value: Any, where: str, keys: str) -> None:
        """`keys` are separated by spaces; `where` says in errors what the object is."""
        self.where = where
        self._table = read_table(value, where)
        if self._table.keys() != set(keys.split()):
            found = ", ".join(sorted(self._table)) or "nothing"
            raise JsonError(f"{where}: has the keys {quote(found)}, not {keys}")

    def value(self, key: str) -> Any:
        """The field, whatever it is."""
        return self._table[key]

    def name(self, key: str) -> str:
        """What errors call a field."""
        return f"{self.where}: {key}"

    def string(self, key: str) -> str:
        """A string."""
        return read_string(self._table[key], self.name(key))

    def labels(self, key: str) -> dict[str, str | int]:
        """A table of strings and counts."""
        return {
            k: v if isinstance(v, str) else read_integer(v, f"{self.name(key)}: {quote(k)}")
            for k, v in self.table(key).items()
        }

    def counts(self, key: str) -> dict[str, int]:
        """A table of integers from 1 on."""
        where = self.name(key)
        return {
            k: read_integer(v, f"{where}: {quote(k)}", least=1) for k, v in self.table(key).items()
        }

    def pairs(self, key: str) -> dict[str, str]:
        """A list of pairs of strings, in its own order."""
        return dict(self.items(key, _read_pair))

    def file_name(self, key: str) -> str:
        """The name of a file in the same folder."""
        return read_file_name(self._table[key], self.name(key))

    def boolean(self, key: str) -> bool:
        """True or false; no number is either."""
        return _require_type(bool, self._table[key], self.name(key), "true or false")

    def integer(self, key: str, limit: int = MAX_INT, least: int = 0) -> int:
        """An integer of `least` to `limit`."""
        return read_integer(self._table[key], self.name(key), limit, least)

    def hex(self, key: str, digits: int = 64) -> str:
        """A digest, or its first hex digits."""
        return read_hex(self._table[key], self.name(key), digits)

    def table(self, key: str) -> dict[str, Any]:
        """A table, its values unread."""
        return read_table(self._table[key], self.name(key))

    def items(self, key: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
        """A list, each item read by `read`, which is told its name."""
        values = _require_type(list, self._table[key], self.name(key), "a list")
        return tuple(read(value, f"{key} {at}") for at, value in enumerate(values))


def read_table(value: Any, where: str) -> dict[str, Any]:
    """A JSON object.  Raises JsonError."""
    return _require_type(dict, value, where, "a table")


def read_string(value: Any, where: str) -> str:
    """A string.  Raises JsonError."""
    return _require_type(str, value, where, "a string")


def read_integer(value: Any, where: str, limit: int = MAX_INT, least: int = 0) -> int:
    """An integer of `least` to `limit`.  Raises JsonError."""
    if type(value) is not int or not least <= value <= limit:
        raise JsonError(f"{where}: is {quote(value)}, not an integer of {least} to {limit}")
    return value


def read_hex(value: Any, where: str, digits: int) -> str:
    """So many hexadecimal digits in lower case.  Raises JsonError."""
    if not isinstance(value, str) or len(value) != digits or not set(value) <= HEX:
        raise JsonError(f"{where}: is {quote(value)}, not {digits} hex digits")
    return value


def read_file_name(value: Any, where: str) -> str:
    """The plain name of a file in the same folder.  Raises JsonError."""
    if not isinstance(value, str) or not is_plain_name(value):
        raise JsonError(f"{where}: {quote(value)} is not the name of a file in this folder")
    return value


def _read_pair(value: Any, where: str) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise JsonError(f"{where}: is {quote(value)}, not a pair")
    return read_string(value[0], where), read_string(value[1], where)


def _require_type(kind: type[T], value: Any, where: str, words: str) -> T:
    if not isinstance(value, kind):
        raise JsonError(f"{where}: is {quote(value)}, not {words}")
    return value
