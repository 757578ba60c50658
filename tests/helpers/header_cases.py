"""Headers that are refused, each with words of the error, and odd ones that are read."""

import struct

from shardkit.checkpoint.header import MAX_HEADER, MAX_NAME
from shardkit.checkpoint.header_columns import MAX_DIM
from shardkit.dtypes import DTYPES
from tests.helpers.raw_safetensors import entry, file_bytes, small_file

F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'

EIGHT = b"12345678"

SOUND = small_file("a", "b", "c")

HALF = 1 << 47

WRAP = 1 << 31  # 2 * (WRAP + 1)**2 * (WRAP - 1)**2 is 2, modulo 2**62


def _file(header: str) -> bytes:
    """A file of eight bytes of data; `@` in the header stands for a sound entry."""
    return file_bytes(header.replace("@", F32), EIGHT)


def _one(text: str) -> bytes:
    """A file of one tensor `a` whose entry is `text`."""
    return _file('{"a":' + text + "}")


def _shape(shape: str, stop: int = 8) -> bytes:
    text = f'"dtype":"F32","shape":{shape},"data_offsets":[0,{stop}]'
    return file_bytes('{"a":{' + text + "}}", EIGHT[:stop])


def _offsets(offsets: str) -> bytes:
    return _one('{"dtype":"F32","shape":[2],"data_offsets":' + offsets + "}")


def _spans(*spans: tuple[int, int], data: int) -> bytes:
    table = {f"t{i}": entry("U8", [max(b - a, 0)], a, b) for i, (a, b) in enumerate(spans)}
    return file_bytes(table, bytes(data))


