"""The manifest: one spelling, a format that stays readable, and a reader that trusts nothing."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardkit import strict_json
from shardkit.errors import ManifestError
from shardkit.planning import Mesh
from shardkit.recipe.parse import load_recipe
from shardkit.shards import encode_manifest, hash_manifest, make_split_id
from shardkit.shards.manifest import MANIFEST_NAME, Manifest
from shardkit.shards.manifest_json import parse_manifest, read_manifest
from tests.helpers.split_helpers import merge_folder, reshard_folder, shard_name, split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source

GOLDEN = Path(__file__).parent / "golden" / "manifest-format-1.json"
BIG = 1 << 40
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SHA = "0" * 64
Table = Any


def tiny(folder: Path) -> Path:
    """Twelve query heads on two kv heads, so that four ranks replicate; two files with an index."""
    shapes = llama(heads=12, kv=2, head=2, ffn=7, vocab=11)
    config = {**llama_config(12, 2, 7), "tie_word_embeddings": False}
    return write_source(
        folder, config, specs_of(shapes), lambda at: f"model-{at % 2 + 1:05d}-of-00002.safetensors"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of `tiny` over two ranks."""
    base = tmp_path_factory.mktemp("manifest")
    split_folder(tiny(base / "tiny"), base / "shards", 2)
    return base / "shards"


@pytest.fixture(scope="module")
def sound(folder: Path) -> Table:
    """Its manifest as JSON values."""
    return json.loads((folder / MANIFEST_NAME).read_bytes())


def written(table: Table) -> bytes:
    return strict_json.encode_canonical(table) + b"\n"


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    data = (folder / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(data)
    assert encode_manifest(manifest) == data
    assert hash_manifest(manifest) == hashlib.sha256(data).hexdigest()
    assert parse_manifest(encode_manifest(manifest)) == manifest


def test_the_bytes_are_canonical_and_hold_no_float(folder: Path) -> None:
    data = (folder / MANIFEST_NAME).read_bytes()
    table = json.loads(data, parse_float=pytest.fail)
    assert written(table) == data


def test_a_split_returns_the_manifest_that_it_wrote(tmp_path: Path) -> None:
    manifest = split_folder(tiny(tmp_path / "tiny"), tmp_path / "shards", 4)
    assert read_manifest(tmp_path / "shards") == manifest


def test_files_are_what_the_manifest_says(folder: Path) -> None:
    manifest = read_manifest(folder)
    listed = {rank.name: rank.digest for rank in manifest.ranks} | dict(manifest.companion_files)
    assert {path.name for path in folder.iterdir()} == {*listed, MANIFEST_NAME}
    for name, digest in listed.items():
        data = (folder / name).read_bytes()
        assert (digest.size, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for tp_rank, rank in enumerate(manifest.ranks):
        data = (folder / rank.name).read_bytes()
        assert data.startswith(manifest.rank_header(manifest.mesh.rank(tp_rank)))
        for name, piece in rank.pieces.items():
            shard = manifest.placements[name].shard_spec(Mesh(2).rank(tp_rank))
            end = piece.offset + (shard.nbytes if shard else 0)
            assert hashlib.sha256(data[:end]).hexdigest().startswith(piece.prefix_sha256)


def test_the_first_format_is_still_read() -> None:
    manifest = parse_manifest(GOLDEN.read_bytes())
    assert manifest.tp_size == 4
    assert manifest.plan.count_local_units("kv_heads", manifest.plan.mesh.rank(3)) == 1
    assert manifest.placements[K_PROJ].spans(Mesh(4).rank(3)) == ((2, 4),)
    assert encode_manifest(manifest) == GOLDEN.read_bytes()


def golden_split(base: Path) -> Manifest:
    """The split whose manifest is the golden file."""
    recipe = load_recipe(GOLDEN.parent / "tiny.toml")
    return split_folder(tiny(base / "tiny"), base / "shards", 4, recipe)


def test_the_same_source_still_makes_the_golden_manifest(tmp_path: Path) -> None:
    # A difference here is a new format: keep the reader of the old one, and raise FORMAT.
    golden = parse_manifest(GOLDEN.read_bytes())
    manifest = replace(golden_split(tmp_path), shardkit=golden.shardkit)
    assert encode_manifest(manifest).decode() == GOLDEN.read_text()


@pytest.mark.parametrize("part", ["source", "recipe", "size", "layout"])
def test_a_split_id_names_source_recipe_size_and_layout(part: str, folder: Path) -> None:
    manifest = read_manifest(folder)
    plan, sample, recipe = manifest.plan, manifest.source.fingerprint, manifest.recipe_sha256
    if part == "source":
        sample = SHA
    elif part == "recipe":
        recipe = SHA
    elif part == "size":
        plan = plan.with_tp_size(1)
    else:
        plan = replace(plan, placements=plan.placements[1:])
    assert make_split_id(plan, sample, recipe) != manifest.split_id


def changed(*path: Any, to: Any) -> Callable[[Table], None]:
    """Set one value of the table."""

    def change(table: Table) -> None:
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = to

    return change


def without(*path: Any) -> Callable[[Table], None]:
    """Take one value of the table away."""

    def change(table: Table) -> None:
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("sha256", to=SHA),
        changed("sha256", to=0),
        changed("source", "id", to="another"),
        changed("module_attributes", 0, "module", to="other.*.self_attn"),
    ],
)
def test_what_nothing_else_checks_is_checked_by_the_manifests_own_digest(
    change: Callable[[Table], None], sound: Table, tmp_path: Path
) -> None:
    table = copy.deepcopy(sound)
    change(table)
    assert "not of its own sha256" in fault_of(written(table), tmp_path)


