"""How a running generate is stopped on every rank at the same step, at no cost per token.

The controller and its ranks share two numbers in memory. The controller sets the first: it wants no
more tokens. Rank 0 looks at it after each step, and on finding it set after step s, writes s + 1
into the second as the last step, before it begins that step. Every rank looks at the second after
each step. None can finish step s + 1, whose collectives need rank 0, before rank 0 has begun it, so
each of them finds the number there after step s + 1 and not a step earlier or later. No message and
no collective is added.
"""

import mmap
import os
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria

SIZE = 16  # bytes: two int64
NEVER = 0  # no last step yet; steps count from 1


class StopFlag:
    """Two numbers that the processes that map one file descriptor share."""

    def __init__(self, fd: int) -> None:
        """Map the memory of `fd`, which `create` has made here or in another process."""
        self.fd = fd
        self._memory = mmap.mmap(fd, SIZE)
        self._numbers = memoryview(self._memory).cast("q")  # aligned: one store or load each

    @classmethod
    def create(cls) -> "StopFlag":
        """New shared memory without a name, which ends with the last process that maps it."""
        fd = os.memfd_create("shardkit-stop", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        return cls(fd)

    @property
    def requested(self) -> bool:
        """Whether the controller wants no more tokens."""
        return bool(self._numbers[0])

    @property
    def last_step(self) -> int:
        """The step after which every rank stops, from 1; NEVER while none is decided."""
        return self._numbers[1]

    @last_step.setter
    def last_step(self, step: int) -> None:
        self._numbers[1] = step

    def request(self) -> None:
        """Ask rank 0 to stop the generate that is running."""
        self._numbers[0] = 1

    def clear(self) -> None:
        """Forget the request and the step; no rank may be generating."""
        self._numbers[0], self._numbers[1] = 0, NEVER

    def close(self) -> None:
        """Unmap the memory and close the descriptor; doing so again does nothing."""
        if self.fd >= 0:
            self._numbers.release()
            self._memory.close()
            os.close(self.fd)
            self.fd = -1


class StopOnFlag(StoppingCriteria):  # type: ignore[misc]
    """Stops a generate on every rank after the same step, once the controller has asked for it."""

    def __init__(self, flag: StopFlag, tp_rank: int) -> None:
        self.flag = flag
        self.tp_rank = tp_rank
        self.steps = 0

    def __call__(
        self, input_ids: torch.Tensor, scores: Any, **_options: object
    ) -> torch.BoolTensor:
        """Whether each sequence `[B]` is done, given the token ids `[B, T]` so far."""
        self.steps += 1
        # On a GPU this waits until the step's collectives are done, as the argument above needs.
        input_ids[:, -1].cpu()
        stop = self.flag.last_step != NEVER and self.steps >= self.flag.last_step
        if self.tp_rank == 0 and self.flag.requested and self.flag.last_step == NEVER:
            self.flag.last_step = self.steps + 1
        done = torch.full((len(input_ids),), stop, device=input_ids.device, dtype=torch.bool)
        return done  # type: ignore[return-value]
