"""Proves what a survey found, region by region, and keeps only what passes."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from shardkit.authoring.draft.candidates import Survey, leftovers
from shardkit.authoring.draft.module_attributes import arguments_of, attributes_of
from shardkit.authoring.draft.proofs import Bench, Outcome, most_ranks
from shardkit.authoring.draft.render import Content, Part, written
from shardkit.authoring.draft.tensor_origins import Small
from shardkit.errors import RecipeError

MOST_VARIANTS = 12
SIZES = (2, 4)
Say = Callable[[str], object]


@dataclass
class Search:
    """What has passed so far, and why the rest has not."""

    small: Small
    survey: Survey
    bench: Bench
    say: Say
    vocab: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Try everything at once; if that fails, each thing by itself on top of what passed.

        Raises RecipeError where the model cannot be run over ranks even whole.
        """
        guesses = tuple(Part(r, attributes_of(self.small, r)) for r in self.survey.regions)
        self.say(f"proving {len(guesses)} regions and the vocabulary together")
        if self._passes(self.survey.vocab, guesses).passed:
            self.vocab, self.parts = self.survey.vocab, guesses
            return
        if not (outcome := self._passes((), ())).passed:
            raise RecipeError(
                f"even whole on every rank it fails the check {outcome.failed!r}: {outcome.fault}"
            )
        self._add_vocab()
        for part in guesses:
            self.say(f"proving {part.region.row.pattern}")
            self._add(part)

    def content(self) -> Content:
        """What passed, as the content of a draft."""
        return self._content(self.vocab, self.parts)

    def _add_vocab(self) -> None:
        """The whole vocabulary, or as much of it as passes."""
        vocab = self.survey.vocab
        if not vocab:
            return
        outcome = self._passes(vocab, ())
        if outcome.passed:
            self.vocab = vocab
            return
        for own in (vocab[:1], vocab[1:]):
            if own and len(vocab) > 1 and self._passes(own, ()).passed:
                self.vocab = own
                break
        self.reasons |= {p: _reason(outcome) for p in vocab if p not in self.vocab}

    def _add(self, part: Part) -> None:
        """Keep the first way of counting a region's units that passes, if any does."""
        first: Outcome | None = None
        for variant in self._variants(part):
            outcome = self._passes(self.vocab, (*self.parts, variant))
            if outcome.passed:
                self.parts = (*self.parts, variant)
                return
            first = first or outcome
            if outcome.failed in ("complete", "masked sum"):
                break  # no attribute makes a wrong layout right
        assert first is not None
        self.reasons |= {p: _reason(first) for p in part.region.patterns}

    def _variants(self, part: Part) -> Iterator[Part]:
        """The guess, the guess with arguments, fewer attributes, none."""
        own = part.attributes
        yield part
        if arguments := arguments_of(self.small, part.region):
            yield replace(part, arguments=arguments)
        fewer = [tuple(a for a in own if a != gone) for gone in own] + [(a,) for a in own] + [()]
        for attributes in [*dict.fromkeys(fewer)][:MOST_VARIANTS]:
            if attributes != own:
                yield replace(part, attributes=attributes)

    def _passes(self, vocab: Sequence[str], parts: Sequence[Part]) -> Outcome:
        text = written(self._content(vocab, parts))
        return self.bench.attempt(self.small.folder, text, SIZES[0])

    def _content(self, vocab: Sequence[str], parts: Sequence[Part]) -> Content:
        taken = {*vocab, *(p for part in parts for p in part.region.patterns)}
        reasons = self.survey.in_vain | self.reasons
        little, large = leftovers(self.small, taken, reasons)
        gone = [p for p in self.survey.vocab if p not in vocab and p not in (*little, *large)]
        return Content(
            str(self.small.config["model_type"]), _prefix(self.small), tuple(vocab), tuple(parts),
            (*little, *gone), large,
        )  # fmt: skip


def final(small: Small, text: str, bench: Bench, say: Say) -> dict[int, Outcome]:
    """Prove the draft over as many ranks as its counts allow, of the sizes that are tried."""
    most = most_ranks(small.folder, text)
    found = {}
    for size in SIZES:
        if size <= most:
            say(f"proving the draft over {size} ranks")
            found[size] = bench.attempt(small.folder, text, size)
    return found


def _prefix(small: Small) -> str:
    prefix = str(small.model.base_model_prefix)
    return prefix if any(name.startswith(f"{prefix}.") for name in small.shapes) else ""


def _reason(outcome: Outcome) -> str:
    """A check's fault as a sentence of a file: on one line, short."""
    told = re.sub(r"\S*/shardkit-draft-\S*", "the draft", outcome.fault)
    return f"sharded, it fails the check {outcome.failed!r}: {' '.join(told.split())[:160]}"
