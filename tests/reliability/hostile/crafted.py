"""Safetensors files made to be refused, or to be read as they are: more than test_header has.

Each is a name, the bytes, the exit code of a split of a folder that holds it, and words of the
error.  Exit code 1 is a file that is sound, and whose tensors no rule of the recipe names.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from shardkit.checkpoint.header import MAX_TENSORS, encode_header
from shardkit.tensor import TensorSpec
from tests.helpers.header_cases import BAD, EIGHT, F32, GOOD
from tests.helpers.raw_safetensors import entry, file_bytes
from tests.helpers.synthetic_checkpoints import llama, tensor_bytes


@dataclass(frozen=True)
class Crafted:
    """A weights file.  `data` is made when it is wanted: some are large."""

    data: Callable[[], bytes]
    code: int
    words: tuple[str, ...] = ()


def model(**dtypes: str) -> bytes:
    """The small Llama, tensors whose names end in a key of another dtype than BF16."""
    specs = []
    for name, shape in llama().items():
        key = next((key for key in dtypes if name.removesuffix(".weight").endswith(key)), "")
        specs.append(TensorSpec(name, dtypes.get(key, "BF16"), shape))
    return encode_header(specs, {"format": "pt"}) + b"".join(map(tensor_bytes, specs))


def _named(name: str) -> bytes:
    return file_bytes({name: entry("F32", [2], 0, 8)}, EIGHT)


def _many(count: int) -> bytes:
    text = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return file_bytes(b"{" + b",".join(text % at for at in range(count)) + b"}")


def _changed(old: bytes, new: bytes) -> bytes:
    """The small Llama with one text of its header replaced by one as long."""
    assert len(old) == len(new)
    data = model()
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


def _nan() -> bytes:
    specs = [TensorSpec(name, "BF16", shape) for name, shape in llama().items()]
    return encode_header(specs, {}) + b"\xff" * sum(spec.nbytes for spec in specs)


# JSON that lenient readers take, or that strict ones have choked on.
ODD = [
    "nul", "+1", "01", "1.", "0x10", "'a'", r'"\x"', '"a\tb"', "[1,]", '{"a":1,}', "{a:1}",
    '"\\ud800"', "-Infinity", '"open', "[1 2]", "1e", "--1", "\ufeff1",
]  # fmt: skip
ODD_FILES = {
    f"{place}: {odd!a}": Crafted(partial(file_bytes, text.replace("@", odd), EIGHT), 3)
    for odd in ODD
    for place, text in {
        "the header": "@",
        "an entry": '{"a":@}',
        "metadata": '{"__metadata__":{"k":@},"a":' + F32 + "}",
    }.items()
}
NAMES = {
    "../../x": 1, "/etc/passwd": 1, "CON": 1, "a b": 1, "%s%n": 1, "${HOME}": 1, "`id`": 1,
    "<script>": 1, "'; DROP TABLE": 1, "\u212b": 1, "e\u0301": 1, "\U0001f469\u200d\U0001f52c": 3,
    "\u202eabc": 3, "\u2066a": 3, "\ufeffa": 3, "a\x7f": 3, "a\x00": 3, "a\r": 3, "\u2028": 3,
    "\x1b]0;t\x07": 3, "\ufff9a": 3, "\x85": 3,
}  # fmt: skip
MADE: dict[str, Crafted] = {
    "a model": Crafted(model, 0),
    "weights that are all NaN": Crafted(_nan, 0),
    "float64 norms": Crafted(lambda: model(layernorm="F64", norm="F64"), 0),
    "8-bit floats of every kind": Crafted(
        lambda: model(q_proj="F8_E4M3", k_proj="F8_E5M2", gate_proj="F8_E4M3FNUZ",
                      up_proj="F8_E5M2FNUZ", down_proj="F8_E8M0"), 0,
    ),
    "4-bit floats cut between bytes": Crafted(lambda: model(q_proj="F4", lm_head="F4"), 0),
    "complex numbers": Crafted(lambda: model(up_proj="C64"), 0),
    "6-bit floats cut within bytes": Crafted(
        lambda: model(down_proj="F6_E2M3"), 1, ("down_proj", "do not end on a byte"),
    ),
    "4-bit floats cut within bytes": Crafted(
        lambda: model(down_proj="F4"), 1, ("down_proj", "do not end on a byte"),
    ),
    "integers as weights": Crafted(lambda: model(up_proj="I8"), 3, ("up_proj", "is I8")),
    "booleans as weights": Crafted(lambda: model(lm_head="BOOL"), 3, ("lm_head", "is BOOL")),
    "integers as a bias": Crafted(
        lambda: _changed(b'q_proj.bias":{"dtype":"BF16"', b'q_proj.bias":{"dtype": "I16"'), 3,
        ("q_proj.bias", "is I16"),
    ),
    "a shape turned over": Crafted(
        lambda: _changed(b"[24,32]", b"[32,24]"), 1, ("gate_proj",)
    ),
    "a tensor under another name": Crafted(
        lambda: _changed(b"layers.0.mlp.up_proj", b"layers.0.mlp.uq_proj"), 1, ("uq_proj",)
    ),
    "a layer too high": Crafted(
        lambda: _changed(b"layers.0.mlp.up_proj", b"layers.9.mlp.up_proj"), 3,
        ("num_hidden_layers is 1", "layers.9"),
    ),
    "more tensors than are allowed": Crafted(
        lambda: _many(MAX_TENSORS + 1), 3, (f"{MAX_TENSORS + 1} tensors",),
    ),
    "700 000 empty tensors": Crafted(lambda: _many(700_000), 3, ("700000 tensors",)),
    "a million lists in metadata": Crafted(
        lambda: file_bytes(b'{"__metadata__":{"k":[' + b"[]," * 3_000_000 + b"[]]}}"), 3,
        ("commas and brackets",),
    ),
    "lists of numbers as a shape": Crafted(
        lambda: file_bytes(b'{"a":{"shape":[' + b"1," * 5_000_000 + b"1]}}"), 3,
        ("commas and brackets",),
    ),
    "wide characters in 40 MB": Crafted(
        lambda: file_bytes('{"__metadata__":{"k":"\U0001f600'.encode() + b"a" * 40_000_000
                           + b'"}}'), 3, ("outside ASCII",),
    ),
    "escaped wide characters in 40 MB": Crafted(
        lambda: file_bytes(b'{"__metadata__":{"k":"\\ud83d\\ude00' + b"a" * 40_000_000 + b'"}}'),
        3, ("outside ASCII",),
    ),
    "a header that counts the whole file": Crafted(
        lambda: struct.pack("<Q", len(model())) + model()[8:], 3, ("truncated",)
    ),
    "a header length in the other byte order": Crafted(
        lambda: struct.pack(">Q", 64) + model()[8:], 3, ("not a safetensors file",)
    ),
    "a GGUF file": Crafted(lambda: b"GGUF\3\0\0\0" + bytes(64), 3, ("not a safetensors file",)),
    "an HDF5 file": Crafted(lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), 3, ("not a safetensors",)),
    "a numpy file": Crafted(lambda: b"\x93NUMPY\1\0v\0{'descr'", 3, ("not a safetensors file",)),
    "a gzip of a file": Crafted(lambda: b"\x1f\x8b\x08\0\0\0\0\0" + bytes(9), 3, ("safetensors",)),
}  # fmt: skip
FILES: dict[str, Crafted] = {
    **{name: Crafted(partial(bytes, data), 3, words) for name, (data, words) in BAD.items()},
    **{
        f"sound: {name}": Crafted(partial(bytes, data), 0 if data[8:10] == b"{}" else 1)
        for name, data in GOOD.items()
        if not name.startswith(("dtype", "no tensors", "only metadata"))
    },
    **ODD_FILES,
    **{f"named {name!a}": Crafted(partial(_named, name), code) for name, code in NAMES.items()},
    **MADE,
}
