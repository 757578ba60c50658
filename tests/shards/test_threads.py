"""Several threads may read one open shard folder."""

from pathlib import Path

import pytest

from shardkit.shards import ShardedCheckpoint
from shardkit.shards.reader import StoredRows
from tests.helpers.split_helpers import split_folder
from tests.helpers.synthetic_checkpoints import llama, llama_config, specs_of, write_source


def test_another_thread_s_lookup_between_two_steps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a tensor has been looked up, another is: what the first caller gets is its own."""
    source = write_source(tmp_path / "source", llama_config(), specs_of(llama()))
    split_folder(source, tmp_path / "shards", 2)
    with ShardedCheckpoint(tmp_path / "shards") as shards:
        one, two = (spec.name for spec in shards.specs()[:2])
        expected, last = shards.find_rows(one), shards.find_rows(two)
        assert expected != last

        def store(self: ShardedCheckpoint, lookup: tuple[str, StoredRows]) -> None:
            vars(self)["kept"] = (two, last) if lookup[0] == one else lookup

        monkeypatch.setattr(
            ShardedCheckpoint,
            "_located",
            property(lambda self: vars(self).get("kept", ("", last)), store),
            raising=False,
        )
        assert shards.find_rows(one) == expected
