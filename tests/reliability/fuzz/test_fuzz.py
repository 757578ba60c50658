"""The fuzzed readers: every seed, a few seconds of each target, and oracles that notice a fault."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from safetensors import SafetensorError

from shardkit import strict_json
from shardkit.checkpoint import header, index
from shardkit.checkpoint.header import Header, parse_header
from shardkit.recipe import counts as config
from shardkit.recipe import parse as recipe_file
from shardkit.shards import manifest_json as manifest_file
from tests.reliability.fuzz import oracles
from tests.reliability.fuzz.run import Result, fuzz, report, runs
from tests.reliability.fuzz.targets import SEEDS, TARGETS

SECONDS = 2  # for each reader
NO_ATHERIS = "atheris is not installed (pip install 'shardkit[dev]')"
REFUSED = {
    "config-numbers", "header-duplicate", "header-hole", "header-minus-zero", "header-pointer",
    "index-bin", "index-nested", "index-outside", "manifest-gather-of-a-scalar",
    "recipe-line-break-in-a-key",
}  # fmt: skip
FILES = [path for name in TARGETS for path in sorted((SEEDS / name).iterdir())]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_seed_is_read_rightly_or_refused(path: Path) -> None:
    accepted = TARGETS[path.parent.name].check(path.read_bytes())
    assert accepted != (f"{path.parent.name}-{path.name}" in REFUSED)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_seeds_get_past_a_readers_first_checks(name: str) -> None:
    target, rng = TARGETS[name], Random(0)
    seeds = [p.read_bytes() for p in FILES if p.parent.name == name]
    changed = [target.change(seed, rng) for seed in seeds for _ in range(400 // len(seeds))]
    accepted = sum(target.check(data) for data in changed if data not in seeds)
    assert accepted > len(changed) // 50


def test_the_seeds_stay_small() -> None:
    assert all(any((SEEDS / name).iterdir()) for name in TARGETS)
    assert sum(path.stat().st_size for path in FILES) < 100_000


@pytest.mark.skipif(find_spec("atheris") is None, reason=NO_ATHERIS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_seconds_of_fuzzing_find_nothing(name: str, tmp_path: Path) -> None:
    result = fuzz(name, SECONDS, tmp_path)
    assert result.crashes == 0
    assert result.executions > 100
    assert result.coverage > 20


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason=NO_ATHERIS)
@pytest.mark.timeout(0)
def test_ten_minutes_of_fuzzing_find_nothing(tmp_path: Path) -> None:
    assert not any(result.crashes for result in runs(list(TARGETS), 600, False, tmp_path))


def one_byte_late(raw: bytes, size: int) -> Header:
    found = parse_header(raw, size)
    return replace(found, starts=tuple(start + 1 for start in found.starts))


def no_tensors(raw: bytes, _: int) -> Header:
    return Header((), (), (), {}, raw)


class AnyBytes(bytes):
    """Bytes that are equal to all others."""

    def __ne__(self, _: object) -> bool:
        return False


def no_entry(*_: object) -> None:
    raise KeyError("dtype")


# A fault put into a reader, and an input on which its oracle notices.
FAULTS: dict[str, tuple[object, str, object, str, bytes]] = {
    "duplicate names are taken": (
        strict_json, "_DECODER", json.JSONDecoder(), "header",
        (SEEDS / "header/duplicate").read_bytes(),
    ),
    "what the library refuses is taken": (
        oracles, "parse_header", no_tensors, "header", (SEEDS / "header/hole").read_bytes(),
    ),
    "a tensor is read one byte late": (
        oracles, "parse_header", one_byte_late, "header", (SEEDS / "header/three").read_bytes(),
    ),
    "a tensor is overlooked": (
        oracles, "parse_header", no_tensors, "header", (SEEDS / "header/three").read_bytes(),
    ),
    "an error is not the reader's own": (
        header, "place_columns", no_entry, "header", (SEEDS / "header/three").read_bytes(),
    ),
    "an index may leave the folder": (
        index, "is_plain_name", bool, "index", (SEEDS / "index/outside").read_bytes(),
    ),
    "infinity is a number": (
        strict_json, "_DECODER", json.JSONDecoder(), "config", b'{"a":1e999}',
    ),
    "a count may be zero": (
        config, "_check_count", lambda value, _: value, "config",
        b'{"num_attention_heads":0,"num_key_value_heads":0,"n_head":4}',
    ),
    "a manifest may be spelled in two ways": (
        manifest_file, "encode_manifest", lambda _: AnyBytes(), "manifest",
        (SEEDS / "manifest/one").read_bytes() + b" ",
    ),
    "an error has two lines": (
        recipe_file, "escape_line", lambda text, _: text, "recipe", b'"a\\nb" = 1',
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_oracle_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong, target, data = FAULTS[fault]
    TARGETS[target].check(data)
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((AssertionError, KeyError, ValueError, SafetensorError)):
        TARGETS[target].check(data)


def test_a_run_is_reported_for_what_it_did(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    lines = [
        Result("header", 1500, 2.0, 1.0, 90, 0, "abc"),
        Result("header", 500, 2.0, 1.0, 95, 1, "abc"),
        Result("index", 10, 2.0, 1.0, 40, 0, "abd"),
    ]
    results.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
    text = report(results)
    assert "| header | 2,000 | 2 | 1,000 | 95 | 1 |" in text
    assert "| all | 2,010 | 3 | 670 |  | 1 |" in text
    assert "abc, abd" in text
