"""Inputs that are nearly valid: a text's tokens changed, and what depends on them made to fit.

Bytes changed at random break a length, a checksum or a bracket, and no reader looks further.  Here
a change is of a whole token, entry or value, most lengths are put right again, and some inputs are
made from nothing.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from shardkit import strict_json
from shardkit.dtypes import DTYPES

Change = Callable[[list[bytes], Random], None]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[A-Za-z_]+|\s+|.', re.DOTALL)
END = re.compile(rb'"data_offsets":\[[0-9]{1,9},([0-9]{1,9})\]')
OPENING = {b"{": b"}", b"[": b"]"}
NUMBERS = [
    b"0", b"-0", b"1", b"-1", b"2", b"7", b"8", b"01", b"1.0", b"1e2", b"1e999", b"-1e-9", b"65",
    b"1048576", b"4294967296", b"%d" % 2**47, b"%d" % 2**48, b"%d" % 2**62, b"%d" % 2**63,
    b"%d" % (2**64 - 1), b"%d" % 2**64, b"9" * 40, b"NaN", b"Infinity", b"true", b"null",
]  # fmt: skip
WORDS = [
    *NUMBERS, b'""', b'"a"', b'"\\u0061"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"',
    b'"\\n"', b'"../x.safetensors"', b'"/x.safetensors"', b"{}", b"[]", b"[[", b"false", b"\xff",
    b"\x00", b"\\",
]  # fmt: skip
HEADER_WORDS = [
    *WORDS, b'"__metadata__"', b'"dtype"', b'"shape"', b'"data_offsets"',
    *(b'"%s"' % name.encode() for name in DTYPES),
]  # fmt: skip
LETTERS = [b"a", b"b", b"0", b"2", b"F", b"", b"aa", b".", b"\xc3\xa9", b"\xf0\x9f\x98\x80", b"\\/"]
NAMES = ["a", "b", "w.weight", "é", "😀", "a b", "\u202e", "\x7f", "x" * 70, "", "__metadata__"]
MAX_DATA = 1024


def change_tokens(data: bytes, rng: Random, words: Sequence[bytes], most: int = 3) -> bytes:
    """One to `most` changes of a text's tokens, two thirds of which leave its grammar whole."""
    tokens = TOKEN.findall(data)
    for _ in range(1 + int(rng.random() * most)):
        if not tokens:
            return rng.choice(words)
        at = int(rng.random() * len(tokens))
        match int(rng.random() * 12):
            case 0 | 1 | 2:
                _change_number(tokens, at, rng)
            case 3 | 4 | 5:
                _change_string(tokens, at, rng, words)
            case 6 | 7:
                _copy_or_drop_entry(tokens, at, rng)
            case 8:
                tokens[at] = rng.choice(words)
            case 9:
                tokens.insert(at, rng.choice(words))
            case 10:
                del tokens[at : at + 1 + int(rng.random() * 3)]
            case 11:
                tokens[at] = _change_byte(tokens[at], rng)
    return b"".join(tokens)


def change_header(data: bytes, rng: Random) -> bytes:
    """A safetensors file like `data`, its tokens changed, or a new one."""
    if rng.random() < 0.25:
        text = fresh_header(rng)
        if rng.random() < 0.7:
            text = change_tokens(text, rng, HEADER_WORDS, 2)
    else:
        text = change_tokens(data[8 : 8 + header_size(data)], rng, HEADER_WORDS)
    if rng.random() < 0.5:
        text = laid_out(text)
    return fitted(text) if rng.random() < 0.95 else data[:8] + text


def header_size(data: bytes) -> int:
    """The header's length as the file states it, or all there is."""
    size: int = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    return min(size, len(data))


def fitted(text: bytes) -> bytes:
    """A file with this header: its length, and as much data as its tensors end at."""
    end = max(map(int, END.findall(text)), default=0)
    return struct.pack("<Q", len(text)) + text + bytes(min(end, MAX_DATA))


def laid_out(text: bytes) -> bytes:
    """A header with the offsets that its shapes need, in its own order, if it can be read at all.

    A name that stands twice stays.
    """
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
        at = 0
        for _, entry in pairs if isinstance(pairs, _Pairs) else ():
            if isinstance(entry, _Pairs) and {"dtype", "shape", "data_offsets"} <= {*dict(entry)}:
                stop = at + _nbytes(**dict(entry))
                entry[:] = [(k, [at, stop] if k == "data_offsets" else v) for k, v in entry]
                at = stop
        return _written(pairs).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def _nbytes(dtype: str, shape: list[int], **_: object) -> int:
    if not all(type(size) is int and abs(size) < 1 << 64 for size in shape):
        raise ValueError("no shape")
    return math.prod(shape) * DTYPES[dtype].bits // 8


class _Pairs(list[tuple[str, Any]]):
    """A table with its keys as they stand, duplicates and all."""


def _written(value: Any) -> str:
    if not isinstance(value, _Pairs):
        return json.dumps(value, separators=(",", ":"))
    return "{" + ",".join(f"{json.dumps(k)}:{_written(v)}" for k, v in value) + "}"


def fresh_header(rng: Random) -> bytes:
    """A valid header of up to four tensors in any order of their bytes."""
    table: dict[str, object] = {}
    at = 0
    for _ in range(int(rng.random() * 5)):
        dtype = rng.choice(tuple(DTYPES))
        shape = _huge_but_empty(rng) if rng.random() < 0.1 else _small(rng)
        bits = DTYPES[dtype].bits
        for size in shape:
            bits *= size
        stop = at + bits // 8
        table[rng.choice(NAMES)] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    if rng.random() < 0.3:
        table["__metadata__"] = {rng.choice(NAMES): rng.choice(NAMES)}
    items = list(table.items())
    rng.shuffle(items)
    text = json.dumps(dict(items), separators=(",", ":"), ensure_ascii=rng.random() < 0.5)
    return text.encode()