def section(name: str = K_PROJ, **fields: Any) -> Callable[[Table], None]:
    """Change fields of a tensor's first section."""
    return lambda table: table["tensors"][name]["sections"][0].update(fields)


def both(*changes: Callable[[Table], None]) -> Callable[[Table], None]:
    """Several changes."""

    def change_all(table: Table) -> None:
        for change in changes:
            change(table)

    return change_all


def add_rank(table: Table) -> None:
    table["ranks"].append(copy.deepcopy(table["ranks"][0]))


def swap_ranks(table: Table) -> None:
    table["ranks"].reverse()


def repeat_file(table: Table) -> None:
    files = table["source"]["files"]
    files[1]["name"] = files[0]["name"]


PIECE = ("ranks", 0, "pieces", NORM)
HOSTILE: dict[str, tuple[Callable[[Table], None], str]] = {
    "another format": (changed("format", to=2), "format 2; this shardkit reads format 1"),
    "no format": (without("format"), "format None"),
    "format true": (changed("format", to=True), "not in canonical form"),
    "format of a kind": (changed("format", to={"n": 1}), "format {'n': 1}"),
    "an extra key": (changed("extra", to=1), "manifest: has the keys"),
    "a missing key": (without("recipe"), "manifest: has the keys"),
    "an extra key below": (changed("source", "url", to="x"), "source: has the keys"),
    "a missing key below": (without("tensors", NORM, "dtype"), f"{NORM}: has the keys"),
    "a key with a new line": (changed("a\nb", to=1), "a\\nb"),
    "tp_size 0": (changed("mesh", "tp_size", to=0), "tp_size: is 0, not an integer of 1 to 1024"),
    "tp_size huge": (changed("mesh", "tp_size", to=BIG), "tp_size: is 1099511627776"),
    "tp_size float": (changed("mesh", "tp_size", to=2.0), "tp_size: is 2.0"),
    "tp_size true": (changed("mesh", "tp_size", to=True), "tp_size: is True"),
    "ep_size 2": (changed("mesh", "ep_size", to=2), "2 ranks, but"),
    "tp_size other": (changed("mesh", "tp_size", to=3), "2 ranks, but tp_size 3"),
    "tp_size 1024": (changed("mesh", "tp_size", to=1024), "2 ranks, but tp_size 1024"),
    "too many ranks": (add_rank, "3 ranks, but tp_size 2"),
    "ranks in another order": (swap_ranks, "rank 0 has the file"),
    "ranks no list": (changed("ranks", to={}), "ranks: is {}, not a list"),
    "an absolute name": (changed("ranks", 0, "file", to="/etc/passwd"), "'/etc/passwd' is not"),
    "a name above": (changed("ranks", 0, "file", to="../x"), "'../x' is not the name"),
    "a name with a new line": (changed("ranks", 0, "file", to="a\nb"), "'a\\nb' is not"),
    "a source file above": (changed("source", "files", 0, "name", to="../x"), "'../x'"),
    "an index elsewhere": (changed("source", "index", "name", to="/x"), "'/x'"),
    "a copied file above": (
        changed("companion_files", to={"..": {"size": 1, "sha256": SHA}}),
        "companion_files: '..' is not",
    ),
    "a copied manifest": (
        changed("companion_files", to={MANIFEST_NAME: {"size": 1, "sha256": SHA}}),
        "name of two files",
    ),
    "a copied rank": (
        changed("companion_files", to={shard_name(0, 2): {"size": 1, "sha256": SHA}}),
        "name of two files",
    ),
    "two source files of one name": (repeat_file, "is the name of two files"),
    "no source files": (
        both(changed("source", "files", to=[]), changed("tensors", to={})), "source: no files",
    ),
    "a negative offset": (changed(*PIECE, 0, to=-1), f"'{NORM}': is -1"),
    "another offset": (changed(*PIECE, 0, to=8), "its pieces are not the layout's"),
    "a piece too many": (changed("ranks", 0, "pieces", "x", to=[8, "0" * 16]), "its pieces"),
    "a piece too few": (without(*PIECE), "its pieces are not the layout's"),
    "a piece of three": (changed(*PIECE, to=[8, "0" * 16, 1]), "piece is not [offset, "),
    "a short prefix_sha256": (changed(*PIECE, 1, to="0"), "not 16 hex digits"),
    "a count of another piece": (
        changed("ranks", 0, "nonfinite", to={"x": 1}), "counts values of a piece that it does not",
    ),
    "a count of none": (changed("ranks", 0, "nonfinite", to={NORM: 0}), "0, not an integer of 1"),
    "no counts at all": (without("ranks", 0, "nonfinite"), "ranks 0: has the keys"),
    "a digest in upper case": (changed("ranks", 0, "sha256", to="A" * 64), "not 64 hex digits"),
    "a digest of another kind": (changed("recipe", "sha256", to=[SHA]), "not 64 hex digits"),
    "a size too large": (changed("ranks", 1, "size", to=9), "9 bytes, less than the layout's"),
    "a size beyond counting": (changed("ranks", 1, "size", to=1 << 63), "size: is 9223"),
    "a tensor no file holds": (
        changed("tensors", "x", to={}), "the source's files do not hold exactly",
    ),
    "a tensor two files hold": (
        changed("source", "files", 0, "tensors", 0, to=NORM), "do not hold exactly",
    ),
    "a tensor name that is a number": (
        changed("source", "files", 0, "tensors", 0, to=7), "tensors 0: is 7, not a string",
    ),
    "an unknown dtype": (changed("tensors", NORM, "dtype", to="F7"), f"{NORM}: no dtype 'F7'"),
    "a dtype that is a list": (changed("tensors", NORM, "dtype", to=["F32"]), "dtype: is ['F32']"),
    "an unknown style": (changed("tensors", NORM, "style", to="rows"), f"{NORM}: no style 'rows'"),
    "a style that is a table": (changed("tensors", NORM, "style", to={}), "style: is {}"),
    "a negative size": (changed("tensors", NORM, "shape", to=[-1]), "shape 0: is -1"),
    "a size too large for any": (changed("tensors", NORM, "shape", to=[1 << 49]), "shape 0: is"),
    "too many dimensions": (changed("tensors", NORM, "shape", to=[1] * 65), "too many dimensions"),
    "a dimension that is not there": (changed("tensors", K_PROJ, "dim", to=2), "dim: is 2"),
    "a dimension of a scalar": (
        both(changed("tensors", K_PROJ, "shape", to=[]), changed("tensors", K_PROJ, "dim", to=0)),
        f"{K_PROJ}: dim: is 0",
    ),
    "sections of no dimension": (changed("tensors", K_PROJ, "dim", to=-1), "its sections are not"),
    "a dimension of no sections": (changed("tensors", K_PROJ, "sections", to=[]), "its sections"),
    "sections that do not sum": (section(size=3), "its sections are not"),
    "sections of what is replicated": (
        changed("tensors", K_PROJ, "style", to="replicate"), "its sections are not",
    ),
    "a row that is shared": (section(O_PROJ, shared_by=12), "a sum would count it twice"),
    "a row that is whole": (section(O_PROJ, replicated=True), "a sum would count it twice"),
    "no units": (section(units=0), "sections 0: units: is 0"),
    "replicated as a number": (section(replicated=1), "replicated: is 1, not true or false"),
    "sharers not a multiple": (section(shared_by=13), f"{K_PROJ}: 13 units cannot share 2"),
    "fewer sharers than units": (section(shared_by=1), f"{K_PROJ}: 1 units cannot share 2"),
    "a gigantic repeat": (
        both(section(repeat=BIG, units=1, size=1), changed("tensors", K_PROJ, "shape", 0, to=BIG)),
        "stretches, more than the 4096 allowed",
    ),
    "a gigantic repeat of nothing": (
        both(section(repeat=BIG, size=0), changed("tensors", K_PROJ, "shape", 0, to=0)),
        "stretches, more than the 4096 allowed",
    ),
    "gigantic sharers": (section(shared_by=BIG), "stretches, more than the 4096 allowed"),
    "gigantic units": (
        both(section(units=BIG, size=0, shared_by=0), changed("tensors", K_PROJ, "shape", 0, to=0)),
        "its pieces are not the layout's",
    ),
    "a product that overflows": (section(repeat=1 << 47, units=1 << 47), "larger than the"),
    "an attribute of no unit": (
        changed("module_attributes", 0, "unit", to="x"), "'x' is not a unit",
    ),
    "an attribute of a tensor and a unit": (
        both(
            changed("module_attributes", 0, "unit", to="k_proj.weight"),
            changed("module_attributes", 0, "per_unit", to="heads"),
        ),
        "'k_proj.weight' is not a unit",
    ),
    "an attribute without a count": (
        changed("module_attributes", 0, "per_unit", to="vocab"), "'vocab' is not a unit with",
    ),
    "an argument of no unit": (
        changed("forward_arguments", to=[
            {"module": "m", "argument": "a", "dim": 0, "unit": "x", "outer": False}]),
        "'x' is not a unit",
    ),
    "a count that is a float": (changed("units", "heads", "count", to=12.0), "count: is 12.0"),
    "metadata of numbers": (
        changed("source", "files", 0, "metadata", to=[["n", 1]]), "metadata 0: is 1, not a string",
    ),
    "metadata of triples": (
        changed("source", "files", 0, "metadata", to=[["n", "1", "2"]]), "not a pair",
    ),
    "metadata that says a thing twice": (
        changed("source", "files", 0, "metadata", to=[["n", "1"], ["n", "1"]]), "not in canonical",
    ),
    "an index's metadata of lists": (
        changed("source", "index", "metadata", to={"n": []}), "metadata: 'n': is []",
    ),
    "another split_id": (changed("split_id", to=SHA), "split_id is not that of this source"),
    "another style": (changed("tensors", K_PROJ, "style", to="vocab"), "split_id is not that"),
    "another fingerprint": (changed("source", "fingerprint", to=SHA), "split_id is not that"),
}  # fmt: skip


