"""The zip archive that torch.save writes, checked before anything in it is unpickled.

Only the plain form passes: members stored as they are, one after another, their checksums right,
none that torch.save does not write. Nothing is ever extracted.
"""

import re
import struct
import zipfile
from typing import BinaryIO

MAX_PICKLE = 16 << 20  # names and shapes; a file of a thousand tensors has 100 kB
MAX_MEMBERS = 1_000_000
LOCAL, END = b"PK\x03\x04", b"PK\x05\x06"
# How a file of torch before 1.6 begins: the pickle of a number that marks it.
BEFORE_ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
MEMBER = re.compile(
    r"[^/\\\x00]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/\d{1,9})"
)
Extents = dict[str, tuple[int, int]]


class ArchiveError(ValueError):
    """Why a file is not an archive that may be unpickled, in one line."""


def check_archive(file: BinaryIO, size: int) -> Extents:
    """The start and size of each member's bytes, by its name after the archive's own.

    Raises ArchiveError. Reads every byte once, for the checksums.
    """
    _check_ends(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, size)
            extents = _find_extents(file, members, size)
            if (damaged := archive.testzip()) is not None:
                raise ArchiveError(f"damaged: the checksum of {damaged[:80]!a} is wrong")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error) as fault:
        raise ArchiveError(f"damaged: {str(fault)[:200]!a}") from None
    return extents


def _check_ends(file: BinaryIO, size: int) -> None:
    """A zip from the first byte to the last: no other format around it, no second directory."""
    first = file.read(len(BEFORE_ZIP))
    if first == BEFORE_ZIP:
        raise ArchiveError(
            "in the format of torch before 1.6, which is not read: load it with"
            " torch.load(weights_only=True), and save it again with torch.save or as safetensors"
        )
    if first and not first.startswith(LOCAL):
        raise ArchiveError("not the zip archive that torch.save writes")
    if size < 22:
        raise ArchiveError(f"{size} bytes, too short for an archive: truncated")
    file.seek(size - 22)
    last = file.read(22)
    if last[:4] != END or last[-2:] != b"\0\0":
        raise ArchiveError("does not end as a zip archive does: truncated, or extended")
    file.seek(0)


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    names = [member.filename for member in members]
    if len(names) > MAX_MEMBERS or len(set(names)) != len(names):
        raise ArchiveError(f"{len(names)} members, some of one name, or too many")
    for member in members:
        shown = f"member {member.filename[:80]!a}"
        if not MEMBER.fullmatch(member.filename) or member.orig_filename != member.filename:
            raise ArchiveError(f"{shown} is none that torch.save writes; TorchScript is not read")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ArchiveError(f"{shown} is compressed; torch.save stores its members")
        if member.flag_bits & 1:
            raise ArchiveError(f"{shown} is encrypted")
    if len({name.partition("/")[0] for name in names}) != 1:
        raise ArchiveError("members of more than one archive")
    total = sum(member.file_size for member in members)
    if total > size:
        raise ArchiveError(f"members of {total} bytes in a file of {size}")
    pickles = [m.file_size for m in members if m.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0] > MAX_PICKLE:
        raise ArchiveError(f"no data.pkl, or one of more than {MAX_PICKLE} bytes")


def _find_extents(file: BinaryIO, members: list[zipfile.ZipInfo], size: int) -> Extents:
    """Where each member's bytes lie, after its own header; no two overlap."""
    extents: Extents = {}
    covered = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        file.seek(member.header_offset)
        head = file.read(30)
        if member.header_offset < covered or head[:4] != LOCAL:
            raise ArchiveError(f"member {member.filename[:80]!a} overlaps another, or is not there")
        start = member.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        covered = start + member.file_size
        extents[member.filename.partition("/")[2]] = (start, member.file_size)
    if covered > size:
        raise ArchiveError("members beyond the end of the file: truncated")
    return extents
