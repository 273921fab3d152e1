"""Gzip'd files and tar archives: what is in them, one after another and no more than it may be; a hash of the latter
that packing anew does not change."""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

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


def copy(source: IO[bytes], target: Any, most: int, name: str) -> None:
    """All bytes; OSError as soon as there are more than `most`, which a few packed ones can be many times."""
    left = most
    while block := source.read(1 << 20):
        if (left := left - len(block)) < 0:
            raise OSError(f"{name}: more than the {most:,} bytes that it may have; stopped")
        target.write(block)


def unpacked(item: Path, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and unpacked bytes of each wanted file in `item`: the file itself, a tar archive or a gzip'd file."""
    name = item.name if item.name in wanted else item.name.removesuffix(".gz")
    if name in wanted:
        opener: Callable[..., Any] = Path.open if name == item.name else gzip.open
        yield name, opener(item, "rb")
    elif item.name.endswith(".tar.gz"):
        yield from ((name, source) for name, source in members(item) if name in wanted)
