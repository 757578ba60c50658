"""What torchrun's environment variables say, and what is made of them for a rank."""

import pytest

from shardkit.errors import RanksError
from shardkit.runtime.distributed.rank_environment import (
    NAMES,
    RankPlace,
    apply_variables,
    count_local_ranks,
    is_follower,
    is_rank,
    make_variables,
    read_attempt,
    read_place,
    read_store_address,
)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a rank, and all as before once a test has ended."""
    for name in (*NAMES, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_process_that_nobody_started_as_a_rank_has_no_place() -> None:
    assert not is_rank()
    assert not is_follower()
    assert read_place() is None
    assert count_local_ranks() == 1
    assert read_attempt() == "0"


def test_a_rank_reads_what_its_starter_has_made() -> None:
    apply_variables(make_variables(2, 3, 1234))
    assert is_rank()
    assert is_follower()
    assert read_place() == RankPlace(2, 3)
    assert read_store_address() == ("127.0.0.1", 1234)
    assert count_local_ranks() == 3


def test_a_rank_has_none_of_its_starter_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A starter that is itself a rank, of one of several hosts."""
    for name in NAMES:
        monkeypatch.setenv(name, "8")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "5")
    apply_variables(make_variables(0, 1, 1234))
    assert read_place() is None
    assert count_local_ranks() == 1
    assert read_attempt() == "0"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK= of WORLD_SIZE=2: no such rank"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2: no such rank"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "RANK=0 of WORLD_SIZE=two: no such rank"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "no MASTER_PORT"),
    ],
)
def test_what_is_no_place_is_refused(variables: dict[str, str], says: str) -> None:
    apply_variables(variables)
    with pytest.raises(RanksError, match=says):
        read_place()
