"""Drafts every generative model type of the installed transformers, to measure how drafting does.

The types are drafted one after another in a separate process, which is replaced when one of them
crashes it or takes too long. Each result is appended to a file as it is done, so that an
interrupted run resumes where it stopped.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from shardkit.authoring.draft.draft import Draft, draft_recipe
from shardkit.authoring.draft.failure import DraftError, Stage, hide_paths
from shardkit.authoring.draft.proofs import ProofCache, outcomes_to_json
from shardkit.errors import OutputError, ShardkitError

TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "TEXT_TO_WAVEFORM",
)
START_SECONDS = 600.0  # for a process to import what it needs
STOP_SECONDS = 10.0  # for an idle process to stop its ranks
MAX_REASON = 240  # characters
MACHINE_PATH = re.compile(r"(?<![\w:/.])/(?:[\w.+-]+/)+([\w.+-]+)")


@dataclass(frozen=True)
class DraftRecord:
    """How the draft of one model type went, as it is stored.

    Attributes:
        model_type: The model type.
        passed: Whether the draft passed every check over every number of ranks.
        seconds: How long it took.
        transformers: The version of transformers.
        stage: Where it failed; empty if it passed.
        reason: What failed; empty if it passed.
        outcomes: The outcome of each number of ranks, as JSON values.
        vocab: The number of vocabulary patterns in the draft.
        regions: The number of parallel regions.
        replicated: The number of large modules that every rank holds.
    """

    model_type: str
    passed: bool
    seconds: float
    transformers: str
    stage: Stage | Literal[""] = ""
    reason: str = ""
    outcomes: dict[str, Any] = field(default_factory=dict)
    vocab: int = 0
    regions: int = 0
    replicated: int = 0

    def share(self, tp_size: int) -> float | None:
        """The largest rank's share of the bytes over `tp_size` ranks; None if not proven."""
        outcome = self.outcomes.get(str(tp_size))
        return float(outcome["share"]) if outcome and outcome["passed"] else None


def list_generative_types() -> list[str]:
    """The model types of transformers that generate text or sound, by name."""
    from transformers.models.auto import modeling_auto

    tables = (getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS)
    return sorted({str(model_type) for table in tables for model_type in table})


def read_records(path: Path) -> dict[str, DraftRecord]:
    """The stored records by model type, in that order; the last of each type counts."""
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [DraftRecord(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path}: is not a file of draft records: {error}") from None
    by_type = {record.model_type: record for record in records}
    return dict(sorted(by_type.items()))


def list_pending(records: Mapping[str, DraftRecord]) -> list[str]:
    """The generative model types without a record of the installed version of transformers."""
    installed = version("transformers")
    return [
        model_type
        for model_type in list_generative_types()
        if model_type not in records or records[model_type].transformers != installed
    ]


def draft_types(
    model_types: Sequence[str], path: Path, seconds_per_type: float
) -> Iterator[DraftRecord]:
    """Draft model types, and append a record of each to a file.

    Args:
        model_types: The types.
        path: The file of records.
        seconds_per_type: A type that takes longer has failed.

    Yields:
        The record of each type as it is done.
    """
    process = _DraftProcess()
    try:
        for model_type in model_types:
            record = process.draft(model_type, seconds_per_type)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
            yield record
    finally:
        process.stop(STOP_SECONDS)


class _DraftProcess:
    """A process that drafts one type after another; started when needed, and again if it died."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def draft(self, model_type: str, seconds: float) -> DraftRecord:
        """Draft a type in the process; a record of the failure if that dies or is too slow."""
        connection = self._connection or self._start()
        started = time.monotonic()
        stage: Stage = "crash"
        try:
            connection.send(model_type)
            if connection.poll(seconds):
                record: DraftRecord = connection.recv()
                return record
            stage, reason = "time limit", f"it took over {seconds:.0f} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"the process ended with exit code {self._process.exitcode}"
        self.stop()
        spent = round(time.monotonic() - started, 1)
        return _make_record(model_type, spent, stage=stage, reason=reason)

    def stop(self, grace: float = 0.0) -> None:
        """End the process and what it started, by force if they are not gone in `grace` seconds."""
        if self._connection is None:
            return
        self._connection.close()
        self._connection = None
        self._process.join(grace)
        if not self._process.is_alive():
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.join()

    def _start(self) -> Connection:
        context = get_context("spawn")
        connection, remote = context.Pipe()
        self._process = context.Process(target=_serve_drafts, args=(remote,))
        self._process.start()
        remote.close()
        self._connection = connection
        try:
            if connection.poll(START_SECONDS):
                connection.recv()
                return connection
        except (EOFError, OSError):
            pass
        self.stop()
        raise OutputError("the process that drafts does not start; see its messages above")


def _serve_drafts(connection: Connection) -> None:
    """Draft each model type that comes through a connection, until it is closed."""
    os.setsid()  # so that it can be killed together with its ranks
    os.dup2(2, 1)  # what models print is not a result
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from shardkit.authoring.rank_pool import RankPool

    with RankPool() as pool:
        connection.send("ready")
        while True:
            try:
                model_type = connection.recv()
            except EOFError:
                return
            connection.send(_draft_type(model_type, ProofCache(pool)))


def _exit_with_parent() -> None:
    """Wait until the process that started this one has ended; then kill it and its ranks."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _draft_type(model_type: str, proofs: ProofCache) -> DraftRecord:
    """Draft a type; whatever it raises becomes a record."""
    started = time.monotonic()
    stage: Stage = "error"
    try:
        draft = draft_recipe(model_type, lambda _: None, proofs)
        return _record_draft(model_type, draft, round(time.monotonic() - started, 1))
    except DraftError as error:
        stage, reason = error.stage, error.reason
    except ShardkitError as error:
        stage, reason = "checkpoint", str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return _make_record(
        model_type, round(time.monotonic() - started, 1), stage=stage, reason=reason
    )


def _record_draft(model_type: str, draft: Draft, seconds: float) -> DraftRecord:
    faults = [f"{o.failed_check}: {o.fault}" for o in draft.outcomes.values() if not o.passed]
    return _make_record(
        model_type,
        seconds,
        passed=draft.passed,
        stage="" if draft.passed else "proof",
        reason="; ".join(faults),
        outcomes=outcomes_to_json(draft.outcomes),
        vocab=len(draft.recipe.vocab),
        regions=len(draft.recipe.regions),
        replicated=len(draft.recipe.replicated),
    )


def _make_record(model_type: str, seconds: float, reason: str = "", **fields: Any) -> DraftRecord:
    return DraftRecord(
        model_type=model_type,
        passed=fields.pop("passed", False),
        seconds=seconds,
        transformers=version("transformers"),
        reason=shorten_reason(reason.removeprefix(f"{model_type}: ")),
        **fields,
    )


def shorten_reason(reason: str) -> str:
    """A reason on one line, without paths of this machine."""
    text = MACHINE_PATH.sub(r"\1", hide_paths(" ".join(reason.split())))
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON].rstrip()}…"
