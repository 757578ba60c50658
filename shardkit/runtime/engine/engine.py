"""One process that controls a model whose ranks it started: logits, generate, token streaming."""

import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shardkit.errors import ManifestError, ShardkitError
from shardkit.runtime.distributed.group import DEFAULT
from shardkit.runtime.engine.rank_processes import Ranks
from shardkit.shards.manifest_json import read_manifest
from shardkit.timeouts import Timeouts

Prompt = str | Sequence[int] | torch.Tensor


def launch(
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    timeouts: Timeouts = DEFAULT,
    verify: bool = False,
) -> "Engine":
    """Start the ranks of a shard folder on this host, as many as it was split for.

    With `verify` each rank hashes the bytes that it loads.  Raises ManifestError before a process
    is started where the folder is not whole, and RanksError, naming the rank and the cause, where a
    rank cannot load its part, then or later dies, or does not answer within `timeouts`.  The ranks
    end with this process, however it ends.
    """
    manifest = read_manifest(Path(folder))
    ranks = Ranks(manifest.tp_size, device, timeouts)
    try:
        return Engine(Path(folder), ranks, dtype, verify)
    except BaseException:
        ranks.close()
        raise


class Engine:
    """A running model.  Close it, or use it in a `with`."""

    def __init__(
        self, folder: Path, ranks: Ranks, dtype: torch.dtype | None = None, verify: bool = False
    ) -> None:
        """Load `folder` into `ranks`, which the engine then owns."""
        self.folder = folder.resolve()
        self.ranks = ranks
        name = "" if dtype is None else str(dtype).removeprefix("torch.")
        loaded = ranks.ask("load", folder=str(self.folder), dtype=name, verify=verify)
        self.dtype: torch.dtype = getattr(torch, loaded[0].header["dtype"])
        if slow := loaded[0].header["slow"]:
            warnings.warn(slow, RuntimeWarning, stacklevel=3)  # where launch was called

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the ranks."""
        self.ranks.close()

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer.  Raises ManifestError where there is none."""
        from transformers import AutoTokenizer

        if not has_tokenizer(self.folder):
            raise ManifestError(f"{self.folder}: no tokenizer; give token ids")
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """The model's output tensors, by name: `logits`, or `last_hidden_state`, and so on.

        Tensors are the model's inputs, `[batch, length]`; other values its options.
        """
        tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        options = {k: v for k, v in inputs.items() if k not in tensors}
        return dict(self.ranks.ask("forward", tensors, options=options)[0].tensors)

    def logits(self, prompt: Prompt) -> torch.Tensor:
        """The logits `[batch, length, vocabulary]` of a prompt."""
        return self.forward(input_ids=self.input_ids(prompt))["logits"]

    def generate(self, prompt: Prompt, seed: int | None = None, **options: Any) -> torch.Tensor:
        """Token ids `[batch, length]`, the prompt's first for a decoder.

        `options` are those of transformers' generate; `seed` fixes what is sampled.
        """
        return self._generate(prompt, seed, options, None)

    def stream(self, prompt: Prompt, seed: int | None = None, **options: Any) -> Iterator[Any]:
        """What is generated as it comes: text for a text prompt, token ids for token ids."""
        steps: queue.Queue[list[int] | BaseException | None] = queue.Queue()

        def run() -> None:
            try:
                self._generate(prompt, seed, options, steps.put)
                steps.put(None)
            except ShardkitError as error:
                steps.put(error)

        thread = threading.Thread(target=run, name="shardkit-stream")
        thread.start()
        try:
            ids = _until_done(steps)
            yield from self._texts(ids) if isinstance(prompt, str) else ids
        except (KeyboardInterrupt, SystemExit):
            self.ranks.kill()  # else the thread would end only with what it generates
            raise
        finally:
            thread.join()

    def input_ids(self, prompt: Prompt) -> torch.Tensor:
        """A prompt as token ids `[batch, length]`."""
        if isinstance(prompt, str):
            return torch.tensor(self.tokenizer([prompt])["input_ids"])
        ids = prompt if isinstance(prompt, torch.Tensor) else torch.tensor(list(prompt))
        return ids if ids.ndim == 2 else ids.unsqueeze(0)

    def _generate(
        self, prompt: Prompt, seed: int | None, options: dict[str, Any], on_token: Any
    ) -> torch.Tensor:
        ids = self.input_ids(prompt)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tensors |= {k: v for k, v in options.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in options.items() if k not in tensors}
        stream = on_token is not None
        header = {"options": rest, "seed": seed, "stream": stream, "with_logits": False}
        return self.ranks.ask("generate", tensors, on_token, **header)[0].tensors["ids"]

    def _texts(self, ids: Iterator[int]) -> Iterator[str]:
        """Text as it grows, held back while its last character is not whole."""
        seen: list[int] = []
        shown = ""
        for token in ids:
            seen.append(token)
            text = self.tokenizer.decode(seen, skip_special_tokens=True)
            if len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        rest = self.tokenizer.decode(seen, skip_special_tokens=True)[len(shown) :] if seen else ""
        if rest:
            yield rest


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.txt",
        "vocab.json",
    )
    return any((folder / name).exists() for name in names)


def _until_done(steps: "queue.Queue[list[int] | BaseException | None]") -> Iterator[int]:
    while (step := steps.get()) is not None:
        if isinstance(step, BaseException):
            raise step
        yield from step
