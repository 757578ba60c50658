"""What the tests of manifests share."""

import json
from pathlib import Path

import pytest

from shardkit.shards.manifest import MANIFEST_NAME
from tests.helpers.manifests import Table, tiny
from tests.helpers.split_helpers import split_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of `tiny` over two ranks."""
    base = tmp_path_factory.mktemp("manifest")
    split_folder(tiny(base / "tiny"), base / "shards", 2)
    return base / "shards"


@pytest.fixture(scope="module")
def sound(folder: Path) -> Table:
    """Its manifest as JSON values."""
    return json.loads((folder / MANIFEST_NAME).read_bytes())