# A damaged or hostile file, and words its error must hold.
BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("0 bytes", "too short")),
    "seven bytes": (SOUND[:7], ("7 bytes", "too short")),
    "no header at all": (bytes(8), ("does not start with '{'",)),
    "cut inside the header": (SOUND[:40], ("of 40", "truncated")),
    "cut by one byte": (SOUND[:-1], ("end at byte", "truncated")),
    "extended by one byte": (SOUND + b"\0", ("end at byte", "extended")),
    "header length of 2^64 - 1": (
        b"\xff" * 8 + SOUND[8:], (str(2**64 - 1), str(MAX_HEADER)),
    ),
    "header length of 2^63": (struct.pack("<Q", 1 << 63) + SOUND[8:], (str(MAX_HEADER),)),
    "header one byte too long": (
        struct.pack("<Q", MAX_HEADER + 1) + SOUND[8:], (str(MAX_HEADER + 1), str(MAX_HEADER)),
    ),
    "a git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n", ("LFS pointer",),
    ),
    "a pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00" + bytes(64), ("header of", "safetensors")),
    "a zip, as torch.save writes": (b"PK\x03\x04" + bytes(200), ("not a safetensors file",)),
    "an HTML page": (b"<!DOCTYPE html><html>" + b" " * 90, ("header of", "safetensors")),
    "a list": (file_bytes("[]"), ("does not start with '{'",)),
    "leading space": (_file(' {"a":@}'), ("does not start with '{'",)),
    "byte order mark": (_file('\ufeff{"a":@}'), ("does not start",)),
    "text after the header": (_file('{"a":@} x'), ("damaged",)),
    "NUL padding": (_file('{"a":@}\0\0'), ("damaged",)),
    "a comment": (_file('{"a":@}//x'), ("damaged",)),
    "not UTF-8": (file_bytes(b'{"\xff":' + F32.encode() + b"}", EIGHT), ("not UTF-8", "byte 2")),
    "half a surrogate pair as a name": (_file('{"\\ud800":@}'), ("surrogate",)),
    "half a surrogate pair in metadata": (
        _file('{"__metadata__":{"a":"\\uDfff"},"a":@}'), ("surrogate",),
    ),
    "nested headers": (file_bytes('{"a":' * 50 + F32 + "}" * 50, EIGHT), ("'a'", "dtype")),
    "nested beyond measure": (file_bytes('{"a":' + "[" * 100_000), ("nested too deeply",)),
    "a list of 5000 lists": (
        file_bytes('{"a":' + "[" * 5000 + "]" * 5000 + "}"), ("nested too deeply",),
    ),
    "duplicate tensor, same bytes": (
        _file('{"a":@,"a":@}'), ("duplicate key 'a'",),
    ),
    "duplicate tensor, empty first": (
        _file('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":@}'),
        ("duplicate key 'a'",),
    ),
    "duplicate dtype": (
        _one('{"dtype":"I32","dtype":"F32","shape":[2],"data_offsets":[0,8]}'),
        ("duplicate key 'dtype'",),
    ),
    "duplicate metadata": (
        _file('{"__metadata__":{},"__metadata__":{},"a":@}'),
        ("duplicate key '__metadata__'",),
    ),
    "duplicate key inside metadata": (
        _file('{"__metadata__":{"k":"1","k":"2"},"a":@}'),
        ("duplicate key 'k'",),
    ),
    "metadata of numbers": (
        _file('{"__metadata__":{"a":1},"a":@}'), ("__metadata__", "strings"),
    ),
    "metadata null": (_file('{"__metadata__":null,"a":@}'), ("__metadata__",)),
    "unknown dtype": (
        _one('{"dtype":"F33","shape":[2],"data_offsets":[0,8]}'), ("'a'", "unknown dtype 'F33'"),
    ),
    "dtype in lower case": (
        _one('{"dtype":"f32","shape":[2],"data_offsets":[0,8]}'), ("unknown dtype 'f32'",),
    ),
    "dtype of 100 kB": (
        _one('{"dtype":"' + "F" * 100_000 + '","shape":[2],"data_offsets":[0,8]}'),
        ("unknown dtype 'FFF",),
    ),
    "dtype a number": (_one('{"dtype":4,"shape":[2],"data_offsets":[0,8]}'), ("dtype 4",)),
    "entry without shape": (_one('{"dtype":"F32","data_offsets":[0,8]}'), ("'a'", "shape")),
    "entry with an unknown key": (
        _one('{"dtype":"F32","shape":[2],"data_offsets":[0,8],"crc":1}'), ("'a'", "data_offsets"),
    ),
    "entry a list": (_one('["F32",[2],[0,8]]'), ("'a'", "dtype")),
    "entry null": (_one("null"), ("'a'", "dtype")),
    "shape a number": (_shape("2"), ("'a'", "shape")),
    "shape with a float": (_shape("[2.0]"), ("'a'", "shape")),
    "shape with an exponent": (_shape("[2e0]"), ("'a'", "shape")),
    "shape with true": (_shape("[true,2]"), ("'a'", "shape")),
    "shape below zero": (_shape("[-2]"), ("'a'", "shape")),
    "shape with NaN": (_shape("[NaN]"), ("NaN",)),
    "shape with Infinity": (_shape("[Infinity]"), ("Infinity",)),
    "shape with 1e999": (_shape("[1e999]"), ("1e999", "too large")),
    "shape with a string": (_shape('["2"]'), ("'a'", "shape")),
    "shape of 5000 digits": (_shape("[" + "9" * 5000 + "]"), ("4300 digits",)),
    "shape of 2^64": (_shape(f"[{1 << 64}]"), ("'a'", "shape")),
    "shape whose product wraps to the right size": (
        _shape(f"[2,{WRAP + 1},{WRAP - 1},{WRAP + 1},{WRAP - 1}]"), ("'a'", "too large"),
    ),
    "shape too large, then empty": (_shape(f"[{HALF},{HALF},0]", 0), ("'a'", "too large")),
    "shape of 65 dimensions": (_shape("[" + "1," * 64 + "2]"), ("'a'", "shape")),
    "an index beyond the largest dimension": (_shape(f"[{MAX_DIM},0]", 0), ("'a'", "shape")),
    "shape smaller than its bytes": (_shape("[1]"), ("'a'", "8 bytes", "needs 4")),
    "shape larger than its bytes": (_shape("[3]"), ("'a'", "8 bytes", "needs 12")),
    "F4 that ends inside a byte": (
        file_bytes({"a": entry("F4", [3], 0, 2)}, bytes(2)), ("a:", "12 bits", "byte"),
    ),
    "offsets of one": (_offsets("[8]"), ("'a'", "data_offsets")),
    "offsets of three": (_offsets("[0,8,9]"), ("'a'", "data_offsets")),
    "offsets reversed": (_offsets("[8,0]"), ("'a'", "data_offsets")),
    "offsets below zero": (_offsets("[-8,0]"), ("'a'", "data_offsets")),
    "offset -0": (_offsets("[-0,8]"), ("-0",)),
    "offsets of 2^63": (_offsets(f"[{1 << 63},{(1 << 63) + 8}]"), ("'a'", "data_offsets")),
    "offsets past the end": (_offsets("[8,16]"), ("'a'", "hole")),
    "hole at the start": (_spans((1, 4), data=4), ("'t0'", "hole")),
    "hole in the middle": (_spans((0, 2), (3, 4), data=4), ("'t1'", "hole")),
    "hole at the end": (_spans((0, 2), data=4), ("extended",)),
    "overlap whole": (_spans((0, 4), (0, 4), data=4), ("'t1'", "overlaps")),
    "overlap partly": (_spans((0, 3), (2, 5), data=5), ("'t1'", "overlaps")),
    "an empty tensor inside another": (_spans((0, 4), (2, 2), (4, 8), data=8), ("overlaps",)),
    "data past the end": (_spans((0, 4), (4, 1 << 40), data=8), ("truncated",)),
    "an empty name": (_file('{"":@}'), ("tensor name ''", "empty")),
    "a name with a line break": (_file('{"a\\nb":@}'), (r"'a\nb'",)),
    "a name with an escape code": (_file('{"\\u001b[31m":@}'), (r"\x1b",)),
    "a name with a NUL": (_file('{"a\\u0000":@}'), (r"'a\x00'",)),
    "a name that turns the text around": (_file('{"\\u202e":@}'), ("u202e",)),
    "a name of 100 kB": (
        _file('{"' + "n" * (MAX_NAME + 1) + '":@}'), ("too long",),
    ),
}  # fmt: skip

