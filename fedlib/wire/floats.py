"""Tensors as little-endian float32, one after the other, without shapes: both sides know the model's layout."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from fedlib.errors import PayloadError


def encode(arrays: Sequence[np.ndarray], names: Sequence[str] | None = None) -> np.ndarray:
    """Float32 arrays of any shape as one uint8 array, 4 bytes a value; one copy.

    Raises PayloadError with the array's name (its index without `names`) where a value is NaN or infinite, and
    TypeError for another dtype: a silent cast could make infinities of large values.
    """
    for index, array in enumerate(arrays):
        if array.dtype != np.float32:
            raise TypeError(f"{_name(names, index)}: {array.dtype}, expected float32")
    values = np.concatenate([*arrays, np.empty(0, np.float32)], axis=None).astype("<f4", copy=False)
    _check_finite(values, list(accumulate(array.size for array in arrays)), names)
    return values.view(np.uint8)


def decode(
    data: bytes | bytearray | memoryview, shapes: Sequence[Sequence[int]], names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Read-only float32 arrays of the given shapes: views of `data` where its alignment and the platform allow it.

    Raises PayloadError when the length is not that of the shapes, or a value is NaN or infinite (named as in `encode`).
    """
    sizes = [math.prod(shape) for shape in shapes]
    found = memoryview(data).nbytes
    if found != 4 * sum(sizes):
        raise PayloadError(f"floats: {found} bytes, expected {4 * sum(sizes)} for {len(sizes)} tensors")
    values = np.require(np.frombuffer(data, "<f4"), np.float32, "A")
    values.flags.writeable = False
    ends = list(accumulate(sizes))
    _check_finite(values, ends, names)
    return [values[end - size : end].reshape(shape) for shape, size, end in zip(shapes, sizes, ends, strict=True)]


def _check_finite(values: np.ndarray, ends: list[int], names: Sequence[str] | None) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        at = int(finite.argmin())
        index = bisect_right(ends, at)
        place = at - [0, *ends][index]
        raise PayloadError(f"{_name(names, index)}: value {place} is {values[at]}, only finite numbers travel")


def _name(names: Sequence[str] | None, index: int) -> str:
    return names[index] if names else f"tensor {index}"
