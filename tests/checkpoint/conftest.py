"""What the tests of Hub repositories share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fake_hub import Repository, serving
from tests.helpers.hub_client import INDEXED, NEW, OLD, SINGLE, Client
from tests.helpers.raw_safetensors import small_file


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    repositories = {
        "org/indexed": Repository({OLD: INDEXED}, {"main": OLD}),
        "org/single": Repository(
            {OLD: SINGLE, NEW: SINGLE | {"model.safetensors": small_file("new")}},
            {"main": NEW, "v1": OLD},
        ),
        "org/gated": Repository({OLD: SINGLE}, {"main": OLD}, token="hf_right"),
        "org/short": Repository({OLD: SINGLE}, {"main": OLD}, short=frozenset(SINGLE)),
    }
    with serving(repositories) as hub:
        yield Client(hub, tmp_path / "home")
