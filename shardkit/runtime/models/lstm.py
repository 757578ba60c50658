"""A language model that transformers lacks: an embedding, a plain torch.nn.LSTM, a linear layer.

Its files name their tensors `embedding.weight`, `lstm.weight_ih_l0` and so on as torch does, and
`output.weight` and `output.bias`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

State = tuple[torch.Tensor, torch.Tensor]


class LSTMConfig(PreTrainedConfig):  # type: ignore[misc]
    """The widths of the model, as its config.json has them."""

    model_type = "lstm"
    attribute_map = {"num_hidden_layers": "num_layers"}  # noqa: RUF012  (as transformers has it)

    vocab_size: int = 32000
    embedding_size: int = 512
    hidden_size: int = 512
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


@dataclass
class LSTMOutput(ModelOutput):  # type: ignore[misc]
    """Logits `[batch, length, vocabulary]`, and where asked for the states after the last token."""

    logits: torch.Tensor | None = None
    state: State | None = None


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Predicts the next token from the hidden state of an LSTM."""

    config_class = LSTMConfig
    _is_stateful = True
    _tied_weights_keys = {"output.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LSTMConfig) -> None:
        """Raises ValueError for a config of an LSTM that would see what it is to predict."""
        super().__init__(config)
        if config.bidirectional:
            raise ValueError(
                "a language model's LSTM reads in one direction: bidirectional is true"
            )
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(
            config.embedding_size, config.hidden_size, config.num_layers, config.bias,
            batch_first=True,
        )  # fmt: skip
        self.output = nn.Linear(config.hidden_size, config.vocab_size, config.bias)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> LSTMOutput:
        """Token ids `[batch, length]` to logits; `state` is what an earlier forward gave.

        Raises ValueError for a mask that leaves tokens out: an LSTM reads them all.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("an LSTM reads every token: it cannot leave out padding")
        hidden, state = self.lstm(self.embedding(input_ids), state)
        kept = self.config.use_cache if use_cache is None else use_cache
        return LSTMOutput(logits=self.output(hidden), state=state if kept else None)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Of keys and values it has none: generate keeps `state` instead."""
        return False

    def _reorder_cache(self, state: State, beams: torch.Tensor) -> State:
        """The states of other beams, for beam search."""
        h, c = (part.index_select(1, beams.to(part.device)) for part in state)
        return h, c


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
