"""A model whose ranks this process started: logits, generation, token streaming."""

import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shardkit.errors import ManifestError
from shardkit.runtime.engine.messages import forward_request, generate_request, load_request
from shardkit.runtime.engine.rank_processes import OnTokens, RankProcesses
from shardkit.runtime.engine.text_decoder import decode_stream
from shardkit.runtime.packing import Dequantize, check_dequantize
from shardkit.shards.manifest_json import read_manifest
from shardkit.timeouts import DEFAULT_TIMEOUTS, Timeouts

Prompt = str | Sequence[int] | torch.Tensor
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)


def launch(
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    verify: bool = False,
    dequantize: Dequantize = "forward",
) -> "Engine":
    """Start the ranks of a shard folder on this host, one process each, and load the model.

    The ranks end with this process, however it ends.

    Args:
        folder: A shard folder; as many ranks are started as it was split for.
        device: "cpu" or "cuda"; None means the GPUs, if there are any.
        dtype: What to compute in; None means the checkpoint's own dtype.
        timeouts: How long to wait for the ranks.
        verify: Whether each rank checks the SHA-256 of its shard while loading it.
        dequantize: When quantized weights are computed: "forward" or "load", as `load` has it.

    Returns:
        The running model, to be closed or used in a `with`.

    Raises:
        ManifestError: The folder is not a finished split; no process is started.
        UsageError: `dequantize` is neither of the two.
        RanksError: A rank cannot load its shard, died, or did not answer in time; the message
            names the rank and the cause.

    Example:
        >>> with launch("llama-tp4") as engine:
        ...     for text in engine.stream("Once upon a time", max_new_tokens=64):
        ...         print(text, end="", flush=True)
    """
    check_dequantize(dequantize)
    manifest = read_manifest(Path(folder))
    ranks = RankProcesses(manifest.tp_size, device, timeouts)
    try:
        return Engine(Path(folder), ranks, dtype, verify, dequantize)
    except BaseException:
        ranks.close()
        raise


class Engine:
    """A running model, made by `launch`. Close it, or use it in a `with`.

    Several threads may use an engine; their requests run one after another. Every method raises
    RanksError if a rank fails, dies or does not answer in time; unless every rank has answered, the
    ranks are then stopped, and the model must be launched again.

    Attributes:
        folder: The shard folder.
        ranks: The rank processes.
        dtype: What the model computes in.
    """

    def __init__(
        self,
        folder: Path,
        ranks: RankProcesses,
        dtype: torch.dtype | None = None,
        verify: bool = False,
        dequantize: Dequantize = "forward",
    ) -> None:
        """Load `folder` into `ranks`, which the engine then owns."""
        self.folder = folder.resolve()
        self.ranks = ranks
        response = ranks.request(load_request(self.folder, dtype, verify, dequantize))[0]
        self.dtype: torch.dtype = getattr(torch, response.header["dtype"])
        if warning := response.header["warning"]:
            warnings.warn(warning, RuntimeWarning, stacklevel=3)  # where launch was called

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the ranks; a request that is running in another thread raises RanksError."""
        self.ranks.close()

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer. Raises ManifestError if it has none."""
        from transformers import AutoTokenizer

        if not has_tokenizer(self.folder):
            raise ManifestError(f"{self.folder}: no tokenizer; give token ids")
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """Run a forward pass.

        Args:
            **inputs: Arguments of the model's forward. Tensors are its inputs, such as `input_ids`
                `[B, T]` int64; other values are its options.

        Returns:
            The output tensors, by name: `logits` `[B, T, V]`, `last_hidden_state`, and so on.

        Raises:
            RanksError: The model refuses the inputs, or a rank is lost.
        """
        tensors = {name: v for name, v in inputs.items() if isinstance(v, torch.Tensor)}
        options = {name: v for name, v in inputs.items() if name not in tensors}
        return dict(self.ranks.request(forward_request(tensors, options))[0].tensors)

    def logits(self, prompt: Prompt) -> torch.Tensor:
        """The logits of a prompt, `[B, T, V]`.

        Args:
            prompt: Text, token ids, or token ids `[B, T]`.

        Raises:
            ManifestError: The prompt is text, and the folder has no tokenizer.
            RanksError: The model refuses the inputs, or a rank is lost.
        """
        return self.forward(input_ids=self.input_ids(prompt))["logits"]

    def generate(self, prompt: Prompt, seed: int | None = None, **options: Any) -> torch.Tensor:
        """Generate tokens.

        Args:
            prompt: Text, token ids, or token ids `[B, T]`.
            seed: Makes sampling repeatable.
            **options: Arguments of transformers' `generate`, such as `max_new_tokens`,
                `do_sample` and `num_beams`.

        Returns:
            Token ids `[B, T]`, int64; those of the prompt come first for a decoder.

        Raises:
            ManifestError: The prompt is text, and the folder has no tokenizer.
            RanksError: The model refuses the inputs, or a rank is lost.
        """
        return self._generate(prompt, seed, options)

    def stream(self, prompt: Prompt, seed: int | None = None, **options: Any) -> Iterator[Any]:
        """Generate tokens, and return each as soon as there is one.

        A caller may stop iterating at any time: the ranks then stop one or two steps later, and the
        engine is ready for the next request.

        Args:
            prompt: Text or token ids; one sequence.
            seed: Makes sampling repeatable.
            **options: Arguments of transformers' `generate`.

        Yields:
            Pieces of text for a text prompt, token ids (int) for token ids; without the prompt.

        Raises:
            ManifestError: The prompt is text, and the folder has no tokenizer.
            RanksError: The model refuses the inputs, or a rank is lost.
        """
        events: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        abandoned = threading.Event()

        def put_tokens(ids: list[int]) -> bool:
            events.put(ids)
            return not abandoned.is_set()

        def run() -> None:
            try:
                self._generate(prompt, seed, options, put_tokens)
                events.put(None)
            except BaseException as error:
                events.put(error)

        threading.Thread(target=run, name="shardkit-stream").start()
        ids = _read_tokens(events)
        try:
            yield from decode_stream(self.tokenizer, ids) if isinstance(prompt, str) else ids
        except (KeyboardInterrupt, SystemExit):
            self.ranks.kill()
            raise
        finally:
            abandoned.set()

    def input_ids(self, prompt: Prompt) -> torch.Tensor:
        """A prompt as token ids `[B, T]`, int64. Raises ManifestError without a tokenizer."""
        if isinstance(prompt, str):
            return torch.tensor(self.tokenizer([prompt])["input_ids"])
        ids = prompt if isinstance(prompt, torch.Tensor) else torch.tensor(list(prompt))
        return ids if ids.ndim == 2 else ids.unsqueeze(0)

    def _generate(
        self,
        prompt: Prompt,
        seed: int | None,
        options: dict[str, Any],
        on_tokens: OnTokens | None = None,
    ) -> torch.Tensor:
        ids = self.input_ids(prompt)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tensors |= {name: v for name, v in options.items() if isinstance(v, torch.Tensor)}
        others = {name: v for name, v in options.items() if name not in tensors}
        request = generate_request(tensors, others, seed=seed, stream=on_tokens is not None)
        return self.ranks.request(request, on_tokens)[0].tensors["ids"]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _read_tokens(events: "queue.Queue[list[int] | BaseException | None]") -> Iterator[int]:
    """Token ids until None comes; an error is raised."""
    while (event := events.get()) is not None:
        if isinstance(event, BaseException):
            raise event
        yield from event
