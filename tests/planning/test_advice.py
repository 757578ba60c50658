"""Advice for devices, compared with published sizes and with arithmetic worked out by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shardkit.checkpoint import Checkpoint
from shardkit.cli import main
from shardkit.errors import UsageError
from shardkit.planning import Advice, DeviceOption, Devices, advise_devices, make_plan
from shardkit.recipe import find_recipe
from shardkit.tensor import TensorSpec
from tests.helpers.fixture_checkpoints import sparse_checkpoint
from tests.helpers.published import read_published_config, read_published_specs
from tests.helpers.real_inputs import shared
from tests.helpers.synthetic_checkpoints import llama_source

GB = 10**9


def advise_specs(
    specs: Sequence[TensorSpec],
    config: dict[str, Any],
    devices: Devices,
    with_experts: bool = False,
) -> Advice:
    recipe = find_recipe(config)
    experts = make_plan(specs, recipe, config, 1, True) if with_experts else None
    return advise_devices(make_plan(specs, recipe, config, 1), experts, config, devices)


def advise_published(name: str, devices: Devices, with_experts: bool = False) -> Advice:
    shared("fixtures")
    config, specs = read_published_config(name), read_published_specs(name)
    return advise_specs(specs, config, devices, with_experts)


def advise_fixture(name: str, folder: Path, devices: Devices, with_experts: bool = False) -> Advice:
    sparse_checkpoint(shared(f"fixtures/{name}"), folder / name)
    with Checkpoint(folder / name) as checkpoint:
        return advise_specs(checkpoint.specs(), checkpoint.config, devices, with_experts)


def find_option(advice: Advice, tp_size: int, whole: bool = False) -> DeviceOption:
    (option,) = (o for o in advice.options if (o.tp_size, o.is_expert_parallel) == (tp_size, whole))
    return option


def test_deepseek_r1_needs_two_hosts_of_eight() -> None:
    """671 billion parameters in FP8, of which a token uses 37 billion, as its authors say.

    A latent of 512 and a key of 64 for each of 61 layers, in bfloat16, on every rank:
    61 * 576 * 2 = 70,272 bytes.
    """
    advice = advise_published("deepseek-r1", Devices(16, 80 * GB))
    whole = find_option(advice, 1)
    assert whole.weight_bytes == pytest.approx(671 * GB, rel=0.005)
    assert whole.read_bytes == pytest.approx(37 * GB, rel=0.025)
    assert {option.kv_bytes for option in advice.options} == {61 * (512 + 64) * 2}
    assert [option.tp_size for option in advice.options if option.fits] == [16]
    assert find_option(advice, 8).weight_bytes > 72 * GB  # 671 / 8 is 84
    choice = advice.choice
    assert choice == find_option(advice, 16)
    # 72 GB without the 43.1 GB of weights: 28.9e9 / 70,272 = 410,700 tokens.
    assert choice.kv_tokens == (72 * GB - choice.weight_bytes) // 70_272 == 410_698
    assert advice.context == 163_840


def test_kimi_k2_keeps_as_much_for_each_token() -> None:
    """554.27 GiB are published; as DeepSeek's, 61 layers keep a latent of 512 and a key of 64."""
    advice = advise_published("kimi-k2.5", Devices(8, 141 * GB))
    assert find_option(advice, 1).weight_bytes == pytest.approx(554.27 * 2**30, rel=1e-4)
    assert {option.kv_bytes for option in advice.options} == {70_272}
    # 595.15 / 8 is 74.4 GB, and more as attention's latent parts are on each: 8 H200 are enough.
    assert advice.choice == find_option(advice, 8)
    assert advice.choice.fits


def test_minimax_m2_with_whole_experts_is_even_where_its_blocks_are_not() -> None:
    """230 billion parameters in FP8 with 10 active. 62 layers of 8 kv heads of 128 in bfloat16:
    2 * 62 * 8 * 128 * 2 = 253,952 bytes. An expert is 1536 wide, 12 blocks of 128: over 8 ranks
    some have 2 and some 1, where 32 of 256 whole experts are as many on each.
    """
    advice = advise_published("minimax-m2.7", Devices(16, 80 * GB), with_experts=True)
    whole = find_option(advice, 1)
    assert whole.weight_bytes == pytest.approx(230 * GB, rel=0.005)
    assert whole.read_bytes == pytest.approx(10 * GB, rel=0.13)  # its embedding's rows are not read
    assert [find_option(advice, n).kv_bytes for n in (1, 2, 4, 8)] == [
        253_952, 126_976, 63_488, 31_744
    ]  # fmt: skip
    parts, experts = find_option(advice, 8), find_option(advice, 8, whole=True)
    assert experts.weight_bytes == pytest.approx(230 * GB / 8, rel=0.01)
    assert parts.weight_bytes > 1.3 * experts.weight_bytes
    # 12 blocks over 16 ranks: 96 columns each, in one block or two, so twice what 1 / 12 would be.
    over16, whole16 = find_option(advice, 16), find_option(advice, 16, whole=True)
    assert over16.weight_bytes == pytest.approx(230 * GB / 6, rel=0.03)
    assert whole16.weight_bytes == pytest.approx(230 * GB / 16, rel=0.03)
    # 230 / 4 is 57.6 GB, so 14.4e9 / 63,488 = 226,000 tokens: more than a context of 204,800.
    assert advice.context == 204_800
    assert (advice.choice and advice.choice.tp_size, advice.choice and advice.choice.replicas) == (
        4, 4
    )  # fmt: skip


