"""Pickled weights made to run code, fill memory or be read wrongly, written byte by byte.

The pickles are texts of opcodes: c names a callable, ( ... t a tuple of arguments, R calls.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

Members = dict[str, bytes]


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls something with a string when it is read."""
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


def _run(marker: str) -> dict[str, bytes]:
    shell, code = f"touch {marker}", f'open("{marker}","w")'
    return {
        f"{module}.{name}": call(module, name, argument)
        for module, name, argument in [
            ("os", "system", shell), ("posix", "system", shell), ("subprocess", "getoutput", shell),
            ("subprocess", "check_output", shell), ("builtins", "exec", code),
            ("builtins", "eval", code), ("__builtin__", "eval", code), ("builtins", "open", marker),
            ("builtins", "__import__", "antigravity"), ("importlib", "import_module", "this"),
            ("runpy", "run_path", marker), ("timeit", "timeit", code), ("cProfile", "run", code),
            ("pdb", "run", code), ("code", "interact", code), ("shutil", "rmtree", marker),
            ("os", "mkdir", marker), ("os", "popen", shell), ("pty", "spawn", marker),
            ("torch", "load", marker), ("torch.jit", "load", marker), ("torch.hub", "load", marker),
            ("torch.serialization", "load", marker), ("numpy", "load", marker),
            ("pickle", "loads", marker), ("_pickle", "loads", marker), ("ctypes", "CDLL", marker),
            ("webbrowser", "open", marker), ("logging", "FileHandler", marker),
            ("torch.utils.cpp_extension", "load", marker), ("operator", "methodcaller", "system"),
            ("pathlib", "Path", marker), ("io", "FileIO", marker), ("tempfile", "mkdtemp", marker),
        ]
    }  # fmt: skip


