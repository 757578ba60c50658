"""What ranks tell each other outside their collectives, because a collective may be what fails.

Every half second each rank writes a heartbeat with its status to the rendezvous store; ranks
exchange reports before their first collective; and when a collective fails they find out which rank
is missing. A store that does not answer is a fault like any other: nothing here waits forever.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.distributed.diagnosis import (
    RankState,
    explain_failure,
    name_silent,
    rank_list,
)
from shardkit.runtime.distributed.rendezvous import RankStore, connect_store
from shardkit.timeouts import Timeouts

HEARTBEAT = 0.5  # seconds between two heartbeats
ROLL_CALL = 2.0  # seconds in which a rank that is alive gives one
LEAVE = 5.0  # seconds that a rank waits for the others to leave, too
POLL = 0.01
EXITED_NORMALLY = "exited normally before the others"

Texts = Mapping[int, str]


class Link:
    """One rank's connection to the others through the store."""

    def __init__(self, rank: int, size: int, timeouts: Timeouts) -> None:
        """Reach the store. Raises RanksError."""
        self.rank, self.size, self.timeouts = rank, size, timeouts
        self.status = "joining"  # what this rank is doing, for the others to know
        self.store = RankStore(rank, timeouts.join, timeouts.collective)
        self._others = [other for other in range(size) if other != rank]
        self._num_exchanges = self._num_published = 0
        self._monitor = LivenessMonitor(timeouts.collective)
        self._closed = threading.Event()
        self._heartbeats = connect_store(False, timeouts.join)
        self._thread = threading.Thread(target=self._beat, name="shardkit-heartbeat", daemon=True)
        self._thread.start()

    def join(self, report: str, differ: Callable[[Texts], object]) -> dict[int, str]:
        """The first exchange: every rank's report of itself.

        If the reports `differ`, those that have come are returned soon: ranks with different world
        sizes wait for ranks that do not exist.

        Raises:
            RanksError: A rank does not come, or was started twice.
        """
        if self.store.add(f"claim/{self.rank}") > 1:
            fault = f"rank {self.rank} was started twice"
            self.store.set("fault", fault)
            raise RanksError(fault)
        self.store.set(f"report/{self.rank}", report)
        return self._gather(self._keys("report"), self.timeouts.join, differ)

    def all_exchange(self, text: str, limit: float) -> dict[int, str]:
        """Every rank's text, by rank.

        Returns once every rank has read them, so that none takes the store from another.

        Raises:
            RanksError: A rank does not come within `limit` seconds; the message names it.
        """
        turn, self._num_exchanges = f"turn/{self._num_exchanges}", self._num_exchanges + 1
        self.store.set(f"{turn}/{self.rank}", text)
        texts = self._gather(self._keys(turn), limit)
        self.store.set(f"{turn}/read/{self.rank}", "1")
        self._gather(self._keys(f"{turn}/read"), limit)
        return texts

    def publish(self, text: str) -> None:
        """Give the ranks that `wait_for` this one its next text."""
        self.store.set(f"published/{self._num_published}", text)
        self._num_published += 1

    def wait_for(self, rank: int, limit: float) -> str:
        """The next text that a rank publishes. Waits while it is alive, at most `limit` seconds.

        Raises:
            RanksError: It left, died, or published nothing in time.
        """
        text = self._gather({rank: f"published/{self._num_published}"}, limit)[rank]
        self._num_published += 1
        return text

    def check_others(self) -> None:
        """Raise RanksError if another rank has left, or has given no heartbeat for too long."""
        self._check(self._monitor, self._keys("never", self._others))

    def diagnose(self, collective: str, error: str, close: Callable[[], None]) -> str:
        """Why a collective failed, in words that name the rank.

        `close` must close the process group: ranks that are still in the collective then fail, too,
        and report it.
        """
        self.store.patience = ROLL_CALL
        try:
            self.store.set(f"failed/{self.rank}", collective)
            close()
            states = self._call_roll()
        except RanksError as fault:
            close()
            return f"{fault} ({collective}: {error})"
        return explain_failure(collective, error, self.timeouts.collective, states)

    def leave(self, failure: str, close: Callable[[], None]) -> None:
        """Tell the others why this rank ends, and `close` its process group.

        A rank that is still in its last collective fails when another closes the group, so ranks
        wait for each other; but one with a `failure` closes it at once, for the others to learn of.
        """
        error = getattr(sys, "last_value", None)  # what ends the interpreter, if anything does
        departure = f"stopped: {failure}" if failure else EXITED_NORMALLY
        if error is not None:
            departure = f"exited: {type(error).__name__}: {error}".split("\n")[0]
        failed = bool(failure) or error is not None
        self.store.patience = ROLL_CALL
        try:
            self.store.set(f"left/{self.rank}", departure)
            if failed:
                close()
            if not failed or self.store.is_host:
                self._wait_until_all_left(ROLL_CALL + 1 if failed else LEAVE)
        except RanksError:
            pass  # the store is gone, and so is the rank that hosted it
        close()
        self._closed.set()
        self._thread.join(ROLL_CALL)
        self.store.close()

    def _keys(self, name: str, ranks: Iterable[int] | None = None) -> dict[int, str]:
        return {r: f"{name}/{r}" for r in (range(self.size) if ranks is None else ranks)}

    def _gather(
        self,
        keys: Mapping[int, str],
        limit: float,
        differ: Callable[[Texts], object] = lambda texts: False,
    ) -> dict[int, str]:
        """The texts of all keys once they are set, or of those that have come if they `differ`."""
        texts: dict[int, str] = {}
        monitor = LivenessMonitor(self.timeouts.collective)
        start = time.monotonic()
        end = start + limit
        while missing := {r: key for r, key in keys.items() if r not in texts}:
            if new := self.store.read(missing):
                texts |= new
                end = min(end, time.monotonic() + ROLL_CALL) if differ(texts) else end
                continue
            self._check(monitor, missing)
            if time.monotonic() > end:
                if differ(texts):
                    return texts
                raise RanksLost(self._describe_missing(list(missing), texts, monitor, limit))
            time.sleep(POLL if time.monotonic() < start + 1 else 10 * POLL)
        self._check(monitor, {})
        return texts

    def _check(self, monitor: "LivenessMonitor", missing: Mapping[int, str]) -> None:
        """Raise RanksError if ranks will never set these keys."""
        for fault in self.store.read({0: "fault"}).values():
            raise RanksError(fault)
        if departures := self.store.read(self._keys("left", missing)):
            # A rank may have set its key just before it left.
            texts = self.store.read({rank: missing[rank] for rank in departures})
            for rank in departures.keys() - texts.keys():
                raise RanksLost(f"rank {rank} {departures[rank]}")
        if overdue := monitor.overdue(self.store.read(self._keys("heartbeat", missing))):
            raise RanksLost(f"{name_silent(overdue)} for {monitor.limit:g} s")

    def _describe_missing(
        self, missing: list[int], texts: Texts, monitor: "LivenessMonitor", limit: float
    ) -> str:
        if self.status == "joining":
            joined = f"; of {self.size}, {rank_list(texts)} joined" if texts else ""
            return f"{rank_list(missing)} did not join within {limit:g} s{joined}"
        status = monitor.status(missing[0])
        return f"{rank_list(missing)} did not report within {limit:g} s ({status})"

    def _call_roll(self) -> dict[int, RankState]:
        """What became of the other ranks: they failed as well, left, are alive, or are not."""
        before = self.store.read(self._keys("heartbeat", self._others))
        end = time.monotonic() + ROLL_CALL
        while True:
            failed = self.store.read(self._keys("failed", self._others))
            left = self.store.read(self._keys("left", self._others))
            if len(failed | left) == len(self._others) or time.monotonic() > end:
                break
            time.sleep(5 * POLL)
        now = self.store.read(self._keys("heartbeat", self._others))
        return {
            rank: RankState(
                failed.get(rank),
                left.get(rank),
                before.get(rank) != now.get(rank),
                _read_status(now.get(rank)),
            )
            for rank in self._others
        }

    def _wait_until_all_left(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self.store.read(self._keys("left"))) == self.size:
                return
            time.sleep(POLL)

    def _beat(self) -> None:
        """Write heartbeats until this rank leaves."""
        count = 0
        while not self._closed.wait(HEARTBEAT if count else 0):
            try:
                self._heartbeats.set(f"heartbeat/{self.rank}", f"{count} {self.status}")
            except (RuntimeError, OSError):
                return  # the store is gone, and whoever needs it reports that
            count += 1


class LivenessMonitor:
    """Heartbeats of ranks, and which ranks have given none for `limit` seconds."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._last: dict[int, tuple[str, float]] = {}

    def overdue(self, heartbeats: Texts) -> list[int]:
        """The ranks whose last heartbeat is too old."""
        now = time.monotonic()
        for rank, heartbeat in heartbeats.items():
            if self._last.get(rank, ("", 0.0))[0] != heartbeat:
                self._last[rank] = heartbeat, now
        return [rank for rank in heartbeats if now - self._last[rank][1] > self.limit]

    def status(self, rank: int) -> str:
        """What a rank was doing at its last heartbeat."""
        return _read_status(self._last.get(rank, ("", 0.0))[0])


def _read_status(heartbeat: str | None) -> str:
    return (heartbeat or "").partition(" ")[2] or "no heartbeat yet"
