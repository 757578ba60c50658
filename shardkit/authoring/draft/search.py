"""Proves what a survey suggests, region by region, and keeps only what passes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from shardkit.authoring.draft.candidates import StatusCallback, Survey, list_replicated
from shardkit.authoring.draft.failure import DraftError, hide_paths
from shardkit.authoring.draft.module_attributes import find_arguments, find_attributes
from shardkit.authoring.draft.proofs import ProofCache, ProofOutcome, max_tp_size
from shardkit.authoring.draft.render import DraftRecipe, DraftRegion, render_recipe
from shardkit.authoring.draft.tensor_origins import LoadedModel

MAX_VARIANTS = 12
TP_SIZES = (2, 4)


@dataclass
class Search:
    """What has passed so far, and why the rest has not."""

    loaded: LoadedModel
    survey: Survey
    proofs: ProofCache
    report: StatusCallback
    vocab: tuple[str, ...] = ()
    regions: tuple[DraftRegion, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Try everything at once; if that fails, each region by itself on top of what passed.

        Raises:
            DraftError: The model fails over ranks even if every rank holds all of it.
        """
        regions = tuple(
            DraftRegion(region, find_attributes(self.loaded, region))
            for region in self.survey.regions
        )
        self.report(f"proving {len(regions)} regions and the vocabulary together")
        if self._prove(self.survey.vocab, regions).passed:
            self.vocab, self.regions = self.survey.vocab, regions
            return
        if not (outcome := self._prove((), ())).passed:
            raise DraftError(
                "replicated",
                "even if every rank holds all of it, it fails the check"
                f" {outcome.failed_check!r}: {hide_paths(outcome.fault)}",
                f"{outcome.failed_check}: {outcome.fault}",
            )
        self._add_vocab()
        for region in regions:
            self.report(f"proving {region.region.row.pattern}")
            self._add_region(region)

    def to_recipe(self) -> DraftRecipe:
        """What passed, as a recipe."""
        return self._make_recipe(self.vocab, self.regions)

    def _add_vocab(self) -> None:
        """Keep the whole vocabulary, or as much of it as passes."""
        vocab = self.survey.vocab
        if not vocab:
            return
        outcome = self._prove(vocab, ())
        if outcome.passed:
            self.vocab = vocab
            return
        for part in (vocab[:1], vocab[1:]):
            if part and len(vocab) > 1 and self._prove(part, ()).passed:
                self.vocab = part
                break
        self.reasons |= {p: _explain_failure(outcome) for p in vocab if p not in self.vocab}

    def _add_region(self, region: DraftRegion) -> None:
        """Keep the first variant of a region that passes, if any does."""
        first: ProofOutcome | None = None
        for variant in self._list_variants(region):
            outcome = self._prove(self.vocab, (*self.regions, variant))
            if outcome.passed:
                self.regions = (*self.regions, variant)
                return
            first = first or outcome
            if outcome.failed_check in ("complete", "masked sum"):
                break  # no attribute makes a wrong layout right
        assert first is not None
        self.reasons |= {p: _explain_failure(first) for p in region.region.patterns}

    def _list_variants(self, region: DraftRegion) -> Iterator[DraftRegion]:
        """The region as it is, with arguments, with fewer attributes, with none."""
        attributes = region.attributes
        yield region
        if arguments := find_arguments(self.loaded, region.region):
            yield replace(region, arguments=arguments)
        subsets = [tuple(a for a in attributes if a != omitted) for omitted in attributes]
        subsets += [(attribute,) for attribute in attributes]
        for subset in [*dict.fromkeys([*subsets, ()])][:MAX_VARIANTS]:
            if subset != attributes:
                yield replace(region, attributes=subset)

    def _prove(self, vocab: Sequence[str], regions: Sequence[DraftRegion]) -> ProofOutcome:
        text = render_recipe(self._make_recipe(vocab, regions))
        return self.proofs.prove_text(self.loaded.folder, text, TP_SIZES[0])

    def _make_recipe(self, vocab: Sequence[str], regions: Sequence[DraftRegion]) -> DraftRecipe:
        ruled = {*vocab, *(p for region in regions for p in region.region.patterns)}
        reasons = self.survey.rejected | self.reasons
        small, large = list_replicated(self.loaded, ruled, reasons)
        listed = {*vocab, *small, *large}
        return DraftRecipe(
            model_type=str(self.loaded.config["model_type"]),
            base_model_prefix=_base_model_prefix(self.loaded),
            vocab=tuple(vocab),
            regions=tuple(regions),
            replicate=(*small, *(p for p in self.survey.vocab if p not in listed)),
            replicated=large,
        )


def prove_over_sizes(
    loaded: LoadedModel, text: str, proofs: ProofCache, report: StatusCallback
) -> dict[int, ProofOutcome]:
    """Prove a draft over each number of ranks that is tried and that its counts allow."""
    limit = max_tp_size(loaded.folder, text)
    outcomes = {}
    for tp_size in TP_SIZES:
        if tp_size <= limit:
            report(f"proving the draft over {tp_size} ranks")
            outcomes[tp_size] = proofs.prove_text(loaded.folder, text, tp_size)
    return outcomes


def _base_model_prefix(loaded: LoadedModel) -> str:
    prefix = str(loaded.model.base_model_prefix)
    return prefix if any(name.startswith(f"{prefix}.") for name in loaded.shapes) else ""


def _explain_failure(outcome: ProofOutcome) -> str:
    """A failed check as a short sentence on one line, without temporary paths."""
    fault = " ".join(hide_paths(outcome.fault).split())
    return f"sharded, it fails the check {outcome.failed_check!r}: {fault[:160]}"
