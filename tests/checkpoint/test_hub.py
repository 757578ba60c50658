"""A Hub id as a source: what is fetched, what is not, and how each failure reads.

Each fetch is a process of its own, as huggingface_hub reads its settings when it is imported.
"""

from pathlib import Path

import pytest

from tests.helpers.hub_client import INDEXED, NEW, OLD, ONE, SMALL, TWO, Client, _json
from tests.helpers.raw_safetensors import INDEX, index_of, small_file

pytestmark = pytest.mark.hub


def test_an_indexed_repository_is_fetched_and_opened(client: Client) -> None:
    found = client.open("org/indexed")
    assert found["tensors"] == {"a": "a.......", "b": "b.......", "c": "c......."}
    assert found["files"] == [ONE, TWO]
    assert found["companions"] == sorted(SMALL)
    assert (found["name"], found["revision"]) == ("org/indexed", OLD)
    assert Path(found["folder"]).is_relative_to(client.home / "hub")


def test_only_what_a_split_reads_is_fetched(client: Client) -> None:
    client.open("org/indexed")
    assert client.hub.fetched() == {*SMALL, INDEX, ONE, TWO}


def test_a_single_file_is_fetched_without_its_variants(client: Client) -> None:
    assert client.open("org/single")["tensors"] == {"new": "new....."}
    assert client.hub.fetched() == {*SMALL, "model.safetensors"}


def test_a_second_run_offline_reads_the_cache_and_asks_nothing(client: Client) -> None:
    online = client.open("org/indexed")
    client.hub.requests.clear()
    assert client.open("org/indexed", HF_HUB_OFFLINE="1") == online
    assert client.hub.requests == []


def test_a_second_run_online_fetches_no_file_again(client: Client) -> None:
    online = client.open("org/indexed")
    client.hub.requests.clear()
    assert client.open("org/indexed") == online
    assert client.hub.fetched() == set()


def test_a_hub_that_is_down_leaves_the_cache_usable(client: Client) -> None:
    online = client.open("org/single")
    client.hub.down = True
    assert client.open("org/single") == online


@pytest.mark.parametrize(
    ("revision", "commit", "tensor"),
    [(None, NEW, "new"), ("main", NEW, "new"), ("v1", OLD, "a"), (OLD, OLD, "a")],
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    revision: str | None, commit: str, tensor: str, client: Client
) -> None:
    found = client.open("org/single", revision)
    assert found["revision"] == commit
    assert list(found["tensors"]) == [tensor]


def test_a_token_opens_a_gated_repository_and_without_it_the_way_in_is_said(
    client: Client,
) -> None:
    error = client.error("org/gated")
    assert "gated" in error
    assert f"{client.hub.endpoint}/org/gated" in error
    assert "HF_TOKEN" in error
    assert "HF_TOKEN" in client.error("org/gated", HF_TOKEN="hf_wrong")
    assert client.open("org/gated", HF_TOKEN="hf_right")["files"] == ["model.safetensors"]


def test_a_missing_repository_is_named_with_the_hub_that_was_asked(client: Client) -> None:
    error = client.error("org/absent")
    assert error.startswith("'org/absent': no such folder, and no such repository")
    assert client.hub.endpoint in error


def test_a_missing_revision_is_named(client: Client) -> None:
    error = client.error("org/single", "v9")
    assert "'org/single'" in error
    assert "no revision 'v9'" in error


def test_an_empty_revision_is_refused_and_not_taken_for_the_default(client: Client) -> None:
    assert "empty revision" in client.error("org/single", "")
    assert client.hub.requests == []


def test_progress_goes_to_stderr_alone(client: Client) -> None:
    done = client.run("org/single")
    assert "Fetching" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_offline_without_a_cache_says_how_to_download(client: Client) -> None:
    error = client.error("org/single", HF_HUB_OFFLINE="1")
    assert "'org/single'" in error
    assert "HF_HUB_OFFLINE is set" in error
    assert client.hub.requests == []


def test_offline_with_part_of_the_files_says_how_to_download(client: Client) -> None:
    folder = Path(client.open("org/indexed")["folder"])
    (folder / TWO).unlink()
    assert "HF_HUB_OFFLINE is set" in client.error("org/indexed", HF_HUB_OFFLINE="1")


def test_a_cache_without_a_listing_serves_offline(client: Client) -> None:
    online = client.open("org/indexed")
    for listing in client.home.rglob("trees/*.json"):
        listing.unlink()
    assert client.open("org/indexed", HF_HUB_OFFLINE="1") == online


def test_a_hub_that_refuses_connections_is_named(client: Client) -> None:
    error = client.error("org/single", HF_ENDPOINT="http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer" in error
    assert "refused" in error


def test_a_body_of_the_wrong_size_is_no_download(client: Client) -> None:
    error = client.error("org/short")
    assert "'org/short': not downloaded" in error
    assert "size" in error


# Changes to a sound repository (None takes a file away), and words its error must hold.
UNFIT: dict[str, tuple[dict[str, bytes | None], tuple[str, ...]]] = {
    "only pickles": (
        {INDEX: None, ONE: None, TWO: None, "adapter_model.safetensors": None,
         "consolidated.safetensors": None},
        ("only pickled weights",),
    ),
    "an index of a file that is not there": ({TWO: None}, (TWO, "missing")),
    "a damaged index": ({INDEX: b"<<<<<<< HEAD"}, (INDEX, "damaged index")),
    "an index that leads out": (
        {INDEX: _json(index_of({"a": "../../x.safetensors"}))}, ("../../x.safetensors",),
    ),
    "both a single file and an index": (
        {"model.safetensors": small_file("a")}, ("both", "model.safetensors", INDEX),
    ),
    "no config": ({"config.json": None}, ("no config.json",)),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_repository_is_refused_before_any_weights_are_fetched(
    case: str, client: Client
) -> None:
    changes, words = UNFIT[case]
    changed = {name: data for name, data in (INDEXED | changes).items() if data is not None}
    client.hub.repositories["org/indexed"].commits[OLD] = changed
    error = client.error("org/indexed")
    for word in words:
        assert word in error
    assert not [name for name in client.hub.fetched() if name.endswith(".safetensors")]