def test_mixtral_8x22b_sends_what_a_ring_sends(tmp_path: Path) -> None:
    """141 billion parameters in bfloat16, 39 of them active; 56 layers of 8 kv heads of 128.

    A token takes a sum after each of 56 attentions and 56 mixtures, and one after the embedding,
    of 6144 values of 2 bytes, and a gather of 32,000 logits. Of 8 ranks in a ring each sends 7/8
    of that, of a sum twice.
    """
    advice = advise_fixture("mixtral-8x22b-wizardlm2", tmp_path, Devices(8, 80 * GB))
    whole, eight = find_option(advice, 1), find_option(advice, 8)
    assert whole.weight_bytes == pytest.approx(141e9 * 2, rel=0.005)
    assert whole.read_bytes == pytest.approx(39e9 * 2, rel=0.01)
    assert whole.kv_bytes == 2 * 56 * 8 * 128 * 2 == 229_376
    assert eight.kv_bytes == 229_376 // 8
    assert eight.collectives == 56 + 56 + 1 + 1
    assert eight.sent_bytes == (2 * 113 * 6144 + 32_000) * 2 * 7 // 8 == 2_485_952
    # 281 / 4 is 70.3 GB of 72, so the rest holds 1.7e9 / 57,344 = 30,000 tokens of 65,536.
    assert find_option(advice, 4).fits
    assert advice.context == 65_536
    assert advice.choice == eight


def test_llama_70b_in_float32_fits_on_four_with_its_context(tmp_path: Path) -> None:
    """70.55 billion parameters of 4 bytes; 80 layers of 8 kv heads of 128:
    2 * 80 * 8 * 128 * 4 = 655,360 bytes, and an eighth on each of 8 ranks.
    """
    devices = Devices(8, 80 * GB, "pcie", 1000 * GB)
    advice = advise_fixture("llama-3.1-70b-reflection", tmp_path, devices)
    whole, eight = find_option(advice, 1), find_option(advice, 8)
    assert whole.weight_bytes == pytest.approx(70.55e9 * 4, rel=0.001)
    assert (whole.kv_bytes, eight.kv_bytes) == (655_360, 81_920)
    assert [option.fits for option in advice.options] == [False, False, True, True]
    # 282.2 / 4 is 70.56 GB; 1.44e9 / 163,840 = 8,800 tokens, more than its context of 8192.
    assert advice.context == 8192
    assert advice.choice == find_option(advice, 4)
    assert find_option(advice, 4).kv_tokens == pytest.approx(8800, rel=0.02)
    # 161 sums and a gather of 20 us each are 3.24 ms; the weights, without the embedding,
    # 282.2e9 / 8 - 1.05e9 * 4 / 8 bytes, 34.75 ms; 32 GB/s of PCIe for 9.7 MB 0.3 ms.
    assert eight.collectives == 162
    assert eight.seconds == pytest.approx(0.00324 + 0.03475 + 0.0003, rel=0.01)


def test_nothing_is_taken_that_does_not_fit(tmp_path: Path) -> None:
    advice = advise_fixture("falcon-40b", tmp_path, Devices(2, 24 * GB))
    assert advice.choice is None
    assert advice.reason == "the weights fit in no way"


def run_plan(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_the_command_compares_sizes(tmp_path: Path) -> None:
    source = str(llama_source(tmp_path / "source", heads=8, kv=4))
    shown = run_plan(source, "--devices", "4", "--memory", "1G", "--link", "pcie")
    assert shown.exit_code == 0, shown.output
    assert "Take         tp_size 1, 4 replicas: the fewest ranks" in shown.output
    assert "Estimated    what a rank reads and sends" in shown.output
    result = run_plan(source, "--devices", "4", "--memory", "1G", "--json")
    table = json.loads(result.stdout)
    assert [option["tp_size"] for option in table["options"]] == [1, 2, 4]
    assert table["choice"]["tp_size"] == 1
    assert set(table["options"][0]["estimates"]) == {"read_bytes", "sent_bytes", "seconds"}


def test_a_size_that_is_impossible_is_said_to_be(tmp_path: Path) -> None:
    source = str(llama_source(tmp_path / "source", heads=2, kv=2))
    shown = run_plan(source, "--devices", "4", "--memory", "1G")
    assert "4 impossible: " in shown.output
    assert "cannot be divided over tp_size 4" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name either --tp"),
        (("--tp", "2", "--devices", "2"), "name either --tp"),
        (("--devices", "2"), "--devices needs --memory"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run_plan(str(tmp_path), *arguments)
    assert isinstance(result.exception, UsageError | SystemExit)
    assert message in f"{result.output}{result.exception}"
