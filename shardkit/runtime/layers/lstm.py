"""torch.nn.LSTM, its hidden units divided over the ranks.

A rank computes the gates of its own units. Every unit's next state needs the whole hidden state,
so each time step of each layer and direction costs one all-gather. So many small exchanges are
slow: dividing an LSTM saves memory, and time only if it is very wide.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from shardkit.errors import ManifestError
from shardkit.layout import Section, num_indices
from shardkit.planning import Mesh, Placement
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.linear import convert_class

State = tuple[torch.Tensor, torch.Tensor]
GATES = 4  # i, f, g and o, torch.nn.LSTM


class ParallelLSTM(nn.LSTM):
    """Each rank has its own hidden units; outputs and hidden states are whole on every rank.

    The cell state, which only its own unit reads, stays the rank's own, as a cache of keys does.
    """

    group: TensorParallelGroup
    sizes: tuple[int, ...]

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, hx: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """`[length, batch, in]`, or batch first, to `[length, batch, hidden]` and the last states.

        Of `hx`, `h_0` is whole; `c_0` may be whole or, as this module returns it, the rank's own.
        """
        x = input.transpose(0, 1) if self.batch_first else input
        h0, c0 = self._start(x) if hx is None else (hx[0], self._own(hx[1]))
        directions = 2 if self.bidirectional else 1
        hs, cs = [], []
        for layer in range(self.num_layers):
            outputs = []
            for backward in range(directions):
                at = layer * directions + backward
                name = f"l{layer}" + "_reverse" * backward
                output, h, c = self._run(x, h0[at], c0[at], name)
                outputs.append(output)
                hs.append(h)
                cs.append(c)
            x = torch.cat(outputs, -1)
        return x.transpose(0, 1) if self.batch_first else x, (torch.stack(hs), torch.stack(cs))

    def _run(
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer in one direction: `[length, batch, hidden]`, and its last states."""
        weight, bias = getattr(self, f"weight_hh_{name}"), getattr(self, f"bias_hh_{name}", None)
        inner = F.linear(
            x, getattr(self, f"weight_ih_{name}"), getattr(self, f"bias_ih_{name}", None)
        )
        steps = range(len(x))
        outputs: dict[int, torch.Tensor] = {}
        for step in reversed(steps) if name.endswith("_reverse") else steps:
            i, f, g, o = (inner[step] + F.linear(h, weight, bias)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            outputs[step] = h = self.group.all_gather(o.sigmoid() * c.tanh(), self.sizes)
        return torch.stack([outputs[step] for step in steps]), h, c

    def _start(self, x: torch.Tensor) -> State:
        count = self.num_layers * (2 if self.bidirectional else 1)
        own = self.sizes[self.group.tp_rank]
        return (
            x.new_zeros(count, x.shape[1], self.hidden_size),
            x.new_zeros(count, x.shape[1], own),
        )

    def _own(self, c: torch.Tensor) -> torch.Tensor:
        """The rank's own part of a cell state that may be whole."""
        own = self.sizes[self.group.tp_rank]
        if c.shape[-1] == own:
            return c
        return c.narrow(-1, sum(self.sizes[: self.group.tp_rank]), own)


def make_parallel_lstm(
    module: nn.LSTM, path: str, placements: Mapping[str, Placement], group: TensorParallelGroup
) -> None:
    """Give an LSTM its parallel form.

    Raises ManifestError unless all its weights are divided by hidden units, or if it projects.
    """
    units = (Section(module.hidden_size, 1, repeat=GATES),)
    names = [name for name, _ in module.named_parameters()]
    if module.proj_size or any(
        name not in placements or placements[name].sections != units for name in names
    ):
        raise ManifestError(
            f"{path}: an LSTM is divided by its hidden units, as '4 UNIT', or whole"
        )
    sizes = _count_hidden_units(placements[names[0]], group.tp_size)
    convert_class(module, ParallelLSTM, group=group, sizes=sizes)


def _count_hidden_units(placement: Placement, tp_size: int) -> Sequence[int]:
    """How many hidden units each rank holds, of weights with four rows for each."""
    return tuple(num_indices(placement.spans(rank)) // GATES for rank in Mesh(tp_size).ranks())
