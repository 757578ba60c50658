"""What a rank process writes to its outputs: each line goes to the log, and the last is kept."""

import logging
import os
import threading

LINE_BYTES = 4096  # of a line; a longer one is several
log = logging.getLogger(__name__)


class RankOutput:
    """A pipe for a rank's stdout and stderr, and the thread that empties it.

    A `with` has the descriptor to start the rank with; then the rank alone has it.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._last = rank, ""
        reader, self._fd = os.pipe()
        self._pipe = os.fdopen(reader, "rb")
        self._thread = threading.Thread(target=self._relay, name="shardkit-output", daemon=True)
        self._thread.start()

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_last_line(self, seconds: float) -> str:
        """The last line of a rank that has ended, waiting for it at most so long; "" for none."""
        self._thread.join(seconds)
        return self._last

    def close(self, seconds: float) -> None:
        """Wait until all of a rank that has ended is in the log, at most so long."""
        self._thread.join(seconds)

    def _relay(self) -> None:
        with self._pipe as lines:
            while line := lines.readline(LINE_BYTES):
                if text := line.decode(errors="replace").strip():
                    self._last = text
                    log.info("rank %d: %s", self._rank, text)
