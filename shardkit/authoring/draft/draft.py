"""Writes a first recipe for a model type, proven on a tiny model of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from shardkit.authoring.draft.candidates import StatusCallback, survey_model
from shardkit.authoring.draft.failure import SCRATCH, DraftError
from shardkit.authoring.draft.proofs import (
    ProofCache,
    ProofOutcome,
    list_unmatched,
    outcomes_to_json,
)
from shardkit.authoring.draft.render import DraftRecipe, render_recipe
from shardkit.authoring.draft.search import Search, prove_over_sizes
from shardkit.authoring.draft.tensor_origins import LoadedModel, load_tiny_model, star_numbers
from shardkit.authoring.draft.tiny_model import TinyModel, make_tiny_model

# The styles of transformers' own tensor-parallel plans that a draft's can be compared with.
PLAN_STYLES = {
    "colwise": "column",
    "rowwise": "row",
    "packed_colwise": "column",
    "packed_rowwise": "row",
}


@dataclass(frozen=True)
class PlanComparison:
    """A draft compared with transformers' own tensor-parallel plan.

    `entries` is how many entries of the plan can be compared, `differences` says which differ.
    """

    entries: int = 0
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A drafted recipe and its proofs.

    Attributes:
        text: The recipe file.
        recipe: What it says.
        outcomes: How the proof over each number of ranks ended.
        unmatched: Tensors of the given checkpoint that no rule names.
        comparison: The draft compared with transformers' own plan.
    """

    text: str
    recipe: DraftRecipe
    outcomes: Mapping[int, ProofOutcome]
    unmatched: tuple[str, ...] = ()
    comparison: PlanComparison = PlanComparison()

    @property
    def passed(self) -> bool:
        """Whether every check passed over every number of ranks that was tried."""
        return bool(self.outcomes) and all(o.passed for o in self.outcomes.values())

    def to_json(self) -> dict[str, object]:
        """The draft as JSON values."""
        return {
            "model_type": self.recipe.model_type,
            "passed": self.passed,
            "recipe": self.text,
            "proofs": outcomes_to_json(self.outcomes),
            "replicated": dict(self.recipe.replicated),
            "plan_entries": self.comparison.entries,
            "plan_differences": list(self.comparison.differences),
            "unmatched_tensors": list(self.unmatched),
        }


def draft_recipe(model: str, report: StatusCallback, proofs: ProofCache | None = None) -> Draft:
    """Draft a recipe, without looking at the bundled ones.

    Args:
        model: A model type of transformers, or a folder with a config.json.
        report: Called with a line for each step.
        proofs: The ranks to prove on; by default some are started and stopped again.

    Raises:
        DraftError: Nothing could be proven.
    """
    if proofs is None:
        from shardkit.authoring.rank_pool import RankPool

        with RankPool() as pool:
            return draft_recipe(model, report, ProofCache(pool))
    with TemporaryDirectory(prefix=SCRATCH) as folder:
        report(f"making a small model of {model}")
        tiny = make_tiny_model(model, Path(folder))
        loaded = load_tiny_model(tiny.folder)
        search = Search(loaded, survey_model(loaded, report), proofs, report)
        search.run()
        recipe = search.to_recipe()
        if not recipe.vocab and not recipe.regions:
            reasons = "; ".join(f"{p}: {r}" for p, r in list(recipe.replicated.items())[:3])
            raise DraftError("nothing", f"{model}: nothing of it could be sharded; {reasons}")
        outcomes = prove_over_sizes(loaded, render_recipe(recipe), proofs, report)
        comparison = compare_with_plan(loaded, recipe)
    recipe = replace(recipe, comment=_make_comment(tiny, recipe, outcomes, comparison))
    text = render_recipe(recipe)
    return Draft(text, recipe, outcomes, _list_unmatched(model, text), comparison)


def compare_with_plan(loaded: LoadedModel, recipe: DraftRecipe) -> PlanComparison:
    """Compare a draft with the tensor-parallel plan that transformers has for the model."""
    styles = {rule.pattern: rule.style for rule in recipe.rules}
    styles |= dict.fromkeys(recipe.vocab, "vocab")
    drafted: dict[str, str] = {}
    for tensor in loaded.tensors:
        drafted.setdefault(star_numbers(tensor.owner), styles.get(tensor.pattern, "replicated"))
    plan = dict(getattr(loaded.model, "tp_plan", None) or {})
    planned = {
        entry: PLAN_STYLES[style]
        for entry, style in plan.items()
        if style in PLAN_STYLES and entry in drafted
    }
    differences = tuple(
        f"{entry}: {style} there, {drafted[entry]} here"
        for entry, style in planned.items()
        if drafted[entry] != style
    )
    return PlanComparison(len(planned), differences)


def _make_comment(
    tiny: TinyModel,
    recipe: DraftRecipe,
    outcomes: Mapping[int, ProofOutcome],
    comparison: PlanComparison,
) -> tuple[str, ...]:
    """The head of the file: that it is a draft, of what, what was proven, what is replicated."""
    changes = f" with {', '.join(tiny.changes)}" if tiny.changes else ""
    lines = [
        "A DRAFT, written by `shardkit recipes draft`; review it before you use it.",
        f"Made from a small random {tiny.class_name}: {tiny.origin}{changes}.",
        *(_describe_outcome(size, outcome) for size, outcome in outcomes.items()),
    ]
    if recipe.replicated:
        lines.append("Modules that could not be sharded are under [replicated], with the reason.")
    if comparison.entries:
        lines.append(_describe_comparison(comparison.entries, comparison.differences))
    lines.append(
        "Not covered: tensors that only some checkpoints have (old buffers, other heads), and"
        " options that the config above turns off."
    )
    return tuple(lines)


def _describe_outcome(tp_size: int, outcome: ProofOutcome) -> str:
    verdict = "passed every check" if outcome.passed else f"FAILED {outcome.failed_check!r}"
    detail = (
        f": {outcome.fault[:200]}"
        if outcome.fault
        else f"; the largest rank holds {outcome.share:.0%} of the small model's bytes."
    )
    return f"Over {tp_size} ranks it {verdict}{detail}"


def _describe_comparison(entries: int, differences: Sequence[str]) -> str:
    listed = f": {'; '.join(differences)}" if differences else ""
    return (
        f"Of {entries} entries of transformers' own tensor-parallel plan, {len(differences)}"
        f" differ here{listed}."
    )


def _list_unmatched(model: str, text: str) -> tuple[str, ...]:
    """The tensors of a checkpoint folder without a rule; none if it has no weights."""
    folder = Path(model)
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return ()
    return tuple(list_unmatched(folder, text))
