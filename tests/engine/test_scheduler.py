"""Which sequences run next: no more than the limits allow, in the order in which they came."""

from collections.abc import Sequence

import pytest

from shardkit.errors import EngineBusy, RequestError
from shardkit.runtime.engine.handle import Handle
from shardkit.runtime.engine.scheduler import Scheduler
from shardkit.runtime.engine.sequence import GenerationPlan, TokenSequence

GREEDY = {"do_sample": False}


def make_sequences(sizes: Sequence[tuple[int, int]]) -> list[TokenSequence]:
    """Greedy sequences of so many prompt tokens and new ones, numbered from 0."""
    sequences = []
    for number, (length, new) in enumerate(sizes):
        prompt, plan = (1,) * length, GenerationPlan(GREEDY, new)
        sequences.append(TokenSequence(number, Handle(prompt, 1, None), 0, prompt, plan))
    return sequences


def list_numbers(sequences: Sequence[TokenSequence]) -> list[int]:
    return [sequence.number for sequence in sequences]


def test_a_batch_has_no_more_tokens_than_its_cache_has_room_for() -> None:
    scheduler = Scheduler(8, 100, 24)
    scheduler.add(make_sequences([(2, 4), (2, 6), (2, 6), (2, 4)]))
    assert list_numbers(scheduler.plan_step().join) == [0, 1, 2]  # 3 x 8 tokens
    assert list_numbers(list(scheduler.waiting)) == [3]
    for sequence in scheduler.running:
        sequence.accept(5)
    scheduler.running[1].handle.cancel()
    step = scheduler.plan_step()
    assert (step.leaves, list_numbers(step.join)) == (True, [3])


def test_sequences_of_one_call_have_no_more_tokens_than_its_cache_has_room_for() -> None:
    scheduler = Scheduler(8, 100, 24)
    scheduler.add(make_sequences([(2, 4), (2, 6), (3, 1), (2, 6), (2, 4)]))
    assert list_numbers(scheduler.take_compatible()) == [0, 1, 3]
    assert list_numbers(scheduler.take_compatible()) == [2]  # of another length
    assert list_numbers(scheduler.take_compatible()) == [4]
    assert scheduler.take_compatible() == []


def test_a_batch_has_no_more_sequences_than_its_size() -> None:
    scheduler = Scheduler(2, 100, 1000)
    scheduler.add(make_sequences([(2, 4)] * 3))
    assert list_numbers(scheduler.take_compatible()) == [0, 1]
    scheduler.add(make_sequences([(2, 4)] * 2))
    assert len(scheduler.plan_step().join) == 2


def test_what_never_fits_is_refused_and_what_is_cancelled_leaves_room() -> None:
    scheduler = Scheduler(2, 3, 24)
    with pytest.raises(RequestError, match="make 25 tokens, but the KV cache has room for 24"):
        scheduler.add(make_sequences([(5, 20)]))
    first = make_sequences([(1, 1)] * 3)
    scheduler.add(first)
    with pytest.raises(EngineBusy, match="3 sequences wait, of at most 3"):
        scheduler.add(make_sequences([(1, 1)]))
    first[1].handle.cancel()
    scheduler.add(make_sequences([(1, 1)]))
    assert list_numbers(list(scheduler.waiting)) == [0, 2, 0]
