"""JSON from files that may be hostile: bounded, no duplicate keys, no NaN, one clean error."""

import contextlib
import gc
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

_MAYBE_SURROGATE = re.compile(rb"\\u[dD]")
_MAYBE_MINUS_ZERO = re.compile(rb"-0(?![0-9.eE])")
MAX_VALUES = 2_000_000  # commas and brackets; in longer text, one in eight bytes
MAX_WIDE = 32 << 20  # one character outside ASCII makes Python hold all of them in up to four bytes
MAX_INT = 1 << 62
HEX_DIGITS = set("0123456789abcdef")
T = TypeVar("T")


class JsonError(ValueError):
    """The text is not JSON as this project accepts it; the message says why, in one line."""


@contextlib.contextmanager
def put_off_collection() -> Iterator[None]:
    """Put off the search for garbage: among many objects without cycles it takes half the time."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def parse_json(
    data: bytes, max_values: int | None = None, count_strings: Callable[[Any], int] | None = None
) -> Any:
    """Parse UTF-8 JSON. Raises JsonError for anything `json` would wave through or choke on.

    Text of more than `max_values` commas and brackets is refused before a value is made of it: an
    empty list is two bytes of text and a hundred of memory.

    To look for duplicate keys object by object takes as long as all the rest. If `count_strings`
    counts in the value, keys included, as many strings as the text has, none was there twice.
    """
    _check_size(data, max_values or max(MAX_VALUES, len(data) // 8))
    try:
        # A hook for each integer would cost as much as all the rest.
        careful = _MAYBE_MINUS_ZERO.search(data) is not None
        text = data.decode("utf-8")
        if count_strings and not careful and b"\\" not in data:
            value = _PLAIN.decode(text)
            if 2 * count_strings(value) == data.count(b'"'):
                return value
        value = (_CAREFUL if careful else _DECODER).decode(text)
        if _MAYBE_SURROGATE.search(data):
            encode_canonical(value)
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise JsonError("half of a surrogate pair is no character") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} at character {error.pos}: damaged or truncated") from None
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except ValueError as error:
        raise JsonError(str(error).split(";")[0]) from None
    return value


def parse_object_at(text: str, start: int) -> tuple[dict[str, Any], int]:
    """The object that begins at a place of a text without escapes, and where it ends.

    Raises JsonError if there is none.
    """
    try:
        value, stop = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise JsonError(str(error)) from None
    if not isinstance(value, dict) or "\\" in text[start:stop]:
        raise JsonError("not an object without escapes")
    return value, stop


def count_strings(value: Any) -> int:
    """How many strings a value has, keys included.

    Example:
        >>> count_strings({"a": ["b", 1], "c": {}})
        3
    """
    if isinstance(value, dict):
        return len(value) + sum(map(count_strings, value.values()))
    if isinstance(value, list):
        return sum(map(count_strings, value))
    return int(isinstance(value, str))


def encode_canonical(value: Any) -> bytes:
    """The one spelling of a value that has no floats: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def encode_compact(value: Any) -> bytes:
    """A value in its own key order, no spaces, UTF-8: how safetensors headers are written."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def quote(value: object, limit: int = 80) -> str:
    """A value from a file as an error may print it: one line, escaped, cut short."""
    text = ascii(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "…"


def escape_line(text: str, limit: int | None = None) -> str:
    """Text that quotes a file, on one line: what cannot be printed is escaped.

    Example:
        >>> escape_line("a\\nb")
        'a\\\\nb'
    """
    if limit is not None and len(text) > limit:
        text = text[:limit] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _check_size(data: bytes, max_values: int) -> None:
    values = len(data) - len(data.translate(None, b",[{"))
    if values > max_values:
        raise JsonError(f"{values} commas and brackets, more than the {max_values} allowed")
    if len(data) > MAX_WIDE and not (data.isascii() and not _MAYBE_SURROGATE.search(data)):
        raise JsonError(f"{len(data)} bytes, more than the {MAX_WIDE} allowed outside ASCII")


def _check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise JsonError(f"duplicate key {quote(next(k for k in counts if counts[k] > 1))}")
    return table


def _parse_integer(text: str) -> int:
    if text == "-0":
        raise JsonError("-0 is not an integer")  # a float to the safetensors library
    return int(text)


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"{quote(text)} is too large a number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON")


_NUMBERS: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _parse_finite}
_HOOKS = {"object_pairs_hook": _check_unique, **_NUMBERS}
_PLAIN = json.JSONDecoder(**_NUMBERS)
_DECODER = json.JSONDecoder(**_HOOKS)
_CAREFUL = json.JSONDecoder(**_HOOKS, parse_int=_parse_integer)


class JsonObject:
    """A JSON object with exactly the keys expected, each read as what it has to be.

    Args:
        value: What should be an object.
        where: What errors call it.
        keys: The keys it must have, separated by spaces.
        optional: The keys it may have besides.

    Raises:
        JsonError: If it is not an object, lacks a key, or has one that is not expected.
    """

    def __init__(self, value: Any, where: str, keys: str, optional: str = "") -> None:
        self.where = where
        self._table = read_table(value, where)
        if self._table.keys() - set(optional.split()) != set(keys.split()):
            actual = ", ".join(sorted(self._table)) or "nothing"
            raise JsonError(f"{where}: has the keys {quote(actual)}, not {keys}")

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def value(self, key: str) -> Any:
        """The field, whatever it is."""
        return self._table[key]

    def name(self, key: str) -> str:
        """What errors call a field."""
        return f"{self.where}: {key}"

    def read(self, key: str, reader: Callable[[Any, str], T]) -> T:
        """The field as `reader(value, where)` reads it."""
        return reader(self._table[key], self.name(key))

    def string(self, key: str) -> str:
        """A string."""
        return self.read(key, read_string)

    def boolean(self, key: str) -> bool:
        """True or false; a number is neither."""
        return _require_type(bool, self._table[key], self.name(key), "true or false")

    def integer(self, key: str, limit: int = MAX_INT, least: int = 0) -> int:
        """An integer of `least` to `limit`."""
        return read_integer(self._table[key], self.name(key), limit, least)

    def hex(self, key: str, digits: int = 64) -> str:
        """A digest, or its first hex digits."""
        return read_hex(self._table[key], self.name(key), digits)

    def table(self, key: str) -> dict[str, Any]:
        """A table, its values unread."""
        return self.read(key, read_table)

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

    def items(self, key: str, reader: Callable[[Any, str], T]) -> tuple[T, ...]:
        """A list, each item read by `reader(value, where)`."""
        values = _require_type(list, self._table[key], self.name(key), "a list")
        return tuple(reader(value, f"{key} {at}") for at, value in enumerate(values))


def read_table(value: Any, where: str) -> dict[str, Any]:
    """A JSON object. Raises JsonError."""
    return _require_type(dict, value, where, "a table")


def read_string(value: Any, where: str) -> str:
    """A string. Raises JsonError."""
    return _require_type(str, value, where, "a string")


def read_integer(value: Any, where: str, limit: int = MAX_INT, least: int = 0) -> int:
    """An integer of `least` to `limit`. Raises JsonError."""
    if type(value) is not int or not least <= value <= limit:
        raise JsonError(f"{where}: is {quote(value)}, not an integer of {least} to {limit}")
    return value


def read_hex(value: Any, where: str, digits: int) -> str:
    """That many hexadecimal digits in lower case. Raises JsonError."""
    if not isinstance(value, str) or len(value) != digits or not set(value) <= HEX_DIGITS:
        raise JsonError(f"{where}: is {quote(value)}, not {digits} hex digits")
    return value


def _read_pair(value: Any, where: str) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise JsonError(f"{where}: is {quote(value)}, not a pair")
    return read_string(value[0], where), read_string(value[1], where)


def _require_type(kind: type[T], value: Any, where: str, words: str) -> T:
    if not isinstance(value, kind):
        raise JsonError(f"{where}: is {quote(value)}, not {words}")
    return value
