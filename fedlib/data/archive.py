"""Gzip'd tar archives: their files one after another, and a hash of these that packing anew does not change."""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

# What a file that is no such archive, or a damaged one, can raise.
BROKEN = (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error)


def members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and bytes of each file in the archive; the bytes are to be read before the next one is asked for.

    Only the last part of a name is given, so that none can lead out of a folder. Raises OSError and what BROKEN lists.
    """
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.isfile() and (source := archive.extractfile(member)):
                yield PurePosixPath(member.name).name, source


def contents(path: Path, suffix: str) -> str:
    """SHA-256 in hex of the names and bytes of all files with this suffix; raises as `members` does.

    Folders, dates, order and compression do not matter. Where the files are unpacked in one folder and the locale is C,
    `sha256sum *.wav | sha256sum` prints that of ".wav".
    """
    found = sorted(
        (name, hashlib.file_digest(source, "sha256").hexdigest())  # type: ignore[arg-type]
        for name, source in members(path)
        if name.endswith(suffix)
    )
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in found).encode()).hexdigest()