def _small(rng: Random) -> list[int]:
    return [int(rng.random() * 4) for _ in range(int(rng.random() * 4))]


def _huge_but_empty(rng: Random) -> list[int]:
    """Sizes whose product may overflow, were it not for a zero among them."""
    shape = [0, *(1 << int(rng.random() * 48) for _ in range(1 + int(rng.random() * 3)))]
    rng.shuffle(shape)
    return shape


def change_json(data: bytes, rng: Random) -> bytes:
    """JSON like `data`, its tokens changed."""
    return change_tokens(data, rng, WORDS)


def change_manifest(data: bytes, rng: Random) -> bytes:
    """A manifest like `data`, mostly in canonical form and with the digests that it should have."""
    text = change_tokens(data, rng, HEADER_WORDS, 2)
    if rng.random() < 0.1:
        return text
    try:
        table = json.loads(text)
        source, recipe = table["source"]["fingerprint"], table["recipe"]["sha256"]
        named = strict_json.encode_canonical([1, table["mesh"], source, recipe, table["tensors"]])
        table["split_id"] = hashlib.sha256(named).hexdigest()
        del table["sha256"]
        unsigned = strict_json.encode_canonical(table) + b"\n"
        table["sha256"] = hashlib.sha256(unsigned).hexdigest()
        return strict_json.encode_canonical(table) + b"\n"
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def change_recipe(data: bytes, rng: Random) -> bytes:
    """A recipe like `data`: its tokens changed, or its lines."""
    if rng.random() < 0.6:
        return change_tokens(data, rng, RECIPE_WORDS)
    return move_lines(data, rng)


def change_lines(data: bytes, rng: Random) -> bytes:
    """Lines of JSON like `data`: their tokens changed, lines moved, the last one torn."""
    text = change_tokens(data, rng, WORDS, 2) if rng.random() < 0.6 else move_lines(data, rng)
    return text[: int(rng.random() * len(text))] if rng.random() < 0.1 else text


def move_lines(data: bytes, rng: Random) -> bytes:
    """A line or two moved, copied or dropped."""
    lines = data.splitlines(keepends=True)
    for _ in range(1 + int(rng.random() * 2)):
        if lines:
            line = lines.pop(int(rng.random() * len(lines)))
            for _ in range(int(rng.random() * 3)):
                lines.insert(int(rng.random() * (len(lines) + 1)), line)
    return b"".join(lines)


RECIPE_WORDS = [
    *WORDS, b'"*"', b'"vocab"', b'"heads + 2"', b'"kv_heads (heads + 2)"', b'"n_head / 4"',
    b"[units]", b"[column]", b"[row]", b"[module_attributes]", b"[counts]", b'"{a,b}.*"', b"{",
    b"1979-05-27", b"0x1f", b'"\\u0085"', b'"\\t"', b'"""', b"'", b"=",
]  # fmt: skip


def _change_number(tokens: list[bytes], at: int, rng: Random) -> None:
    """Change the first number from `at` on."""
    for place in range(at, len(tokens)):
        if tokens[place][:1].isdigit():
            if rng.random() < 0.5:
                tokens[place] = rng.choice(NUMBERS)
            elif tokens[place].isdigit():
                tokens[place] = b"%d" % abs(int(tokens[place][:20]) + int(rng.random() * 17) - 8)
            return


def _change_string(tokens: list[bytes], at: int, rng: Random, words: Sequence[bytes]) -> None:
    """Change the first string from `at` on: for a word, for another of the text, or a byte."""
    for place in range(at, len(tokens)):
        if tokens[place][:1] == b'"':
            match int(rng.random() * 3):
                case 0:
                    tokens[place] = rng.choice(words)
                case 1:
                    tokens[place] = rng.choice([t for t in tokens if t[:1] == b'"'])
                case 2:
                    tokens[place] = _change_byte(tokens[place], rng)
            return


def _copy_or_drop_entry(tokens: list[bytes], at: int, rng: Random) -> None:
    """Copy, copy elsewhere or drop the first table or list from `at` on, with its key."""
    for start in range(at or 1, len(tokens)):
        closing = OPENING.get(tokens[start])
        if closing and closing in tokens[start:]:
            depth, stop = 0, start
            for stop in range(start, len(tokens)):
                depth += (tokens[stop] in b"{[") - (tokens[stop] in b"}]")
                if depth == 0:
                    break
            first = start - 2 if start > 1 and tokens[start - 1] == b":" else start
            entry = tokens[first : stop + 1]
            match int(rng.random() * 3):
                case 0:
                    tokens[first:first] = [*entry, b","]
                case 1:
                    before = tokens[first - 1] == b","
                    after = not before and tokens[stop + 1 : stop + 2] == [b","]
                    del tokens[first - before : stop + 1 + after]
                case 2:
                    tokens[start : stop + 1] = [tokens[start], closing]
            return


def _change_byte(token: bytes, rng: Random) -> bytes:
    """A byte of a token changed, or written as an escape, which leaves its meaning."""
    at = int(rng.random() * len(token))
    if token[:1] == b'"' and len(token) > 2 and rng.random() < 0.8:
        at = 1 + int(rng.random() * (len(token) - 2))
        letter = b"\\u%04x" % token[at] if rng.random() < 0.5 else rng.choice(LETTERS)
        return token[:at] + letter + token[at + 1 :]
    return token[:at] + bytes([int(rng.random() * 256)]) + token[at + 1 :]
