"""JSON from files that may be hostile: bounded, no duplicate keys, no NaN, one clean error."""

import json
import math
import re
from typing import Any, NoReturn

_MAYBE_SURROGATE = re.compile(rb"\\u[dD]")
_MAYBE_MINUS_ZERO = re.compile(rb"-0(?![0-9.eE])")
MAX_VALUES = 2_000_000  # commas and brackets; in longer text, one in eight bytes
MAX_WIDE = 32 << 20  # one character outside ASCII makes Python hold all of them in up to four bytes


class JsonError(ValueError):
    """The text is not JSON as this project accepts it; the message says why, in one line."""


def parse_json(data: bytes, max_values: int | None = None) -> Any:
    """Parse UTF-8 JSON.  Raises JsonError for anything `json` would wave through or choke on.

    Text of more than `max_values` commas and brackets is refused before a value is made of it: an
    empty list is two bytes of text and a hundred of memory.
    """
    _check_size(data, max_values or max(MAX_VALUES, len(data) // 8))
    try:
        # A hook for each integer would cost as much as all the rest.
        decoder = _CAREFUL if _MAYBE_MINUS_ZERO.search(data) else _DECODER
        value = decoder.decode(data.decode("utf-8"))
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


def escape_line(text: str, limit: int = 1000) -> str:
    """Text that quotes a file, as an error may print it: what cannot be printed is escaped."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _check_size(data: bytes, max_values: int) -> None:
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > max_values:
        raise JsonError(f"{values} commas and brackets, more than the {max_values} allowed")
    if len(data) > MAX_WIDE and not (data.isascii() and not _MAYBE_SURROGATE.search(data)):
        raise JsonError(f"{len(data)} bytes, more than the {MAX_WIDE} allowed outside ASCII")


def _check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"duplicate key {quote(twice)}")
    return table


def _parse_integer(text: str) -> int:
    if text == "-0":
        raise JsonError("-0 is no integer")  # a float to the safetensors library
    return int(text)


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"{quote(text)} is too large a number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON")


_HOOKS: dict[str, Any] = {
    "object_pairs_hook": _check_unique, "parse_constant": _refuse_constant, "parse_float": _parse_finite,
}  # fmt: skip
_DECODER = json.JSONDecoder(**_HOOKS)
_CAREFUL = json.JSONDecoder(**_HOOKS, parse_int=_parse_integer)
