"""Threads that run the tasks of one kind one after another, and others meanwhile.

No thread waits for a task that is not its own: with two cores and a few threads, waiting ones would
leave a core without work.
"""

from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType

Task = Callable[[], None]


class SerialPool:
    """A pool of threads; to be used in a `with`, at whose end all tasks have ended.

    Example:
        >>> results = []
        >>> with SerialPool(4) as pool:
        ...     for number in range(3):
        ...         _ = pool.submit("file", lambda n=number: results.append(n))
        >>> results
        [0, 1, 2]
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "shardkit")
        self._lock = Lock()
        self._queues: dict[Hashable, deque[tuple[Future[None], Task]]] = {}
        self._faults: dict[Hashable, BaseException] = {}

    def __enter__(self) -> "SerialPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    def submit(self, key: Hashable, task: Task) -> Future[None]:
        """Run a task after all before it of the same key; if one of these fails, it fails alike."""
        future = Future[None]()
        with self._lock:
            queue = self._queues.get(key)
            if queue is not None:
                queue.append((future, task))
                return future
            self._queues[key] = deque([(future, task)])
        self._pool.submit(self._run_tasks, key)
        return future

    def _run_tasks(self, key: Hashable) -> None:
        """Run what there is of a key, until nothing is left."""
        while True:
            with self._lock:
                if not (queue := self._queues[key]):
                    del self._queues[key]
                    return
                future, task = queue.popleft()
            try:
                if (fault := self._faults.get(key)) is not None:
                    raise fault
                task()
            except BaseException as error:  # whoever waits for the task gets it
                self._faults[key] = error
                future.set_exception(error)
            else:
                future.set_result(None)
