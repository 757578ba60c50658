"""Where real weights for tests lie: in `../shared`, beside the checkout."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared(name: str) -> Path:
    """A folder or file of the shared test input, or a skip that says what was not tested."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real test input {name!r} is not beside the checkout (../shared)")
    return path
