"""What ranks tell each other beside their collectives, which may be what fails.

Through the rendezvous store each rank says every half second that it lives and what it does; ranks
exchange reports before their first collective; and when a collective fails they find out who is
missing.  A store that does not answer is a fault like any other: nothing here waits for ever.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from shardkit.errors import RanksError, RanksLost
from shardkit.runtime.distributed.diagnosis import State, blame, named
from shardkit.runtime.distributed.rendezvous import RankStore, connect_store
from shardkit.timeouts import Timeouts

BEAT = 0.5  # seconds between two signs of life
ROLL_CALL = 2.0  # seconds in which a rank that lives gives one
LEAVE = 5.0  # seconds a rank that is done waits for the others to be done
POLL = 0.01

Reports = Mapping[int, str]


class Link:
    """One rank among the others in the store."""

    def __init__(self, rank: int, size: int, timeouts: Timeouts) -> None:
        """Reach the store.  Raises RanksError."""
        self.rank, self.size, self.timeouts = rank, size, timeouts
        self.at: tuple[object, ...] = ("joining",)  # what this rank does, for the others to know
        self.store = RankStore(rank, timeouts.join, timeouts.collective)
        self._others = [other for other in range(size) if other != rank]
        self._turns = self._told = 0
        self._gone = threading.Event()
        self._beats = connect_store(False, timeouts.join)
        self._beating = threading.Thread(target=self._beat, name="shardkit-beat", daemon=True)
        self._beating.start()

    def meet(self, mine: str, differ: Callable[[Reports], object]) -> dict[int, str]:
        """The first exchange: what every rank says of itself.

        Where some differ, those that came end it: they may be waiting for others than there are.
        Raises RanksError for a rank that does not come, and for one that was started twice.
        """
        if self.store.add(f"claim/{self.rank}") > 1:
            twice = f"rank {self.rank} was started twice"
            self.store.set("fault", twice)
            raise RanksError(twice)
        self.store.set(f"hello/{self.rank}", mine)
        return self._gather(self._keys("hello"), self.timeouts.join, differ)

    def exchange(self, mine: str, limit: float) -> dict[int, str]:
        """What every rank says in this turn.  Raises RanksError, naming who does not in `limit`.

        Returns once all have read it, so that none takes the store away from under another.
        """
        turn, self._turns = f"turn/{self._turns}", self._turns + 1
        self.store.set(f"{turn}/{self.rank}", mine)
        said = self._gather(self._keys(turn), limit)
        self.store.set(f"{turn}/read/{self.rank}", "1")
        self._gather(self._keys(f"{turn}/read"), limit)
        return said

    def tell(self, text: str) -> None:
        """Say something to the ranks that listen, which then do it."""
        self.store.set(f"told/{self._told}", text)
        self._told += 1

    def listen(self, rank: int, limit: float) -> str:
        """What a rank tells next; waits while it lives, at most `limit` s.  Raises RanksError."""
        told = self._gather({rank: f"told/{self._told}"}, limit)[rank]
        self._told += 1
        return told

    def explain(self, doing: str, error: str, close: Callable[[], None]) -> str:
        """Why a collective failed, in words that name the rank.

        `close` the group first: ranks that are still in the collective then fail, too, and tell.
        """
        self.store.patience = ROLL_CALL
        try:
            self.store.set(f"failed/{self.rank}", doing)
            close()
            states = self._roll_call()
        except RanksError as fault:
            close()
            return f"{fault} ({doing}: {error})"
        return blame(doing, error, self.timeouts.collective, states)

    def leave(self, lost: str, close: Callable[[], None]) -> None:
        """Say that this rank ends and why, and `close` its group; `lost` is why it is no use now.

        A rank still in its last collective fails when its peer closes the group, so peers wait for
        each other; but one that fails closes it at once, for the others to know.
        """
        error = getattr(sys, "last_value", None)  # what ends the interpreter, if anything does
        reason = f"{type(error).__name__}: {error}".split("\n")[0] if error else lost or "it ended"
        failed = bool(lost) or error is not None
        self.store.patience = ROLL_CALL
        try:
            self.store.set(f"left/{self.rank}", reason)
            if failed:
                close()
            if not failed or self.store.here:
                self._wait_for_leavers(ROLL_CALL + 1 if failed else LEAVE)
        except RanksError:
            pass  # the store is gone, and whoever kept it
        close()
        self._gone.set()
        self._beating.join(ROLL_CALL)
        self.store.close()

    def _keys(self, name: str, ranks: Iterable[int] | None = None) -> dict[int, str]:
        return {r: f"{name}/{r}" for r in (range(self.size) if ranks is None else ranks)}

    def _gather(
        self,
        keys: Mapping[int, str],
        limit: float,
        differ: Callable[[Reports], object] = lambda said: False,
    ) -> dict[int, str]:
        """The texts of all keys once they are set, or of those that came where they `differ`."""
        said: dict[int, str] = {}
        watch = Watch(self.timeouts.collective)
        began = time.monotonic()
        end = began + limit
        while missing := {r: key for r, key in keys.items() if r not in said}:
            if new := self.store.read(missing):
                said |= new
                end = min(end, time.monotonic() + ROLL_CALL) if differ(said) else end
                continue
            self._check(watch, missing)
            if time.monotonic() > end:
                if differ(said):
                    return said
                raise RanksLost(self._overdue(list(missing), said, watch, limit))
            time.sleep(POLL if time.monotonic() < began + 1 else 10 * POLL)
        self._check(watch, {})
        return said

    def _check(self, watch: "Watch", missing: Mapping[int, str]) -> None:
        """Raise RanksError if waiting for these keys of ranks is vain."""
        for fault in self.store.read({0: "fault"}).values():
            raise RanksError(fault)
        if left := self.store.read(self._keys("left", missing)):
            spoke = self.store.read({rank: missing[rank] for rank in left})  # before it left
            for rank in left.keys() - spoke.keys():
                raise RanksLost(f"rank {rank} left: {left[rank]}")
        if quiet := watch.quiet(self.store.read(self._keys("beat", missing))):
            raise RanksLost(
                f"{named(quiet)} died or is stopped: no sign of life for {watch.limit:g} s"
            )

    def _overdue(self, missing: list[int], said: Reports, watch: "Watch", limit: float) -> str:
        if self.at == ("joining",):
            here = f"; of {self.size}, {named(said)} came" if said else ""
            return f"{named(missing)} did not join within {limit:g} s{here}"
        return f"{named(missing)} did not report within {limit:g} s ({watch.doing(missing[0])})"

    def _roll_call(self) -> dict[int, State]:
        """What became of the other ranks: they failed as well, or left, or live, or do not."""
        before = self.store.read(self._keys("beat", self._others))
        end = time.monotonic() + ROLL_CALL
        while True:
            failed = self.store.read(self._keys("failed", self._others))
            left = self.store.read(self._keys("left", self._others))
            if len(failed | left) == len(self._others) or time.monotonic() > end:
                break
            time.sleep(5 * POLL)
        now = self.store.read(self._keys("beat", self._others))
        return {
            r: State(failed.get(r), left.get(r), before.get(r) != now.get(r), _doing(now.get(r)))
            for r in self._others
        }

    def _wait_for_leavers(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self.store.read(self._keys("left"))) == self.size:
                return
            time.sleep(POLL)

    def _beat(self) -> None:
        """Say every half second that this rank lives and what it does, until it leaves."""
        count = 0
        while not self._gone.wait(BEAT if count else 0):
            try:
                self._beats.set(f"beat/{self.rank}", f"{count} {' '.join(map(str, self.at))}")
            except (RuntimeError, OSError):
                return  # the store is gone, and whoever needs it says so
            count += 1


class Watch:
    """Signs of life, and which ranks have given none for `limit` seconds."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._last: dict[int, tuple[str, float]] = {}

    def quiet(self, beats: Reports) -> list[int]:
        """Those that have beaten before, but not lately."""
        now = time.monotonic()
        for rank, beat in beats.items():
            if self._last.get(rank, ("", 0.0))[0] != beat:
                self._last[rank] = beat, now
        return [rank for rank in beats if now - self._last[rank][1] > self.limit]

    def doing(self, rank: int) -> str:
        """What a rank last said it does."""
        return _doing(self._last.get(rank, ("", 0.0))[0])


def _doing(beat: str | None) -> str:
    return (beat or "").partition(" ")[2] or "never heard of"
