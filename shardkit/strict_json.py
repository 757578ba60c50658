"""JSON from files that may be hostile: bounded, no duplicate keys, no NaN, one clean error."""

import json
from typing import Any, NoReturn


class JsonError(ValueError):
    """The text is not JSON as this project accepts it; the message says why, in one line."""


def parse(data: bytes) -> Any:
    """Parse UTF-8 JSON.  Raises JsonError for anything `json` would wave through or choke on."""
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} at byte {error.pos}") from None
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except ValueError as error:
        raise JsonError(str(error).split(";")[0]) from None


def canonical(value: Any) -> bytes:
    """The one spelling of a value that has no floats: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def compact(value: Any) -> bytes:
    """A value in its own key order, no spaces, UTF-8: how safetensors headers are written."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"duplicate key {twice!r}")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON")
