"""An LSTM whose hidden units are divided computes what torch.nn.LSTM does."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from shardkit.errors import ManifestError
from shardkit.layout.spans import Section
from shardkit.layout.style import RECURRENT
from shardkit.planning import Layout, Mesh, Placement
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.lstm import ParallelLSTM, make_parallel_lstm
from shardkit.runtime.models.lstm import LSTMConfig, LSTMForCausalLM
from shardkit.runtime.models.registry import find_model_class
from shardkit.tensor import TensorSpec

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]  # output, h, c, all-gathers
LENGTH, BATCH, WIDTH, HIDDEN = 11, 3, 7, 10


class ThreadGroup(TensorParallelGroup):
    """Ranks that are threads of one process."""

    def __init__(
        self, tp_rank: int, tp_size: int, desk: list[torch.Tensor], wait: Callable[[], int]
    ):
        super().__init__(tp_rank, tp_size, torch.device("cpu"))
        self.desk, self.wait = desk, wait

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self.counts["all_gather"] += 1
        assert x.shape[-1] == sizes[self.tp_rank]
        self.desk[self.tp_rank] = x
        self.wait()
        whole = torch.cat(self.desk, -1)
        self.wait()
        return whole


def groups(tp_size: int) -> list[ThreadGroup]:
    barrier = threading.Barrier(tp_size, timeout=30)
    desk = [torch.empty(0)] * tp_size
    return [ThreadGroup(rank, tp_size, desk, barrier.wait) for rank in range(tp_size)]


def placed(whole: nn.LSTM, sections: tuple[Section, ...]) -> dict[str, Placement]:
    return {
        name: Placement(TensorSpec(name, "F64", tuple(p.shape)), Layout(RECURRENT, 0, sections))
        for name, p in whole.named_parameters()
    }


def part(whole: nn.LSTM, group: TensorParallelGroup) -> ParallelLSTM:
    """A rank's part of an LSTM, as loading a shard makes it."""
    local = nn.LSTM(
        whole.input_size, whole.hidden_size, whole.num_layers, whole.bias, whole.batch_first,
        bidirectional=whole.bidirectional, device="meta",
    )  # fmt: skip
    placements = placed(whole, (Section(whole.hidden_size, 1, repeat=4),))
    make_parallel_lstm(local, "lstm", placements, group)
    for name, parameter in whole.named_parameters():
        held = placements[name].spans(Mesh(group.tp_size).rank(group.tp_rank))
        rows = torch.cat([parameter[start:stop] for start, stop in held])
        local._parameters[name] = nn.Parameter(rows)
    assert isinstance(local, ParallelLSTM)
    return local


def over_ranks(whole: nn.LSTM, tp_size: int, *inputs: object) -> list[Outputs]:
    """What every rank's part makes of the same inputs, and its all-gathers."""

    def run(group: ThreadGroup) -> Outputs:
        with torch.inference_mode():
            output, (h, c) = part(whole, group)(*inputs)
        return output, h, c, group.counts["all_gather"]

    with ThreadPoolExecutor(tp_size) as pool:
        return list(pool.map(run, groups(tp_size)))


def make(**options: object) -> tuple[nn.LSTM, torch.Tensor]:
    torch.manual_seed(3)
    lstm = nn.LSTM(WIDTH, HIDDEN, dtype=torch.float64, **options).eval()
    return lstm, torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_rank_has_what_the_whole_lstm_puts_out(
    tp_size: int, num_layers: int, bidirectional: bool, bias: bool
) -> None:
    lstm, x = make(num_layers=num_layers, bidirectional=bidirectional, bias=bias)
    with torch.inference_mode():
        output, (h, c) = lstm(x)
    found = over_ranks(lstm, tp_size, x)
    for ours, our_h, _, gathers in found:
        torch.testing.assert_close(ours, output)
        torch.testing.assert_close(our_h, h)
        assert gathers == LENGTH * num_layers * (1 + bidirectional)  # its price, as documented
    torch.testing.assert_close(torch.cat([c_r for _, _, c_r, _ in found], -1), c)


def test_inputs_may_come_batch_first() -> None:
    lstm, x = make(batch_first=True)
    with torch.inference_mode():
        output = lstm(x)[0]
    for ours, *_ in over_ranks(lstm, 2, x):
        torch.testing.assert_close(ours, output)


def test_it_goes_on_from_a_whole_state_and_from_its_own() -> None:
    lstm, x = make(num_layers=2)
    with torch.inference_mode():
        _, state = lstm(x[:5])
        output = lstm(x[5:], state)[0]
    for ours, *_ in over_ranks(lstm, 3, x[5:], state):
        torch.testing.assert_close(ours, output)

    def resumed(group: ThreadGroup) -> torch.Tensor:
        with torch.inference_mode():
            local = part(lstm, group)
            output: torch.Tensor = local(x[5:], local(x[:5])[1])[0]
            return output

    with ThreadPoolExecutor(3) as pool:
        for ours in pool.map(resumed, groups(3)):
            torch.testing.assert_close(ours, output)


def test_an_lstm_divided_otherwise_is_refused() -> None:
    lstm, _ = make()
    (group,) = groups(1)
    for wrong in ((Section(4 * HIDDEN, 1),), (Section(HIDDEN, 4),)):
        with pytest.raises(ManifestError, match="divided by its hidden units, as '4 UNIT'"):
            make_parallel_lstm(lstm, "lstm", placed(lstm, wrong), group)
    with pytest.raises(ManifestError, match="lstm: an LSTM is divided"):
        make_parallel_lstm(lstm, "lstm", {}, group)


def test_an_lstm_that_projects_is_refused() -> None:
    lstm, _ = make(proj_size=5)
    with pytest.raises(ManifestError, match="divided by its hidden units"):
        make_parallel_lstm(lstm, "lstm", placed(lstm, (Section(HIDDEN, 1, 4),)), groups(1)[0])


def test_the_language_model_is_found_by_name_beside_those_of_transformers() -> None:
    assert find_model_class("LSTMForCausalLM") is LSTMForCausalLM
    found = find_model_class("LlamaForCausalLM")
    assert found is not None
    assert found.__module__.startswith("transformers.")
    assert find_model_class("LSTMConfig") is None
    assert find_model_class("NoModel") is None


def test_the_language_model_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="one direction"):
        LSTMForCausalLM(LSTMConfig(bidirectional=True))
    model = LSTMForCausalLM(LSTMConfig(vocab_size=9, embedding_size=4, hidden_size=4))
    with pytest.raises(ValueError, match="cannot leave out padding"):
        model(torch.tensor([[1, 2]]), attention_mask=torch.tensor([[0, 1]]))


def test_its_state_goes_on_where_a_text_was_left() -> None:
    model = LSTMForCausalLM(LSTMConfig(vocab_size=9, embedding_size=4, hidden_size=4)).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.inference_mode():
        whole = model(ids, use_cache=False)
        first = model(ids[:, :3])
        rest = model(ids[:, 3:], state=first.state)
    assert whole.state is None
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits)
