"""A rank that dies, stalls, never comes or differs: every other ends in time and names it.

Real processes over gloo.  The fast part runs two ranks; `pytest -m slow` runs the whole table with
two, three and four.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import RanksLost
from shardkit.runtime.distributed.diagnosis import RankState, explain_failure, find_difference
from shardkit.runtime.distributed.liveness import Link
from shardkit.timeouts import Timeouts
from tests.helpers.damage import flip
from tests.helpers.rank_launcher import Ended, Zygote, divisible, free_port, run_ranks
from tests.helpers.runtime_helpers import cut
from tests.helpers.shard_damage import DAMAGES, FILE, flipped_data, missing

WORLDS = [2, 3, 4]
SECONDS = {"join": 5.0, "load": 20.0, "collective": 3.0, "request": 20.0}
SLACK = 5.0  # seconds beyond the timeout that the last survivor may take


@dataclass(frozen=True)
class Scenario:
    """What is wrong with the faulty rank, and what every other must say; {r} is that rank."""

    says: str
    fault: str = ""
    phase: str = ""
    model: bool = False
    timeout: str = "collective"
    options: dict[str, str] = field(default_factory=dict)  # of the faulty rank alone
    damage: str = ""  # to its own copy of the shard folder
    environment: dict[str, str] = field(default_factory=dict)
    fast: bool = False
    everyone: bool = False  # the faulty rank refuses, too


DIED = r"rank {r} died"
ENDED = r"rank {r} exited normally before the others"
RAISED = r"rank {r} exited: ValueError: boom"
SILENT = r"rank {r} died or is stopped: no sign of life"
LATE = r"rank {r} \(.*\) did not reach \S+ #\d+ within 3 s"
ABSENT = r"rank {r} did not join within 5 s"
SCENARIOS = {
    "killed before a collective": Scenario(DIED, "killed", "before a collective", fast=True),
    "raises before a collective": Scenario(RAISED, "raises", "before a collective", fast=True),
    "exits before a collective": Scenario(ENDED, "exits", "before a collective"),
    "exits at once before a collective": Scenario(DIED, "exits at once", "before a collective"),
    "stopped before a collective": Scenario(SILENT, "stopped", "before a collective", fast=True),
    "sleeps before a collective": Scenario(LATE, "sleeps", "before a collective"),
    "loops before a collective": Scenario(LATE, "loops", "before a collective", fast=True),
    "killed in a collective": Scenario(DIED, "killed", "in a collective"),
    "exits at once in a collective": Scenario(DIED, "exits at once", "in a collective"),
    "stopped in a collective": Scenario(SILENT, "stopped", "in a collective"),
    "killed between two calls": Scenario(DIED, "killed", "between two calls", model=True),
    "raises between two calls": Scenario(RAISED, "raises", "between two calls", model=True),
    "stopped between two calls": Scenario(SILENT, "stopped", "between two calls", model=True),
    "loops between two calls": Scenario(LATE, "loops", "between two calls", model=True),
}
for how in ("killed", "raises", "exits", "exits at once", "stopped", "sleeps", "loops"):
    SCENARIOS[f"{how} before joining"] = Scenario(
        ABSENT, how, "before joining", timeout="join", fast=how == "raises"
    )
AFTER_JOINING = {
    "killed": DIED, "raises": RAISED, "exits": ENDED, "exits at once": DIED, "stopped": SILENT,
}  # fmt: skip
for how, says in AFTER_JOINING.items():
    SCENARIOS[f"{how} before loading"] = Scenario(says, how, "after joining", model=True)
SCENARIOS |= {
    "of another torch": Scenario(
        r"rank {r} has torch 1.0", options={"torch": "1.0"}, fast=True, everyone=True
    ),
    "of another shardkit": Scenario(
        r"rank {r} has shardkit 9.9", options={"shardkit": "9.9"}, everyone=True
    ),
    "of another transformers": Scenario(
        r"rank {r} has transformers 4.0", options={"transformers": "4.0"}, model=True,
        everyone=True,
    ),
    "of another dtype": Scenario(
        r"rank {r} has dtype float64", options={"dtype": "float64"}, model=True, fast=True,
        everyone=True,
    ),
    "of another world size": Scenario(
        r"rank {r} has world size 7", environment={"WORLD_SIZE": "7"}, fast=True, everyone=True
    ),
    "given other shapes": Scenario(
        r"rank {r} has inputs 0 int64 \[3, 1\]", options={"ids": "[[1], [2], [3]]"}, model=True,
        everyone=True, fast=True,
    ),
    "given other tokens": Scenario(
        r"rank {r} has input values", options={"ids": "[[1, 2, 4]]"}, model=True, everyone=True
    ),
    "called otherwise": Scenario(
        r"rank {r} has call generate", options={"call": "generate"}, model=True, everyone=True
    ),
}  # fmt: skip


SCENARIOS |= {
    f"with a folder that is {how.__name__}": Scenario(
        says, model=True, damage=how.__name__, everyone=True, fast=how is missing
    )
    for how, says in DAMAGES.items()
}
DAMAGES[flipped_data] = FILE
SCENARIOS["with a flipped bit"] = Scenario(
    FILE, model=True, damage="flipped_data", options={"verify": "1"}, everyone=True
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return divisible(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def splits(source: Path) -> dict[int, Path]:
    """Splits by world size, and by its negative those of a model of the same layout."""
    other = Path(shutil.copytree(source, source.parent / "other"))
    flip(other / "model.safetensors", -3)
    folders = {
        sign * world: source.parent / f"tp{sign * world}" for world in WORLDS for sign in (1, -1)
    }
    for world, folder in folders.items():
        cut(source if world > 0 else other, folder, abs(world))
    return folders


def check(ended: dict[int, Ended], says: str, seconds: float) -> None:
    """Every rank ended with an error in time, in one line that names the rank and the cause."""
    for rank, one in ended.items():
        assert one.code == 7, (rank, one)
        assert one.after < seconds + SLACK, (rank, one)
        (line,) = [text for text in one.said.splitlines() if text.startswith("Error: ")]
        assert re.search(says, line), (rank, one)


def table() -> Iterator[Any]:
    for name, scenario in SCENARIOS.items():
        for world in WORLDS:
            marks = [] if scenario.fast and world == 2 else [pytest.mark.slow]
            yield pytest.param(name, world, marks=marks, id=f"{name}-{world}")


@pytest.mark.parametrize(("name", "world"), list(table()))
def test_a_faulty_rank_is_named_by_every_other(
    name: str, world: int, zygote: Zygote, splits: dict[int, Path], tmp_path: Path
) -> None:
    scenario, faulty = SCENARIOS[name], world - 1
    plain: dict[str, Any] = {"timeouts": SECONDS}
    if scenario.model:
        plain["folder"] = str(splits[world])
    bad = {**plain, "fault": scenario.fault, "phase": scenario.phase, **scenario.options}
    if scenario.damage:
        bad["folder"] = str(shutil.copytree(splits[world], tmp_path / "copy"))
        (damage,) = [how for how in DAMAGES if how.__name__ == scenario.damage]
        damage(tmp_path / "copy", world, splits[-world])
    ranks = [{"arguments": plain} for _ in range(faulty)]
    ranks += [{"arguments": bad, "environment": scenario.environment}]
    ended = run_ranks(zygote, tmp_path, ranks, -1 if scenario.everyone else faulty)
    says = scenario.says.format(r=faulty)
    check(ended, says, SECONDS[scenario.timeout])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", [False, True])
def test_ranks_without_a_fault_finish(
    world: int, model: bool, zygote: Zygote, splits: dict[int, Path], tmp_path: Path
) -> None:
    arguments = {"timeouts": SECONDS, **({"folder": str(splits[world])} if model else {})}
    arguments |= {} if model else {"sums": "20"}
    ended = run_ranks(zygote, tmp_path, [{"arguments": arguments}] * world, -1)
    assert [(one.code, one.said) for one in ended.values()] == [(0, "finished\n")] * world


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_that_never_starts_is_named(world: int, zygote: Zygote, tmp_path: Path) -> None:
    ranks: list[dict[str, Any]] = [{"arguments": {"timeouts": SECONDS}} for _ in range(world)]
    ranks[1]["never"] = True
    ended = run_ranks(zygote, tmp_path, ranks, 1)
    check(ended, "rank 1 did not join within 5 s", SECONDS["join"])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_started_twice_is_named(world: int, zygote: Zygote, tmp_path: Path) -> None:
    ranks: list[dict[str, Any]] = [{"arguments": {"timeouts": SECONDS}} for _ in range(world)]
    ranks[-1]["environment"] = {"RANK": "0"}
    ended = run_ranks(zygote, tmp_path, ranks, -1)
    check(ended, "rank 0 was started twice", SECONDS["join"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "phase", "says"),
    [
        ("killed", "before a collective", "rank 0 died"),
        ("raises", "before a collective", "rank 0 exited: ValueError: boom"),
        ("exits", "before a collective", "rank 0 exited normally before the others|rank 0 died"),
        ("stopped", "before a collective", "rank 0 is stopped"),
        ("stopped", "in a collective", "rank 0 is stopped"),
        ("loops", "before a collective", r"rank 0 \(.*\) did not reach"),
        ("killed", "after joining", "rank 0 died"),
        ("killed", "before joining", "rank 0 died or never started"),
    ],
)
@pytest.mark.parametrize("world", WORLDS)
def test_a_faulty_rank_that_keeps_the_store_is_named(
    fault: str, phase: str, says: str, world: int, zygote: Zygote, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"timeouts": SECONDS}
    ranks = [{"arguments": {**plain, "fault": fault, "phase": phase}}]
    ranks += [{"arguments": plain}] * (world - 1)
    ended = run_ranks(zygote, tmp_path, ranks, 0, keeper="rank 0")
    seconds = SECONDS["join" if phase == "before joining" else "collective"]
    check(ended, says, seconds)


@pytest.mark.slow
def test_ranks_that_differ_say_the_same(
    zygote: Zygote, splits: dict[int, Path], tmp_path: Path
) -> None:
    plain = {"timeouts": SECONDS, "folder": str(splits[4])}
    ranks = [{"arguments": {**plain, "dtype": kind}} for kind in ("float64", *["float32"] * 3)]
    ended = run_ranks(zygote, tmp_path, ranks, -1)
    assert {one.said for one in ended.values()} == {
        "Error: rank 0 has dtype float64, ranks 1, 2, 3 float32: every rank must load the same\n"
    }


def test_a_rank_that_left_for_another_s_fault_tells_whose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delattr(sys, "last_value", raising=False)  # of a test that failed before
    zero, one = (Link(rank, 3, Timeouts(5, 5, 3)) for rank in range(2))
    one.leave("rank 2 died (this rank was in all_reduce #3)", lambda: None)
    with pytest.raises(RanksLost, match=r"^rank 1 stopped: rank 2 died"):
        zero.all_exchange("ready", 5)
    zero.leave("rank 1 stopped", lambda: None)


def test_the_odd_rank_is_the_one_that_most_contradict() -> None:
    reports = {2: {"torch": "2"}, 0: {"torch": "1"}, 1: {"torch": "2"}}
    assert find_difference(reports).startswith("rank 0 has torch 1, ranks 1, 2 2:")
    one_of_two = find_difference({1: {"torch": "2"}, 0: {"torch": "1"}})
    assert one_of_two.startswith("rank 1 has torch 2")
    assert find_difference({0: {"torch": "1"}, 1: {}}).startswith("rank 1 has torch none")
    assert not find_difference({0: {"torch": "1"}, 1: {"torch": "1"}})


def test_a_failure_is_explained_by_who_left_then_by_the_silent_then_by_the_late() -> None:
    here = RankState(failed="all_reduce #3")
    late = RankState(alive=True, status="after all_reduce #2")
    gone, silent = RankState(departure="exited: ValueError: boom"), RankState()

    def explain(error: str = "Timed out", **others: RankState) -> str:
        states = {int(name[1:]): state for name, state in others.items()}
        return explain_failure("all_reduce #3", error, 30, states)

    assert explain(r1=here, r2=gone, r3=late).startswith("rank 2 exited: ValueError: boom (")
    assert explain(r1=here, r2=silent, r3=late).startswith("rank 2 died or is stopped")
    assert explain("Connection closed by peer", r1=silent).startswith("rank 1 died (")
    assert explain(r1=here, r2=late) == (
        "rank 2 (after all_reduce #2) did not reach all_reduce #3 within 30 s"
    )
    assert "rank 1 was in broadcast #3" in explain(r1=RankState(failed="broadcast #3"), r2=here)
    assert explain("odd", r1=here) == "every rank failed in all_reduce #3: odd"
