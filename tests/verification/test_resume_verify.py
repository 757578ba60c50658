"""A verification that is stopped anywhere resumes, and gives the report it would have given."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shardkit.authoring.samples import make_sample
from shardkit.errors import OutputError, UsageError
from shardkit.tensor import TensorSpec
from shardkit.verification import NumericsOptions, Report, streamed_models, verify
from shardkit.verification.block_journal import BlockJournal, open_journal
from tests.helpers.layout_faults import LAYOUT_FAULTS
from tests.helpers.model_samples import VARIANTS, make
from tests.helpers.runtime_helpers import altered, cut

# The passes without a cache and with it; layers that output tuples; one that is called many times.
MODELS = ("llama", "t5", "albert", "bamba")
KILLED = """
import os, signal, sys
from pathlib import Path
from shardkit.verification import NumericsOptions, verify
shards, source, journal, last = sys.argv[1:]

def kill_at(done, total):
    if done == int(last):
        os.kill(os.getpid(), signal.SIGKILL)

verify(shards, source, numerics=NumericsOptions(progress=kill_at, resume=Path(journal)))
"""


def check(folder: Path, **options: Any) -> Report:
    numerics = NumericsOptions(**{"ranks": "turns", **options})
    report = verify(folder / "shards", folder / "source", numerics=numerics)
    assert report is not None
    return report


def copy_journal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Report, bytes]:
    """A whole verification, and its journal as it was before it was removed."""
    copies: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(BlockJournal, "remove", lambda j: copies.append(j.path.read_bytes()))
        report = check(folder, resume=folder / "journal")
    return report, copies[0]


@contextmanager
def count_reads() -> Iterator[list[str]]:
    """In a `with`, the names of the tensors that ranks in turns read."""
    names: list[str] = []
    read = streamed_models._read_part

    def count(reader: Any, spec: TensorSpec, counts: Any) -> Any:
        names.append(spec.name)
        return read(reader, spec, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_models, "_read_part", count)
        yield names


@pytest.mark.parametrize("name", MODELS)
def test_a_verification_cut_anywhere_gives_the_same_report(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process leaves is a beginning of the journal, at any byte."""
    cut(make(name, tmp_path / "source"), tmp_path / "shards", 2)
    whole = check(tmp_path).to_json()
    report, journal = copy_journal(tmp_path, monkeypatch)
    assert report.passed
    assert report.to_json() == whole
    for share in (0.2, 0.55, 0.9):
        (tmp_path / "journal").write_bytes(journal[: int(share * len(journal))])
        assert check(tmp_path, resume=tmp_path / "journal").to_json() == whole, share
        assert not (tmp_path / "journal").exists()


def test_a_killed_process_resumes_at_the_block(tmp_path: Path) -> None:
    llama = VARIANTS["llama"]
    sample = replace(llama, config={**llama.config, "num_hidden_layers": 6})
    source = make_sample(sample, tmp_path / "source", torch.float32)
    cut(source, tmp_path / "shards", 2)
    whole, journal = check(tmp_path).to_json(), tmp_path / "journal"
    # A pass is 6 layers, 4 pieces and the whole model: in the ranks' pass, after 4 layers.
    arguments = [str(tmp_path / "shards"), str(source), str(journal), "17"]
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, check=False, timeout=200, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    with count_reads() as names:
        assert check(tmp_path, resume=journal).to_json() == whole
    layers = [name.split(".")[2] for name in names if ".self_attn.q_proj" in name]
    without_cache = [int(number) for number in layers[: layers.index("0", 2)]]
    assert without_cache == [0, 0, 4, 4, 5, 5]


def test_a_fault_after_a_resume_is_the_whole_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, right, wrong, *_ = LAYOUT_FAULTS["Q, K, V blocks read as interleaved"]
    source = make(name, tmp_path / "source")
    cut(source, tmp_path / "shards", 2, altered(name, tmp_path, (right, wrong)))
    report, journal = copy_journal(tmp_path, monkeypatch)
    assert not report.passed
    (tmp_path / "journal").write_bytes(journal[: int(0.5 * len(journal))])
    assert check(tmp_path, resume=tmp_path / "journal").to_json() == report.to_json()


def test_a_sample_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(make("llama", tmp_path / "source", "bfloat16"), tmp_path / "shards", 2)
    whole = check(tmp_path, sample=0).to_json()
    copies: list[bytes] = []
    monkeypatch.setattr(BlockJournal, "remove", lambda j: copies.append(j.path.read_bytes()))
    assert check(tmp_path, sample=0, resume=tmp_path / "journal").to_json() == whole
    (tmp_path / "journal").write_bytes(copies[0][: int(0.4 * len(copies[0]))])
    assert check(tmp_path, sample=0, resume=tmp_path / "journal").to_json() == whole


def test_the_journal_of_another_verification_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(make("llama", tmp_path / "source"), tmp_path / "shards", 2)
    _, journal = copy_journal(tmp_path, monkeypatch)
    (tmp_path / "journal").write_bytes(journal)
    with pytest.raises(OutputError, match="a verification with another sample; name another file"):
        check(tmp_path, sample=0, resume=tmp_path / "journal")
    config = (tmp_path / "source" / "config.json").read_text()
    (tmp_path / "source" / "config.json").write_text(config + "\n")
    with pytest.raises(OutputError, match="with another source"):
        check(tmp_path, resume=tmp_path / "journal")
    assert (tmp_path / "journal").read_bytes() == journal


@pytest.mark.parametrize("data", [b"a letter\n", b"no line", b'{"format":2}\n'])
def test_a_file_that_is_no_journal_is_refused_and_kept(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(data)
    with (
        pytest.raises(OutputError, match="is not a journal"),
        open_journal(tmp_path / "journal", {"manifest": "1"}),
    ):
        pass
    assert (tmp_path / "journal").read_bytes() == data


def test_a_journal_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with (
        open_journal(path, {"manifest": "1"}),
        pytest.raises(OutputError, match="another verification writes it"),
        open_journal(path, {"manifest": "1"}),
    ):
        pass


def test_what_was_changed_in_a_journal_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(make("llama", tmp_path / "source"), tmp_path / "shards", 2)
    report, journal = copy_journal(tmp_path, monkeypatch)
    for at in (len(journal) // 7, len(journal) // 3):
        changed = bytearray(journal)
        changed[at] ^= 0xFF
        (tmp_path / "journal").write_bytes(changed)
        assert check(tmp_path, resume=tmp_path / "journal").to_json() == report.to_json()


def test_real_ranks_cannot_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resume goes block by block: it needs --ranks turns"):
        check(tmp_path, ranks="real", resume=tmp_path / "journal")
