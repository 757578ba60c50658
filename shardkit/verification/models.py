"""The two models that are compared: the unsharded one here, the sharded one over its ranks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from shardkit.errors import CheckpointError
from shardkit.runtime.config import read_source_config
from shardkit.runtime.engine.rank_processes import Ranks
from shardkit.runtime.layers.experts import choose_expert_kernel
from shardkit.runtime.loader import resolve_model_class
from shardkit.runtime.model_runner import fitted, tensors_of, uncached
from shardkit.runtime.trace import Trace

Tensors = Mapping[str, torch.Tensor]
CPU = torch.device("cpu")


class Sharded(Protocol):
    """A model over its ranks."""

    tp_size: int

    def load(self, folder: Path, dtype: torch.dtype | None) -> torch.dtype:
        """Load a shard folder; the dtype it has.  Raises RanksError."""

    def forward(self, inputs: Tensors) -> Tensors:
        """The outputs that are judged, which every rank has."""

    def generate(self, inputs: Tensors, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy token ids, and the logits `[batch, step, vocabulary]` they were chosen from."""

    def search(self, inputs: Tensors, steps: int, beams: int) -> torch.Tensor:
        """The token ids that beam search finds."""

    def trace(self, inputs: Tensors, modules: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """For each rank, what the named modules put out."""


class LocalRanks:
    """A sharded model on ranks started on this host."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.tp_size = ranks.size

    def load(self, folder: Path, dtype: torch.dtype | None) -> torch.dtype:
        """Load a shard folder; the dtype it has.  Raises RanksError."""
        name = "" if dtype is None else str(dtype).removeprefix("torch.")
        answers = self.ranks.ask("load", folder=str(folder.resolve()), dtype=name)
        found: torch.dtype = getattr(torch, answers[0].header["dtype"])
        return found

    def forward(self, inputs: Tensors) -> Tensors:
        """The outputs that are judged, which every rank has."""
        return judged(self.ranks.ask("forward", inputs, options=None)[0].tensors)

    def generate(self, inputs: Tensors, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy token ids, and the logits `[batch, step, vocabulary]` they were chosen from."""
        found = self.ranks.ask(
            "generate", prompt(inputs), options=greedy(steps), seed=None, stream=False,
            with_logits=True,
        )[0].tensors  # fmt: skip
        return found["ids"], found["logits"]

    def search(self, inputs: Tensors, steps: int, beams: int) -> torch.Tensor:
        """The token ids that beam search finds."""
        return self.ranks.ask(
            "generate", prompt(inputs), options=greedy(steps, beams), seed=None, stream=False,
            with_logits=False,
        )[0].tensors["ids"]  # fmt: skip

    def trace(self, inputs: Tensors, modules: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """For each rank, what the named modules put out."""
        answers = self.ranks.ask("trace", inputs, modules=list(modules), options=None)
        return [dict(answer.tensors) for answer in answers]


class Unsharded:
    """The whole model, in this process, in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Load it with transformers.  Raises CheckpointError for weights it would make up."""
        config = read_source_config(folder)
        model, info = resolve_model_class(config).from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        self.model: PreTrainedModel = model.eval()
        choose_expert_kernel(self.model)
        if dtype == torch.float64:  # a few classes make parameters that stay float32
            for parameter in self.model.parameters():
                parameter.data = parameter.data.double()
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{folder}: {missing[0]} is not in the checkpoint")

    def forward(self, inputs: Tensors) -> Tensors:
        """The outputs that are judged."""
        with self._running():
            return judged(tensors_of(self._run(inputs)))

    def generate(self, inputs: Tensors, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy token ids, and the logits `[batch, step, vocabulary]` they were chosen from."""
        with self._running():
            made: Any = self.model.generate(
                **fitted(prompt(inputs), self.model, CPU),
                **greedy(steps),
                output_logits=True,
                return_dict_in_generate=True,
            )
        return made.sequences, torch.stack(made.logits, 1)

    def search(self, inputs: Tensors, steps: int, beams: int) -> torch.Tensor:
        """The token ids that beam search finds."""
        with self._running():
            found: torch.Tensor = self.model.generate(
                **fitted(prompt(inputs), self.model, CPU), **greedy(steps, beams)
            )
        return found

    def trace(self, inputs: Tensors, modules: Iterable[str]) -> dict[str, torch.Tensor]:
        """What the named modules put out, in the order they ran."""
        with self._running(), Trace(self.model, modules) as trace:
            self._run(inputs)
        return trace.outputs

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Without gradients; in float64, so are the constants that models make as they run."""
        before = torch.get_default_dtype()
        if self.model.dtype == torch.float64:
            torch.set_default_dtype(torch.float64)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_default_dtype(before)

    def _run(self, inputs: Tensors) -> Any:
        return self.model(**fitted(inputs, self.model, CPU), **uncached(self.model))


def judged(outputs: Tensors) -> Tensors:
    """The outputs of a model that are judged: all that are numbers, not ids."""
    return {name: value for name, value in outputs.items() if value.is_floating_point()}


def prompt(inputs: Tensors) -> dict[str, torch.Tensor]:
    """What generate takes of a forward's inputs."""
    return {name: value for name, value in inputs.items() if name != "decoder_input_ids"}


def greedy(steps: int, beams: int = 1) -> dict[str, Any]:
    """Generate exactly `steps` tokens, the likeliest each, or the likeliest of some beams."""
    return {
        "do_sample": False, "num_beams": beams, "max_new_tokens": steps, "min_new_tokens": steps,
        "pad_token_id": 0,
    }  # fmt: skip
