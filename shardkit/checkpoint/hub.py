"""A Hub repository as a local folder: only the files a split reads, through huggingface_hub.

The library owns the cache, the progress bars on stderr, the check of each file's size, and what
HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean.
"""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardkit.checkpoint.config import read_config
from shardkit.checkpoint.weight_files import COMPANIONS, find_weight_files, list_names
from shardkit.errors import CheckpointError
from shardkit.strict_json import quote

MAX_SOURCE = 400  # characters: a folder that is not there is taken for a Hub id


def download_snapshot(
    repo_id: str, revision: str | None, pickled: bool = False
) -> tuple[Path, str]:
    """The local snapshot folder of a Hub id and its commit hash.

    The small files come first: they say which weights are wanted, and whether the repository is a
    checkpoint at all, before gigabytes are fetched. Raises CheckpointError.
    """
    if revision == "":
        raise CheckpointError(f"{quote(repo_id)}: an empty revision; name one, or leave it out")
    folder = _download_files(repo_id, revision, [f"*{suffix}" for suffix in COMPANIONS])
    commit = folder.name
    read_config(folder)
    _, weights = find_weight_files(folder, _list_repository(repo_id, commit, folder), pickled)
    _download_files(repo_id, commit, [escape(name) for name in weights])
    return folder, commit


def _download_files(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot folder, with every file of the repository's top folder that fits a pattern."""
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the library lets its HTTP client's and storage's errors through
        raise CheckpointError(
            f"{quote(repo_id, MAX_SOURCE)}: {_describe_error(error, repo_id, revision)}"
        ) from None
    return Path(folder)


def _list_repository(repo_id: str, commit: str, folder: Path) -> list[str]:
    """The names in the repository's top folder."""
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:  # offline, and the cache was filled file by file
        return list_names(folder)
    return sorted(file.path for file in tree if "/" not in file.path)


def _describe_error(error: Exception, repo_id: str, revision: str | None) -> str:
    """What went wrong and the way out, in one line."""
    hub = constants.ENDPOINT
    match error:
        case HFValidationError():
            return "no such folder, and not a Hub id such as `org/name`"
        case GatedRepoError():
            return f"gated; ask for access at {hub}/{repo_id}, then `hf auth login` or set HF_TOKEN"
        case RepositoryNotFoundError():
            return (
                f"no such folder, and no such repository at {hub}; check the name, or"
                " `hf auth login` or set HF_TOKEN if it is private"
            )
        case RevisionNotFoundError():
            return f"no revision {quote(revision)}; name a branch, a tag or a whole commit hash"
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                "not a folder, nor whole in the Hub cache, and HF_HUB_OFFLINE is set;"
                " unset it to download"
            )
        case LocalEntryNotFoundError():
            return (
                f"not a folder, nor whole in the Hub cache, and {hub} does not answer"
                f" ({_first_line(error.__cause__ or error)}); check the network and HF_ENDPOINT"
            )
    return f"not downloaded: {_first_line(error)}; run the same command again to resume"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c for c in lines[0][:200] if c.isprintable())