def fault_of(data: bytes, tmp_path: Path) -> str:
    """What the reader says of a manifest, in one line."""
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / MANIFEST_NAME}: ")
    assert text.isprintable(), text
    assert len(text) < 600
    return text


@pytest.mark.timeout(30)  # each takes milliseconds, or would take years
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_soon_and_in_one_line(
    name: str, sound: Table, tmp_path: Path
) -> None:
    change, words = HOSTILE[name]
    table = copy.deepcopy(sound)
    change(table)
    assert words in fault_of(written(table), tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "", "\x1b[31m"])
def test_a_tensor_name_that_cannot_be_printed_is_refused(
    name: str, sound: Table, tmp_path: Path
) -> None:
    renamed = written(sound).replace(json.dumps(NORM).encode(), json.dumps(name).encode())
    assert "empty, too long or unprintable" in fault_of(renamed, tmp_path)


SPELLINGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "spaces": (lambda data: data.replace(b":", b": ", 1), "not in canonical form"),
    "no last line feed": (bytes.rstrip, "not in canonical form"),
    "another order": (
        lambda data: json.dumps(dict(reversed(json.loads(data).items()))).encode(),
        "not in canonical form",
    ),
    "an escape": (lambda data: data.replace(b"model.norm", b"model\\u002enorm"), "canonical"),
    "a duplicate key": (
        lambda data: data.replace(b'"format":1', b'"format":1,"format":1'), "duplicate key",
    ),
    "a duplicate key below": (
        lambda data: data.replace(b'"size":4', b'"size":4,"size":4', 1), "duplicate",
    ),
    "a number with an exponent": (
        lambda data: data.replace(b'"tp_size":2', b'"tp_size":2e0'), "tp_size: is 2.0",
    ),
    "not a number": (lambda data: data.replace(b'"tp_size":2', b'"tp_size":NaN'), "NaN"),
    "a number of many digits": (
        lambda data: data.replace(b'"tp_size":2', b'"tp_size":' + b"2" * 5000), "4300 digits",
    ),
    "cut short": (lambda data: data[:-9], "damaged or truncated"),
    "no text": (lambda data: b"\xff" + data, "not UTF-8"),
    "nothing": (lambda _: b"", "damaged or truncated"),
    "a list": (lambda _: b"[]", "format None"),
    "nested deeply": (lambda _: b"[" * 100_000, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_any_other_spelling_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    change, words = SPELLINGS[name]
    assert words in fault_of(change((folder / MANIFEST_NAME).read_bytes()), tmp_path)


def test_a_manifest_with_no_change_is_read(sound: Table) -> None:
    assert parse_manifest(written(sound)).tp_size == 2


def test_every_value_that_is_replaced_by_another_kind_is_refused(
    sound: Table, tmp_path: Path
) -> None:
    def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        below = [
            path
            for key, item in items
            if isinstance(item, dict | list)
            for path in paths(item, (*at, key))
        ]
        keys = value if isinstance(value, dict) else range(len(value))
        return below + [(*at, key) for key in keys]

    others: list[Any] = [None, 1.5, [[]], {"a": {}}]
    found = paths(sound)
    assert len(found) > 300
    for path in found[::5]:
        for other in others:
            table = copy.deepcopy(sound)
            changed(*path, to=other)(table)
            if table != sound:
                fault_of(written_loosely(table), tmp_path)


def written_loosely(table: Table) -> bytes:
    text = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"


def test_a_folder_without_a_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no manifest.json: not a shard folder"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="no such folder"):
        read_manifest(tmp_path / "none")


def test_a_manifest_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).symlink_to(folder / MANIFEST_NAME)
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_a_resharded_manifest_keeps_the_source(folder: Path, tmp_path: Path) -> None:
    old = read_manifest(folder)
    new = reshard_folder(folder, tmp_path / "out", 3)
    assert new.source == old.source
    assert new.split_id != old.split_id
    merge_folder(tmp_path / "out", tmp_path / "merged")
