"""What the tests of several folders use: the root, a mark, data, processes, peak memory, tensors by their hash,
Hadamard matrices."""

import hashlib
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from fedlib.data import sets, sources
from fedlib.errors import DataError
from fedlib.wire import entropy

ROOT = Path(__file__).parents[1]
range_coded = pytest.mark.skipif(not entropy.RANGE_CODER, reason="constriction has no wheel for this machine")


def present(data: str | sets.Entry, root: Path | None = None) -> bool:
    """Whether every file of a data set is there with the right hash."""
    try:
        sources.verify(data, root)
    except DataError:
        return False
    return True


def session(leader: int) -> list[int]:
    """Living processes of a session (field 6 of /proc/PID/stat; field 3 is the state, Z when dead)."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            living.append(int(stat.parent.name))
    return living


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that Python and numpy have held at once during the call, beyond what they held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def digest(tensors: Iterable[Tensor]) -> str:
    """The start of the SHA-256 of float32 entries, little-endian: the same on every machine where the entries are."""
    content = b"".join(tensor.detach().numpy().astype("<f4").tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def sylvester(n: int) -> np.ndarray:
    """Entry (i, j) of H is -1 to the number of ones that the binary forms of i and j share."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)])
