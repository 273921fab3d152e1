"""Data sets by name: `sources.get` fetches one, `load` reads it, `partition` divides it among clients."""

import hashlib
import json
from pathlib import Path

from fedlib.data import sets, sources
from fedlib.data.sets import Dataset

__all__ = ["Dataset", "digest", "load"]


def load(name: str | sets.Entry, root: Path | None = None) -> Dataset:
    """Verify and read a data set below the project's root (`sources.home()` by default).

    Names: "fashion-mnist", "cifar10", "cifar10-jpeg" (a result on it is not a result on CIFAR-10), "digits", "emnist"
    (by class), "shakespeare" (texts by speaking role, which own them), "spoken-digits" (recordings by speaker). Raises
    SpecError for any other, DataError when a file is missing, altered or unreadable.
    """
    entry = sets.find(name)
    return sets.read(entry, sources.verify(entry, root))


def digest(name: str | sets.Entry) -> str:
    """SHA-256 in hex of all that decides a data set's numbers: expected hashes, normalisation, version of the reading.

    Needs no data on disk. Raises SpecError for an unknown name.
    """
    entry = sets.find(name)
    numbers = (entry.mean, entry.std, entry.scale, entry.version)
    text = json.dumps([entry.name, entry.files, entry.shipped, *numbers])
    return hashlib.sha256(text.encode()).hexdigest()
