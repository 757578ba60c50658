"""Writes a first recipe for a model type, proven on a small model of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from shardkit.authoring.draft.candidates import survey
from shardkit.authoring.draft.proofs import Bench, Outcome, unmatched
from shardkit.authoring.draft.render import Content, written
from shardkit.authoring.draft.search import Say, Search, final
from shardkit.authoring.draft.tensor_origins import NUMBER, Small, open_small
from shardkit.authoring.draft.tiny_model import Tiny, make_tiny
from shardkit.errors import RecipeError

SAME = {"colwise": "column", "rowwise": "row", "packed_colwise": "column", "packed_rowwise": "row"}


@dataclass(frozen=True)
class Draft:
    """A recipe's text, what it holds, and what became of the checks by number of ranks.

    `unmatched` are tensors of the given checkpoint that no rule names; `hints` is how many entries
    transformers' own tensor-parallel plan has, and those of them that are done otherwise here.
    """

    text: str
    content: Content
    outcomes: Mapping[int, Outcome]
    unmatched: tuple[str, ...] = ()
    hints: tuple[int, tuple[str, ...]] = (0, ())

    @property
    def passed(self) -> bool:
        """Whether something is sharded and every check passed, over every number of ranks tried."""
        return bool(self.outcomes) and all(o.passed for o in self.outcomes.values())


def make_draft(model: str, say: Say, bench: Bench | None = None) -> Draft:
    """Draft a recipe for a model type of transformers, or for that of a folder's config.json.

    The bundled recipes are not looked at.  Raises RecipeError where nothing can be proven.
    """
    if bench is None:
        from shardkit.authoring.rank_pool import RankPool

        with RankPool() as pool:
            return make_draft(model, say, Bench(pool))
    with TemporaryDirectory(prefix="shardkit-draft-") as folder:
        say(f"making a small model of {model}")
        tiny = make_tiny(model, Path(folder))
        small = open_small(tiny.folder)
        search = Search(small, survey(small, say), bench, say)
        search.run()
        content = search.content()
        if not content.vocab and not content.parts:
            reasons = "; ".join(f"{p}: {r}" for p, r in list(content.whole.items())[:3])
            raise RecipeError(f"{model}: nothing of it could be sharded; {reasons}")
        outcomes = final(small, written(content), bench, say)
        hints = compared(small, content)
    content = replace(content, comment=tuple(_comment(tiny, content, outcomes, hints)))
    text = written(content)
    return Draft(text, content, outcomes, _unmatched(model, text), hints)


def compared(small: Small, content: Content) -> tuple[int, tuple[str, ...]]:
    """Transformers' own plan against the draft: its entries that can be compared, and differ."""
    styles = {axis.pattern: axis.style for part in content.parts for axis in part.region.rules}
    styles |= dict.fromkeys(content.vocab, "vocab")
    ours: dict[str, str] = {}
    for tensor in small.tensors:
        ours.setdefault(_starred(tensor.owner), styles.get(tensor.pattern, "whole"))
    plan = dict(getattr(small.model, "tp_plan", None) or {})
    known = {entry: SAME[how] for entry, how in plan.items() if how in SAME and entry in ours}
    differ = tuple(
        f"{entry}: {how} there, {ours[entry]} here"
        for entry, how in known.items()
        if ours[entry] != how
    )
    return len(known), differ


def _starred(path: str) -> str:
    return NUMBER.sub("*", path)


def _comment(
    tiny: Tiny,
    content: Content,
    outcomes: Mapping[int, Outcome],
    hints: tuple[int, tuple[str, ...]],
) -> list[str]:
    """The head of the file: that it is a draft, of what, what was proven, and what is whole."""
    lines = [
        "A DRAFT, made by `shardkit recipes draft`; read it before you use it.",
        f"Made from a small random {tiny.model_class}: {tiny.made_from}"
        + (f" with {', '.join(tiny.changed)}." if tiny.changed else "."),
    ]
    for size, outcome in outcomes.items():
        how = "passed every check" if outcome.passed else f"FAILED {outcome.failed!r}"
        lines.append(
            f"Over {size} ranks it {how}"
            + (f": {outcome.fault[:200]}" if outcome.fault else
               f"; the largest rank holds {outcome.share:.0%} of the small model's bytes.")
        )  # fmt: skip
    if content.whole:
        lines.append("What could not be sharded is under [whole], with what stood in the way.")
    if hints[0]:
        told = f": {'; '.join(hints[1])}" if hints[1] else ""
        lines.append(
            f"Of {hints[0]} entries of transformers' own tensor-parallel plan,"
            f" {len(hints[1])} are done otherwise here{told}."
        )
    lines.append(
        "Not looked at: tensors that only some checkpoints have (old buffers, other heads), and"
        " options that the config above turns off."
    )
    return lines


def _unmatched(model: str, text: str) -> tuple[str, ...]:
    """The tensors of a checkpoint folder without a rule; none where it has no weights."""
    folder = Path(model)
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return ()
    return tuple(unmatched(folder, text))
