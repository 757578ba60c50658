"""Fails requests at their deadlines, whatever the thread that runs them waits for."""

import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable

from shardkit.errors import RequestTimeout
from shardkit.runtime.engine.handle import Handle

FEW = 256  # deadlines that are kept though their requests have ended


class DeadlineMonitor:
    """A thread that fails each request at its deadline, whatever the engine's thread waits for.

    Args:
        describe_cause: Why a request may be late, in words; "" if no cause is known.
    """

    def __init__(self, describe_cause: Callable[[], str]) -> None:
        self._describe_cause = describe_cause
        self._heap: list[tuple[float, int, weakref.ref[Handle]]] = []
        self._most = FEW
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def add(self, handle: Handle) -> None:
        """Watch a request, if it has a deadline."""
        if handle.deadline is None:
            return
        with self._changed:
            if len(self._heap) > self._most:
                self._forget_done()
            entry = (handle.deadline, next(self._numbers), weakref.ref(handle))
            heapq.heappush(self._heap, entry)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="shardkit-deadlines", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (wait := self._seconds_left()) > 0:
                    self._changed.wait(wait if wait < threading.TIMEOUT_MAX else None)
                if self._is_closed:
                    return
                handle = heapq.heappop(self._heap)[2]()
            if handle is not None and not handle.done:
                cause = self._describe_cause()
                text = f"the request did not finish within {handle.timeout:g} s"
                handle.fail(RequestTimeout(text + (f": {cause}" if cause else "")))

    def _forget_done(self) -> None:
        open_ones = [e for e in self._heap if (handle := e[2]()) is not None and not handle.done]
        heapq.heapify(open_ones)
        self._heap, self._most = open_ones, max(FEW, 2 * len(open_ones))

    def _seconds_left(self) -> float:
        return self._heap[0][0] - time.monotonic() if self._heap else threading.TIMEOUT_MAX
