"""What the tests of several folders use: the repository's root, a mark, memory at its peak, tensors by their hash,
Hadamard matrices."""

import hashlib
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from fedlib.wire import entropy

ROOT = Path(__file__).parents[1]
range_coded = pytest.mark.skipif(not entropy.RANGE_CODER, reason="constriction has no wheel for this machine")


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
