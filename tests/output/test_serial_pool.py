"""Tasks of one kind run in order, others meanwhile, and no thread waits."""

import threading
from collections.abc import Callable

import pytest

from shardkit.output.serial_pool import SerialPool


def test_tasks_of_a_key_run_in_order_and_never_two_at_once() -> None:
    order: dict[int, list[int]] = {key: [] for key in range(5)}
    running: set[int] = set()
    overlaps: list[int] = []

    def make(key: int, number: int) -> Callable[[], None]:
        def task() -> None:
            if key in running:
                overlaps.append(key)
            running.add(key)
            order[key].append(number)
            running.discard(key)

        return task

    with SerialPool(4) as pool:
        for number in range(200):
            for key in order:
                pool.submit(key, make(key, number))
    assert order == {key: list(range(200)) for key in order}
    assert not overlaps


def test_a_key_that_is_stuck_keeps_no_thread_from_another() -> None:
    """Of two threads one waits in a task; that key's other tasks must not take the second."""
    free, done = threading.Event(), threading.Event()

    def wait() -> None:
        free.wait(30)

    with SerialPool(2) as pool:
        pool.submit("stuck", wait)
        for _ in range(10):
            pool.submit("stuck", lambda: None)
        pool.submit("other", done.set)
        was_done = done.wait(10)
        free.set()
    assert was_done


def test_what_follows_a_failure_fails_alike_and_other_keys_go_on() -> None:
    ran: list[str] = []

    def fail() -> None:
        raise OSError("no room")

    with SerialPool(2) as pool:
        futures = [pool.submit("a", fail), pool.submit("a", lambda: ran.append("after"))]
        other = pool.submit("b", lambda: ran.append("other"))
    for future in futures:
        with pytest.raises(OSError, match="no room"):
            future.result()
    assert other.result() is None
    assert ran == ["other"]
