"""What `--force` may replace: a folder that shardkit wrote, with nothing else in it."""

import os
import stat
from collections.abc import Collection
from functools import partial
from pathlib import Path

from shardkit.errors import ManifestError, OutputError
from shardkit.output import Destination
from shardkit.shards import MANIFEST_NAME, Manifest, read_manifest
from shardkit.strict_json import quote

CONFIG = "config.json"


def shard_destination(out: Path, force: bool = False, resume: bool = False) -> Destination:
    """Where a split or a reshard goes."""
    return Destination(out, check_shards if force else None, resume)


def merge_destination(
    manifest: Manifest, out: Path, force: bool = False, resume: bool = False
) -> Destination:
    """Where a merge goes."""
    source = manifest.source
    index = [source.index.name] if source.index else []
    names = {*manifest.companion_files, *index, *(file.name for file in source.files)}
    return Destination(out, partial(check_merged, names=names) if force else None, resume)


def check_shards(folder: Path) -> None:
    """Raise OutputError unless this is a shard folder, whole or damaged, and no more than that."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as fault:
        raise OutputError(f"{fault}; --force replaces shard folders only: remove it") from None
    _check_only(
        folder, {MANIFEST_NAME, *(rank.name for rank in manifest.ranks), *manifest.companion_files}
    )


def check_merged(folder: Path, names: Collection[str]) -> None:
    """Raise OutputError unless this is a checkpoint of only files that the merge writes, `names`.

    A merge leaves no manifest, so no file is lost that the new output does not have too.
    """
    if not (folder / CONFIG).exists():
        raise OutputError(
            f"{folder}: no {CONFIG}, so not a checkpoint that --force may replace; remove it"
        )
    _check_only(folder, names)


def _check_only(folder: Path, names: Collection[str]) -> None:
    """Raise OutputError, naming what else there is than plain files of these names."""
    for name in sorted(os.listdir(folder)):
        plain = stat.S_ISREG((folder / name).lstat().st_mode)
        if not plain or name not in names:
            what = "is in it" if plain else "in it is not a plain file"
            raise OutputError(
                f"{folder}: {quote(name)} {what}, and shardkit did not write that there;"
                " move it away, and --force replaces the rest"
            )
