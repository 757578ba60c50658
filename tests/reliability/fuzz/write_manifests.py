"""Write the corpus's manifests anew, as a change of their format needs.

    python -m tests.reliability.fuzz.write_manifests

Each is of a small split, and holds something that the reader treats apart: two ranks, kv heads
shared by the query heads, merged blocks, rules for modules, an index, numbers that are not finite.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from shardkit.recipe.parse import parse_recipe
from shardkit.shards.manifest import MANIFEST_NAME
from shardkit.tensor import TensorSpec
from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import write_source
from tests.reliability.fuzz.targets import SEEDS

RECIPE = """
model_types = ["t"]
vocab = ["v"]
[units]
heads = "heads"
kv = { count = "kv", shared_by = "heads" }
[column]
q = "heads"
k = "kv"
qkv = "2 heads + kv"
[row]
o = "heads"
"""
RULES = """
[module_attributes]
"l.*" = { groups = "heads/kv", size = "heads", width = "q.weight" }
[forward_arguments]
"l.*" = { alibi = { dim = 1, axis = "* heads" } }
[joint_sums]
"l.*" = { of = ["o", "p"], at = "p" }
"""


@dataclass(frozen=True)
class Seed:
    """A split: its tensors' shapes, its config's counts, and what is special of it."""

    shapes: dict[str, tuple[int, ...]]
    heads: int
    kv: int
    tp_size: int
    dtype: str = "BF16"
    rules: str = ""
    file: str = "model.safetensors"
    nonfinite: bool = False


COLUMN_AND_ROW: dict[str, tuple[int, ...]] = {"q": (6, 2), "o": (2, 6)}
MANIFESTS = {
    "blocks": Seed({"qkv": (30,)}, 4, 2, 2, dtype="U8"),
    "nonfinite": Seed(COLUMN_AND_ROW, 3, 1, 2, nonfinite=True),
    "one": Seed({"q": (4, 2)}, 2, 1, 1),
    "rules": Seed({"k": (2,)}, 4, 1, 1, rules=RULES),
    "shared": Seed({"k": (2, 2)}, 4, 1, 2, file="model-00001-of-00001.safetensors"),
    "two-ranks": Seed(COLUMN_AND_ROW, 3, 1, 2),
}


def write_manifest(name: str, seed: Seed, folder: Path) -> None:
    """Split a seed's checkpoint in `folder`, and keep the manifest."""
    config = {"model_type": "t", "heads": seed.heads, "kv": seed.kv}
    specs = [TensorSpec(tensor, seed.dtype, shape) for tensor, shape in seed.shapes.items()]
    indexed = seed.file != "model.safetensors"
    source = write_source(folder / "s", config, specs, (lambda _: seed.file) if indexed else None)
    if seed.nonfinite:
        weights = source / seed.file
        weights.write_bytes(weights.read_bytes()[:-4] + b"\x80\x7f\xc0\x7f")  # infinity and NaN
    recipe = parse_recipe("r", (RECIPE + seed.rules).encode())
    split_folder(source, folder / "out", seed.tp_size, recipe)
    (SEEDS / "manifest" / name).write_bytes((folder / "out" / MANIFEST_NAME).read_bytes())


def main() -> None:
    """Write every manifest, and one that says what none may: a scalar that is gathered."""
    for name, seed in MANIFESTS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_manifest(name, seed, Path(folder))
    scalar = (SEEDS / "manifest/one").read_bytes()
    for old, new in {b'"column"': b'"gather"', b"[4,2]": b"[]", b'"dim":0': b'"dim":-1'}.items():
        assert old in scalar
        scalar = scalar.replace(old, new)
    (SEEDS / "manifest/gather-of-a-scalar").write_bytes(scalar)


if __name__ == "__main__":
    main()
