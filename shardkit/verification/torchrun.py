"""A sharded model over the ranks torchrun started: rank 0 leads, the others follow."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.loader import load
from shardkit.runtime.model_runner import fitted, tensors_of, uncached
from shardkit.runtime.trace import Trace
from shardkit.verification.dummy_inputs import make_inputs
from shardkit.verification.models import Tensors, greedy, judged, prompt

STOP, FORWARD, GENERATE, TRACE, SEARCH = range(5)
WORK = 24 * 3600.0  # seconds the unsharded model may take while the others wait for rank 0


class JoinedRanks:
    """Rank 0 calls the methods; every other rank calls `follow` and runs the same in step.

    Every rank makes the same inputs with the model, so only what to do is sent.
    """

    def __init__(self, group: TensorParallelGroup, folder: Path, dtype: torch.dtype | None) -> None:
        """Load this rank's shard.  Raises RanksError on every rank alike."""
        self.group = group
        self.tp_size = group.tp_size
        self.model: PreTrainedModel = load(folder, group=group, dtype=dtype)
        self.options = uncached(self.model)
        self.inputs = fitted(make_inputs(self.model), self.model, group.device)

    def load(self, _folder: Path, _dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of the model, which is loaded already."""
        found: torch.dtype = self.model.dtype
        return found

    def forward(self, _inputs: Tensors) -> Tensors:
        """The outputs that are judged, which every rank has."""
        self._tell(FORWARD)
        return self._forward()

    def generate(self, _inputs: Tensors, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy token ids, and the logits `[batch, step, vocabulary]` they were chosen from."""
        self._tell(GENERATE, steps)
        return self._generate(steps)

    def search(self, _inputs: Tensors, steps: int, beams: int) -> torch.Tensor:
        """The token ids that beam search finds."""
        self._tell(SEARCH, steps, beams)
        return self._search(steps, beams)

    def trace(self, _inputs: Tensors, _modules: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """What rank 0's modules put out."""
        self._tell(TRACE)
        return [self._trace()]

    def stop(self) -> None:
        """Let the other ranks go on."""
        self._tell(STOP)

    def follow(self) -> None:
        """Do what rank 0 does until it stops."""
        while True:
            told = self._hear()
            if told[0] == STOP:
                return
            if told[0] == FORWARD:
                self._forward()
            elif told[0] == GENERATE:
                self._generate(told[1])
            elif told[0] == SEARCH:
                self._search(told[1], told[2])
            else:
                self._trace()

    def _tell(self, what: int, *numbers: int) -> None:
        told = [what, *numbers, 0, 0][:3]
        if self.group.link is not None:
            self.group.link.tell(json.dumps(told))
        else:
            self.group.broadcast(torch.tensor(told))

    def _hear(self) -> list[int]:
        """What rank 0 tells next.  That may take long, so it is no collective: it must but live."""
        if self.group.link is None:
            found: list[int] = self.group.broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
            return found
        self.group.doing("waiting for rank 0")
        heard: list[int] = json.loads(self.group.link.listen(0, WORK))
        return heard

    def _forward(self) -> Tensors:
        with torch.inference_mode():
            found = judged(tensors_of(self.model(**self.inputs, **self.options)))
        return {name: value.cpu() for name, value in found.items()}

    def _generate(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            made = self.model.generate(
                **prompt(self.inputs), **greedy(steps), output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return made.sequences.cpu(), torch.stack(made.logits, 1).cpu()

    def _search(self, steps: int, beams: int) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self.model.generate(**prompt(self.inputs), **greedy(steps, beams))
        return found.cpu()

    def _trace(self) -> dict[str, torch.Tensor]:
        names = [name for name, _ in self.model.named_modules() if name]
        with torch.inference_mode(), Trace(self.model, names) as trace:
            self.model(**self.inputs, **self.options)
        return {name: value.cpu() for name, value in trace.outputs.items()}