def code_running(marker: str) -> dict[str, bytes]:
    """Pickles that would leave `marker` behind if what they name were called."""
    chained = f"cbuiltins\ngetattr\n(cos\npath\nS'join'\ntR(S'{marker}'\ntR.".encode()
    built = f"(S'touch {marker}'\nios\nsystem\n.".encode()  # the opcode i: module, name, instance
    named = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(marker) + 6])
    named += b"touch " + marker.encode() + b"\x85R."
    return _run(marker) | {"getattr": chained, "instance": built, "stack global": named}


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def members(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(content: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(pickle: bytes) -> bytes:
    """A sound archive but for its pickle."""
    return packed(members(PLAIN) | {"archive/data.pkl": pickle})


PLAIN = saved({"a": torch.arange(4.0), "b": torch.ones(2, 3)})
CONTENT = members(PLAIN)
AT = PLAIN.index(struct.pack("<4f", 0, 1, 2, 3))  # where the bytes of `a` are


def _renamed(old: str, new: str) -> bytes:
    return packed({new if name == old else name: data for name, data in CONTENT.items()})


def _more(name: str, data: bytes = b"x") -> bytes:
    return packed(CONTENT | {name: data})


def _twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in [*CONTENT.items(), ("archive/data/0", bytes(16))]:
            archive.writestr(name, data)
    return buffer.getvalue()


def _flag(bit: int) -> bytes:
    """The first member's entry of the directory, and its header, with a flag set."""
    data = bytearray(PLAIN)
    data[PLAIN.index(b"PK\x01\x02") + 8] |= bit
    data[6] |= bit
    return bytes(data)


def _shared(count: int) -> bytes:
    whole = torch.arange(100_000.0)
    return saved({f"t{at}": whole for at in range(count)})


# An archive that must be refused, and words of why.
BAD: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "empty": (lambda: b"", ("too short",)),
    "a zip cut short": (lambda: PLAIN[:-1], ("truncated",)),
    "a zip cut in half": (lambda: PLAIN[: len(PLAIN) // 2], ("truncated",)),
    "a zip extended": (lambda: PLAIN + b"\0", ("extended",)),
    "a comment": (lambda: PLAIN[:-2] + b"\x04\0abcd", ("extended",)),
    "text before the zip": (lambda: b"#!/bin/sh\n" + PLAIN, ("not the zip",)),
    "two zips": (lambda: PLAIN + packed(CONTENT), ("",)),
    "an empty zip": (lambda: packed({}), ("not the zip",)),
    "a safetensors file": (lambda: b"\x10" + bytes(7) + b'{"a":{}}' + bytes(30), ("not the zip",)),
    "a bit of the data flipped": (
        lambda: PLAIN[:AT] + b"\1" + PLAIN[AT + 1 :], ("checksum", "data/0"),
    ),
    "compressed members": (lambda: packed(CONTENT, zipfile.ZIP_DEFLATED), ("compressed",)),
    "200 MB of zeros compressed": (
        lambda: packed(CONTENT | {"archive/data/0": bytes(200 << 20)}, zipfile.ZIP_DEFLATED),
        ("compressed",),
    ),
    "a member above": (lambda: _more("../../evil"), ("evil", "none that torch.save writes")),
    "a member above, inside": (lambda: _more("archive/../evil"), ("evil",)),
    "an absolute member": (lambda: _more("/tmp/evil"), ("evil",)),
    "a member of Windows": (lambda: _more("archive\\data\\1"), ("none that torch.save writes",)),
    "a member of another archive": (lambda: _more("other/data/7"), ("more than one archive",)),
    "TorchScript": (lambda: _more("archive/code/__torch__.py"), ("TorchScript",)),
    "TorchScript's constants": (lambda: _more("archive/constants.pkl"), ("TorchScript",)),
    "a folder": (lambda: _more("archive/data/"), ("none that torch.save writes",)),
    "a member twice": (_twice, ("of one name",)),
    "an encrypted member": (lambda: _flag(1), ("encrypted",)),
    "no pickle": (lambda: _renamed("archive/data.pkl", "archive/data/9"), ("no data.pkl",)),
    "a pickle of 17 MB": (lambda: with_pickle(bytes(17 << 20)), ("no data.pkl",)),
    "no storage": (
        lambda: _renamed("archive/data/0", "archive/data/9"), ("cannot be unpickled",),
    ),
    "a record shorter than its tensor": (
        lambda: packed(CONTENT | {"archive/data/0": bytes(4)}), ("cannot be unpickled",),
    ),
    "a list": (lambda: saved([torch.ones(2)]), ("holds a list",)),
    "a tensor": (lambda: saved(torch.ones(2)), ("holds a Tensor",)),
    "a number": (lambda: saved({"a": torch.ones(2), "epoch": 3}), ("'epoch'", "int")),
    "a nested table": (lambda: saved({"model": {"a": torch.ones(2)}}), ("'model'", "dict")),
    "a number as a name": (lambda: saved({1: torch.ones(2)}), ("holds 1",)),
    "an empty name": (lambda: saved({"": torch.ones(2)}), ("empty",)),
    "the name of a header's metadata": (
        lambda: saved({"__metadata__": torch.ones(2)}), ("reserved",),
    ),
    "a name with an escape code": (lambda: saved({"\x1b[31m": torch.ones(2)}), ("unprintable",)),
    "a sparse tensor": (lambda: saved({"a": torch.eye(3).to_sparse()}), ("'a'", "not a plain")),
    "a quantized tensor": (
        lambda: saved({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}),
        ("'a'", "not a plain"),
    ),
    "a tensor of no data": (lambda: saved({"a": torch.ones(3, device="meta")}), ("'a'",)),
    "complex numbers of 128 bits": (
        lambda: saved({"a": torch.ones(3, dtype=torch.complex128)}), ("'a'", "complex128"),
    ),
    "four terabytes of one number": (
        lambda: saved({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}), ("'a'", "4398046511104"),
    ),
    "one row many times": (
        lambda: saved({"a": torch.ones(1, 64).expand(1 << 16, 64)}), ("'a'", "256 are stored"),
    ),
    "twenty names for the same bytes": (lambda: _shared(20), ("too many share",)),
    "two gigabytes of nothing": (
        lambda: with_pickle(b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR."), ("memory",),
    ),
    "a pickle that never ends": (lambda: with_pickle(b"(" * 1000), ("cannot be unpickled",)),
    "an empty pickle": (lambda: with_pickle(b""), ("cannot be unpickled",)),
    "a persistent name of nothing": (lambda: with_pickle(b"Px\n."), ("cannot be unpickled",)),
    "an opcode there is none of": (lambda: with_pickle(b"\xff."), ("cannot be unpickled",)),
}  # fmt: skip


def _good() -> dict[str, dict[str, torch.Tensor]]:
    tied = torch.arange(6.0).reshape(2, 3)
    grown = torch.arange(24.0).reshape(4, 6)
    return {
        "plain": {"a": torch.arange(4.0), "b": torch.ones(2, 3)},
        "tied": {"a": tied, "b": tied, "c": tied[1:]},
        "turned and cut": {"a": grown.t(), "b": grown[:, 1:3], "c": grown[::2]},
        "small dtypes": {
            "bf16": torch.arange(5.0).bfloat16(), "f16": torch.ones(3).half(),
            "f8": torch.ones(3).to(torch.float8_e4m3fn), "bool": torch.tensor([True, False]),
            "i64": torch.arange(3), "c64": torch.ones(2, dtype=torch.complex64),
        },
        "odd shapes": {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "b": torch.ones(1)},
        "parameters": {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.ones(3)},
        "conjugate": {"a": torch.tensor([1 + 2j, 3 - 1j]).conj()},
    }  # fmt: skip


GOOD = _good()
