"""A process that has imported torch and forks ranks, each of which costs milliseconds to start.

    python -m tests.helpers.fork_server MODULE

reads a JSON object a line: `call`, a function of MODULE, its `arguments`, the `environment` to add
and the `log` that gets both outputs; and says, a line each, a rank's `pid` and, once it has ended,
its `code` and the monotonic time `at` which it did.  A rank ends as any interpreter does.
"""

import gc
import importlib
import json
import os
import selectors
import sys
import time
from typing import Any


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def become_rank(asked: dict[str, Any]) -> None:
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for at, fd in enumerate((null, log, log)):
        os.dup2(fd, at)
    os.environ.update(asked["environment"])


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        say(ended=pid, code=os.waitstatus_to_exitcode(status), at=time.monotonic())


def serve() -> dict[str, Any] | None:
    """Fork ranks as asked.  Returns in each of them what it was asked, and None once no more is."""
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        reap()
        if not selector.select(0.02):
            continue
        line = sys.stdin.readline()
        if not line:
            return None
        asked: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become_rank(asked)
            return asked
        say(pid=pid)


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    gc.freeze()  # what is there already need not be collected as a rank ends
    say(ready=os.getpid())
    if asked := serve():
        sys.exit(getattr(module, asked["call"])(**asked["arguments"]))
