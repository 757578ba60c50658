"""Rounded sums are verified: right shards pass by the rounding's bound, and wrong ones do not."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from shardkit.authoring.samples import list_samples
from shardkit.cli import main
from shardkit.errors import UsageError
from shardkit.runtime.distributed import turns
from shardkit.runtime.distributed.rounded_sums import add_rounded
from shardkit.shards.manifest import Manifest
from shardkit.verification import Check
from shardkit.verification.numerics_options import NumericsOptions
from shardkit.verification.request import check_numerics_options
from shardkit.verification.rounded_check import check_rounded_sums
from tests.helpers.layout_faults import LAYOUT_FAULTS
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import altered, cut

EVERY = [sample.name for sample in list_samples()]
QUICK = ("llama", "mixtral", "t5", "olmo2")


def check(source: Path, shards: Path, manifest: Manifest) -> Check:
    return check_rounded_sums(shards, manifest, source, torch.bfloat16)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in EVERY if n not in QUICK)]
)
def test_rounded_sums_are_within_the_bound_of_rounding(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "source")
    found = check(source, tmp_path / "shards", cut(source, tmp_path / "shards", 4))
    assert (found.name, found.verdict) == ("sums", "passed"), found.faults
    assert found.numbers["reduce_dtype"] == "bfloat16"
    assert found.summary.startswith("sums sent in bfloat16: ")


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_a_wrong_layout_is_beyond_that_bound(fault: str, tmp_path: Path) -> None:
    name, right, wrong, *_ = LAYOUT_FAULTS[fault]
    source = make(name, tmp_path / "source")
    recipe = altered(name, tmp_path, (right, wrong))
    manifest = cut(source, tmp_path / "shards", 2, recipe)
    assert check(source, tmp_path / "shards", manifest).verdict == "failed"


def test_a_coarser_rounding_is_beyond_that_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summands as 8 bits have them, of which 3 are behind the point."""

    def add(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        coarse = [part.to(torch.float8_e4m3fn).to(part.dtype) for part in parts]
        return add_rounded(coarse, dtype)

    source = make("llama", tmp_path / "source")
    manifest = cut(source, tmp_path / "shards", 2)
    assert check(source, tmp_path / "shards", manifest).verdict == "passed"
    monkeypatch.setattr(turns, "add_rounded", add)
    assert check(source, tmp_path / "shards", manifest).verdict == "failed"


def test_the_command_verifies_both(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    cut(source, tmp_path / "shards", 2)
    options = ("--against", source, "--ranks", "turns", "--reduce-dtype", "bfloat16", "--json")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "shards"), *map(str, options)])
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    verdicts = [(each["name"], each["verdict"]) for each in checks]
    assert verdicts == [(name, "passed") for name in ("files", "weights", "numerics", "sums")]
    exact, rounded = (each["numbers"]["error"]["max"] for each in checks[2:])
    assert rounded > 10 * exact


def test_what_cannot_be_combined_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = NumericsOptions(reduce_dtype="bfloat16", resume=tmp_path / "notes")
    with pytest.raises(UsageError, match="leave out --resume"):
        check_numerics_options(options)
    with pytest.raises(UsageError, match="'float16': it must be bfloat16"):
        check_numerics_options(NumericsOptions(reduce_dtype="float16"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="leave out torchrun"):
        check_numerics_options(NumericsOptions(reduce_dtype="bfloat16"))
