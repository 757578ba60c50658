"""Damaged folders and configs: how each is laid, the exit code, and words of the error."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoint import test_index
from tests.checkpoint.test_refused_checkpoints import BAD, TRAPS
from tests.helpers.fixture_checkpoints import SMALL_CONFIG, small_checkpoint
from tests.helpers.raw_safetensors import INDEX, small_file, write_folder

SINGLE, MANIFEST = "model.safetensors", "manifest.json"
RANKS = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]


@dataclass(frozen=True)
class Damage:
    """`lay` makes the folder, or changes one that is sound."""

    lay: Callable[[Path], object]
    code: int
    words: tuple[str, ...] = ()


def files(content: Mapping[str, Any]) -> Callable[[Path], object]:
    """A folder of these files, and a config.json unless it is None."""

    def lay(folder: Path) -> None:
        write_folder(folder, {n: data for n, data in content.items() if data is not None})
        for name in [name for name, data in content.items() if data is None]:
            (folder / name).unlink()

    return lay


def trap(lay: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: lay(write_folder(folder, {}))


def _sparse(name: str, size: int) -> Callable[[Path], object]:
    def lay(folder: Path) -> None:
        (small_checkpoint(folder) / name).touch()
        os.truncate(folder / name, size)

    return lay


def _bound(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(write_folder(folder, {}))  # a socket's path is at most a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(SINGLE)
    finally:
        os.chdir(here)


def _secret(folder: Path) -> None:
    (small_checkpoint(folder) / "tokenizer.json").symlink_to("/etc/passwd")


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def lay(folder: Path) -> None:
        (small_checkpoint(folder) / name).unlink()
        make(folder / name)

    return lay


def _without_layer(number: int) -> Callable[[Path], object]:
    """The small Llama of two layers, one of them nowhere, and the index none the wiser."""

    def lay(folder: Path) -> None:
        from tests.helpers.fixture_checkpoints import small_specs
        from tests.helpers.synthetic_checkpoints import file_of

        held = [s for s in small_specs() if f".layers.{number}." not in s.name]
        write_folder(folder, {"config.json": SMALL_CONFIG, SINGLE: file_of(held)})

    return lay


SOURCES: dict[str, Damage] = {
    **{name: Damage(files(content), 3, words) for name, (content, words) in BAD.items()},
    **{name: Damage(trap(lay), 3, words) for name, (lay, words) in TRAPS.items()},
    **{
        f"index: {name}": Damage(files({INDEX: content}), 3, words)
        for name, (content, words) in test_index.BAD.items()
    },
    "an index of a million commas": Damage(
        files({INDEX: '{"weight_map":{"a":[' + "1," * 3_000_000 + "1]}}"}), 3, ("commas",)
    ),
    "an index of 65 MB": Damage(_sparse(INDEX, 65 << 20), 3, (INDEX, "more than")),
    "a config of 5 MB": Damage(_sparse("config.json", 5 << 20), 3, ("config.json", "more than")),
    "an index that is a folder": Damage(_replaced(INDEX, Path.mkdir), 3, (INDEX, "not a regular")),
    "a config that is a folder": Damage(
        _replaced("config.json", Path.mkdir), 3, ("config.json", "not a regular")
    ),
    "a config linked to a device": Damage(
        _replaced("config.json", lambda path: path.symlink_to("/dev/zero")), 3, ("/dev/zero",)
    ),
    "a socket as weights": Damage(_bound, 3, (SINGLE,)),
    "a tokenizer linked to a secret": Damage(_secret, 3, ("tokenizer.json", "/etc/passwd")),
    "a tokenizer of 257 MB": Damage(_sparse("tokenizer.json", 257 << 20), 3, ("more than",)),
    "a terabyte of nothing as weights": Damage(
        _sparse("model-00001-of-00002.safetensors", 1 << 40), 3, ("extended",)
    ),
    "no first layer": Damage(_without_layer(0), 3, ("num_hidden_layers is 2", "layers.0")),
    "no last layer": Damage(_without_layer(1), 3, ("num_hidden_layers is 2", "layers.1")),
    **{
        f"only {name}": Damage(files({name: small_file("a")}), 3, ("safetensors",))
        for name in ("pytorch_model.pt", "model.ckpt", "tf_model.h5", "flax_model.msgpack",
                     "model.npz", "model.gguf", ".metadata", "__0_0.distcp")
    },
}  # fmt: skip


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A manifest changed as a program would."""

    def lay(folder: Path) -> None:
        table = json.loads((folder / MANIFEST).read_bytes())
        change(table)
        (folder / MANIFEST).write_text(json.dumps(table))

    return lay


