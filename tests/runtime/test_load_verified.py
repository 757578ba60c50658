"""`load(verify=True)`: the weights are those of a plain load, and damage is every rank's error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import ManifestError
from shardkit.runtime.config import read_shard_configs
from tests.helpers.command_line import environment, run
from tests.helpers.damage import Split, written
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut

PROGRAM = """
import json, os, pathlib, sys, torch
from shardkit import runtime
from shardkit.errors import ShardkitError

folder, out, damages = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
group = runtime.connect()

def loaded(**options):
    group.all_agree({})
    try:
        return runtime.load(folder, group=group, **options), ""
    except ShardkitError as error:
        return None, f"{type(error).__name__}: {error}"

def alike(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

plain, checked = loaded()[0], loaded(verify=True)[0]
said = [{"alike": alike(plain, checked)}]
for name, at, data in damages:
    group.all_agree({})
    if group.tp_rank == 0:
        sound = (folder / name).read_bytes()
        changed = sound[:at] if data is None else sound[:at] + bytes(data) + sound[at + len(data):]
        (folder / name).write_bytes(changed)
    model, unchecked = loaded()
    said.append({"plain": unchecked or alike(plain, model), "checked": loaded(verify=True)[1]})
    group.all_agree({})
    if group.tp_rank == 0:
        (folder / name).write_bytes(sound)
(out / f"said-{group.tp_rank}").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    base = tmp_path_factory.mktemp("verified")
    return Split(base / "shards", cut(make("llama", base / "source"), base / "shards", 2))


def told(
    split: Split, tmp_path: Path, damages: list[tuple[str, int, list[int] | None]]
) -> list[Any]:
    """What each of two ranks said of a plain and a verified load, sound and after each damage."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(tmp_path / "program.py"),
         str(split.folder), str(tmp_path), json.dumps(damages)],
        capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((tmp_path / f"said-{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.torchrun
def test_damage_that_a_plain_load_takes_is_every_ranks_error(split: Split, tmp_path: Path) -> None:
    middle = (split.headers[0] + len(split.sound[0])) // 2
    places = [(0, split.headers[0]), (0, middle), (1, len(split.sound[1]) - 1)]
    flips = [(rank, *split.flipped(rank, 8 * at)) for rank, at in places]
    damages = [(split.path(rank).name, at, list(byte)) for rank, at, byte in flips]
    cut_short = (split.path(1).name, len(split.sound[1]) - 1, None)
    said = told(split, tmp_path, [*damages, cut_short])
    assert said[0][0] == said[1][0] == {"alike": True}
    for turn, (rank, at, _) in enumerate(flips, 1):
        for own in (0, 1):
            found = said[own][turn]
            assert found["plain"] is (own != rank), "a plain load is silently wrong on that rank"
            assert found["checked"] == said[rank][turn]["checked"]
            assert found["checked"].startswith(f"RanksError: rank {rank}: {split.path(rank)}: ")
            assert split.named(rank, at) in found["checked"]
    for own in (0, 1):
        for found in said[own][-1].values():
            assert f"rank 1: {split.path(1)}: truncated" in found


def test_the_command_generates_from_sound_shards_and_refuses_a_flipped_bit(split: Split) -> None:
    arguments = ("generate", split.folder, "1 2", "--max-new-tokens", "2", "--verify")
    assert run(*arguments).exit_code == 0
    at, byte = split.flipped(1, 8 * len(split.sound[1]) - 8)
    with written(split.path(1), at, byte):
        done = run(*arguments)
    assert done.exit_code == 7
    assert done.stdout == ""
    assert f"Error: rank 1: {split.path(1)}: " in done.stderr
    assert split.named(1, at) in done.stderr


def test_configs_are_of_the_bytes_that_were_checked(split: Split) -> None:
    configs = read_shard_configs(split.folder, split.manifest)
    sound = json.loads((split.folder / "config.json").read_bytes())
    assert configs.config == sound
    assert configs.generation is not None
    for name in ("config.json", "generation_config.json"):
        with (
            written(split.folder / name, 0, b" "),
            pytest.raises(ManifestError, match="not the file that was copied"),
        ):
            read_shard_configs(split.folder, split.manifest)
