"""What a style means for every part of shardkit: one row of one table.

A recipe gives each tensor a style. Splitting asks which dimension it divides, the runtime which
form a module takes, verification what a rank's output is a part of, and a plan which collective it
costs; all of them read the answer here. Column-, row- and vocab-parallel layers are those of
Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).
"""

from dataclasses import dataclass
from typing import Literal

Divides = Literal["nothing", "output", "input", "rows", "experts"]
Axis = Literal["none", "vocab", "stated", "experts"]
Collective = Literal["none", "all_reduce", "all_gather"]


@dataclass(frozen=True, slots=True)
class Style:
    """One way in which ranks share a tensor.

    Attributes:
        name: What recipes and manifests call it.
        title: What a user reads.
        divides: Which features of a weight `[out, in]` are divided: those of its output, of its
            input, or the rows of its first dimension, whatever they are; or the experts that it is
            of, none of which is cut.
        axis: How a recipe says what the divided dimension holds: not at all, always the
            vocabulary, by an axis beside each module's name, or by which modules are experts.
        is_linear: Whether a weight may be stored `[in, out]`, and a rule may state its dimension.
        collective: What its module exchanges at each call.
        is_summed: Whether the ranks' outputs of its module, each computed from the rank's part
            alone, add up to the whole model's output.
        needs_full_width: Whether its module cannot run on a rank's part alone.
        is_added_once: Whether a tensor that is not divided counts on rank 0 only: a bias that is
            added after, or inside of, a sum over the ranks.
        is_loaded: Whether the model loads it.
    """

    name: str
    title: str
    divides: Divides = "nothing"
    axis: Axis = "none"
    is_linear: bool = False
    collective: Collective = "none"
    is_summed: bool = False
    needs_full_width: bool = False
    is_added_once: bool = False
    is_loaded: bool = True

    def dim(self, ndim: int, fan_in_fan_out: bool = False) -> int | None:
        """The dimension of an `ndim`-dimensional tensor that is divided; None if none is.

        Features count from the end, so that stacked experts `[experts, out, in]` need no rule of
        their own. A one-dimensional tensor is a bias: it has output features only.

        Args:
            ndim: How many dimensions the tensor has.
            fan_in_fan_out: Whether weights are stored `[in, out]`.

        Example:
            >>> COLUMN.dim(2), ROW.dim(2), ROW.dim(2, fan_in_fan_out=True), ROW.dim(1)
            (0, 1, 0, None)
        """
        if ndim == 0 or self.divides == "nothing":
            return None
        if self.divides in ("rows", "experts"):
            return 0
        if ndim == 1:
            return 0 if self.divides == "output" else None
        last_is_divided = (self.divides == "input") != fan_in_fan_out
        return ndim - 1 if last_is_divided else ndim - 2


VOCAB = Style(
    "vocab",
    "Vocab-parallel",
    divides="rows",
    axis="vocab",
    collective="all_reduce",
    is_summed=True,
)
COLUMN = Style("column", "Column-parallel", divides="output", axis="stated", is_linear=True)
PADDED = Style(
    "padded",
    "Column-parallel, their outputs padded with zeros to the whole width",
    divides="output",
    axis="stated",
    is_linear=True,
)
ROW = Style(
    "row",
    "Row-parallel",
    divides="input",
    axis="stated",
    is_linear=True,
    collective="all_reduce",
    is_summed=True,
    is_added_once=True,
)
NORM = Style(
    "norm",
    "Norms over a divided width, one small all-reduce each",
    divides="output",
    axis="stated",
    collective="all_reduce",
    needs_full_width=True,
)
GATHER = Style(
    "gather",
    "Replicated, run on gathered inputs, one all-gather each",
    axis="stated",
    collective="all_gather",
    needs_full_width=True,
)
RECURRENT = Style(
    "recurrent",
    "Recurrent, one all-gather of the hidden state for each token and layer",
    divides="output",
    axis="stated",
    collective="all_gather",
    needs_full_width=True,
)
EXPERT = Style(
    "expert",
    "Whole experts on a rank, one all-reduce for each stack",
    divides="experts",
    axis="experts",
    collective="all_reduce",
    is_summed=True,
)
ADD_ONCE = Style("add_once", "Replicated, but added by rank 0 alone", is_added_once=True)
REPLICATE = Style("replicate", "Replicated")
IGNORE = Style("ignore", "Stored by rank 0 for a merge, never loaded", is_loaded=False)

STYLES = {
    style.name: style
    for style in (
        *(VOCAB, COLUMN, PADDED, ROW, NORM),
        *(GATHER, RECURRENT, EXPERT, ADD_ONCE, REPLICATE, IGNORE),
    )
}
COLUMNS = (COLUMN, PADDED)