def _edit_mesh(**sizes: object) -> Callable[[Path], object]:
    return _edit(lambda table: table["mesh"].update(sizes))


def _rewrite(change: Callable[[bytes], bytes], name: str = MANIFEST) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _swap(folder: Path) -> None:
    (folder / RANKS[0]).rename(folder / "spare")
    (folder / RANKS[1]).rename(folder / RANKS[0])
    (folder / "spare").rename(folder / RANKS[1])


def _link_out(name: str) -> Callable[[Path], object]:
    def lay(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return lay


def _fifo(name: str) -> Callable[[Path], object]:
    def lay(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return lay


# Changes to a sound shard folder of two ranks; the code is that of a merge or a reshard.
SHARDS: dict[str, Damage] = {
    "no manifest": Damage(lambda folder: (folder / MANIFEST).unlink(), 3, (MANIFEST,)),
    "manifest empty": Damage(_rewrite(lambda data: b""), 3, (MANIFEST,)),
    "manifest cut": Damage(_rewrite(lambda data: data[:-9]), 3, (MANIFEST,)),
    "manifest a list": Damage(_rewrite(lambda data: b"[]"), 3, (MANIFEST,)),
    "manifest extended": Damage(_rewrite(lambda data: data + b"{}"), 3, (MANIFEST,)),
    "manifest with a key twice": Damage(
        _rewrite(lambda data: b'{"format":1,' + data.lstrip()[1:]), 3, (MANIFEST, "duplicate")
    ),
    "manifest with a million lists": Damage(
        _rewrite(lambda data: b"[" + b"[]," * 6_000_000 + b"[]]"), 3, (MANIFEST, "commas")
    ),
    "manifest of a FIFO": Damage(_fifo(MANIFEST), 3, (MANIFEST, "not a regular")),
    "manifest linked out": Damage(_link_out(MANIFEST), 3, (MANIFEST,)),
    "tp_size 0": Damage(_edit_mesh(tp_size=0), 3, ("tp_size",)),
    "tp_size 3": Damage(_edit_mesh(tp_size=3), 3, (MANIFEST,)),
    "tp_size of 10^9": Damage(_edit_mesh(tp_size=10**9), 3, ("tp_size",)),
    "tp_size a string": Damage(_edit_mesh(tp_size="2"), 3, ("tp_size",)),
    "an unknown key": Damage(_edit(lambda table: table.update(more=1)), 3, ("more",)),
    "no first file": Damage(lambda folder: (folder / RANKS[0]).unlink(), 3, (RANKS[0], "missing")),
    "files swapped": Damage(_swap, 3, ("is the file of rank '1'",)),
    "one file twice": Damage(
        lambda folder: shutil.copy(folder / RANKS[0], folder / RANKS[1]), 3, ("rank '0', renamed",)
    ),
    "a file linked out": Damage(_link_out(RANKS[1]), 3, (RANKS[1],)),
    "a file of a FIFO": Damage(_fifo(RANKS[1]), 3, (RANKS[1], "not a regular")),
    "a file cut": Damage(_rewrite(lambda data: data[:-1], RANKS[0]), 3, (RANKS[0], "truncated")),
    "a file extended": Damage(
        _rewrite(lambda data: data + b"\0", RANKS[0]), 3, (RANKS[0], "extended")
    ),
    "a byte changed": Damage(
        _rewrite(lambda data: data[:-1] + bytes([data[-1] ^ 1]), RANKS[1]), 4, (RANKS[1],)
    ),
    "a byte of the header changed": Damage(
        _rewrite(lambda data: data[:20] + b"~" + data[21:], RANKS[1]), 3, (RANKS[1],)
    ),
    "config.json changed": Damage(
        _rewrite(lambda data: data.replace(b"llama", b"lama2"), "config.json"), 3, ("config.json",)
    ),
}


def config(**fields: Any) -> Callable[[Path], object]:
    """The small Llama with fields of its config changed; None leaves one out."""

    def lay(folder: Path) -> None:
        small_checkpoint(folder, fields)

    return lay


def text(change: Callable[[str], str]) -> Callable[[Path], object]:
    """The small Llama with the text of its config changed."""

    def lay(folder: Path) -> None:
        path = small_checkpoint(folder) / "config.json"
        path.write_text(change(path.read_text()))

    return lay


def _first(start: str) -> Callable[[Path], object]:
    return text(lambda told: start + told)


def _added(more: str) -> Callable[[Path], object]:
    return text(lambda told: told[:-1] + "," + more + "}")


BIG = 10**12
CONFIGS: dict[str, Damage] = {
    **{
        f"{field} {value!r}": Damage(config(**{field: value}), 3, (field,))
        for field, values in {
            "num_hidden_layers": (-1, 0, 1, 3, 1000, 10_001, 10**6, 10**9, "2", 2.0, True, [3]),
            "hidden_size": (-1, 0, 17, BIG, "16", 1.5, True),
            "vocab_size": (0, -1, 10**15, "63"),
            "num_attention_heads": (0, -4, 10**9, "4", 4.5, True),
            "num_key_value_heads": (0, -1, "2", BIG),
            "head_dim": (0, -8, BIG, 1e300),
            "max_position_embeddings": (BIG, -BIG),
            "num_labels": (BIG,),
            "num_local_experts": (10**9,),
            "pad_token_id": (1 << 62,),
        }.items()
        for value in values
    },
    "heads that divide nothing": Damage(config(num_attention_heads=3), 1, ("cannot share",)),
    "kv heads that divide nothing": Damage(config(num_key_value_heads=3), 1, ("3",)),
    "more kv heads than heads": Damage(config(num_key_value_heads=8), 1, ()),
    "a nested count of layers": Damage(
        config(text_config={"num_hidden_layers": 99}), 3, ("num_hidden_layers is 99",)
    ),
    "a nested count of 10^9": Damage(
        config(vision_config={"depth": 10**9}), 3, ("depth", "1000000000")
    ),
    "a list of depths": Damage(config(depths=[2, 10**9]), 3, ("depths",)),
    "epsilon NaN": Damage(_added('"rms_norm_eps":NaN'), 3, ("NaN",)),
    "theta Infinity": Damage(_added('"rope_theta":Infinity'), 3, ("Infinity",)),
    "theta -Infinity": Damage(_added('"rope_theta":-Infinity'), 3, ("Infinity",)),
    "theta 1e999": Damage(_added('"rope_theta":1e999'), 3, ("too large",)),
    "5000 digits": Damage(_added('"x":' + "9" * 5000), 3, ("digits",)),
    "a key twice": Damage(_added('"hidden_size":16'), 3, ("duplicate key 'hidden_size'",)),
    "a key twice, nested": Damage(_added('"r":{"a":1,"a":2}'), 3, ("duplicate key 'a'",)),
    "half a surrogate pair": Damage(_added('"r":"\\ud800"'), 3, ("surrogate",)),
    "a comma too many": Damage(text(lambda told: told[:-1] + ",}"), 3, ("damaged",)),
    "a comment": Damage(_first("// model\n"), 3, ("damaged",)),
    "a byte order mark": Damage(_first("\ufeff"), 3, ("config.json",)),
    "single quotes": Damage(text(lambda told: told.replace('"', "'")), 3, ("damaged",)),
    "cut in half": Damage(text(lambda told: told[: len(told) // 2]), 3, ("damaged",)),
    "two objects": Damage(text(lambda told: told + told), 3, ("damaged",)),
    "nested 100 000 deep": Damage(_added('"r":' + "[" * 100_000), 3, ("nested",)),
    "no model_type": Damage(config(model_type=None), 1, ("no recipe",)),
    "model_type a number": Damage(config(model_type=3), 1, ("no recipe",)),
    "model_type a path": Damage(config(model_type="../../x"), 1, ("no recipe",)),
    "model_type with a line break": Damage(config(model_type="a\nb"), 1, ("no recipe",)),
    "model_type with an escape": Damage(config(model_type="\x1b[31m"), 1, ("no recipe",)),
    "a million layer types": Damage(
        _added('"layer_types":[' + '"a",' * 900_000 + '"a"]'), 0
    ),
    "auto_map": Damage(
        config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}), 0
    ),
    "auto_map of another repository": Damage(
        config(**{"auto_map": {"AutoConfig": "org/evil--evil.Config"}, "trust_remote_code": True}),
        0,
    ),
    "a kernel for attention": Damage(config(attn_implementation="evil/kernel"), 0),
    "a kernel for attention, inner": Damage(
        config(_attn_implementation_internal="evil/kernel", experts_implementation="evil/moe"), 0
    ),
    "weights elsewhere": Damage(config(transformers_weights="../other.safetensors"), 0),
}  # fmt: skip
INERT = [name for name, damage in CONFIGS.items() if damage.code == 0]