GOOD: dict[str, bytes] = {
    "three tensors": SOUND,
    "no tensors": file_bytes("{}"),
    "only metadata": file_bytes('{"__metadata__":{"format":"pt"}}'),
    "empty metadata": _file('{"__metadata__":{},"a":@}'),
    "padded with spaces": _file('{"a":@}     '),
    "padded with other white space": _file('{"a":@}\t\r\n'),
    "entries out of the order of their bytes": file_bytes(
        {"z": entry("U8", [4], 4, 8), "a": entry("U8", [4], 0, 4)}, EIGHT
    ),
    "a scalar": file_bytes({"a": entry("F64", [], 0, 8)}, EIGHT),
    "an empty tensor": file_bytes({"a": entry("F32", [0], 0, 0)}),
    "an empty tensor of two dimensions": file_bytes({"a": entry("F32", [0, 1 << 40], 0, 0)}),
    "empty tensors around another": file_bytes(
        {"a": entry("U8", [0], 0, 0), "b": entry("U8", [8], 0, 8), "c": entry("U8", [0], 8, 8)},
        EIGHT,
    ),
    "64 dimensions": file_bytes({"a": entry("U8", [1] * 63 + [8], 0, 8)}, EIGHT),
    "a name that looks like a path": file_bytes(
        {"../../etc/passwd": entry("U8", [8], 0, 8)}, EIGHT
    ),
    "a name outside ASCII": _file('{"härte.\\ud83d\\ude00":@}'),
    "names that differ in composition": file_bytes(
        {"e\u0301": entry("U8", [4], 0, 4), "\u00e9": entry("U8", [4], 4, 8)}, EIGHT
    ),
    "a name that only looks like a surrogate": _file('{"\\\\ud83d":@}'),
    "odd numbers of bytes before a wide tensor": file_bytes(
        {"a": entry("U8", [3], 0, 3), "b": entry("F32", [1], 3, 7), "c": entry("U8", [1], 7, 8)},
        EIGHT,
    ),
    **{
        f"dtype {name}": file_bytes(
            {"a": entry(name, [64 // dtype.bits * 2, 4], 0, 64)}, bytes(range(64))
        )
        for name, dtype in DTYPES.items()
        if 64 % dtype.bits == 0
    },
    **{
        f"dtype {dtype}": file_bytes({"a": entry(dtype, [4], 0, 3)}, b"abc")
        for dtype in ("F6_E2M3", "F6_E3M2")
    },
}
