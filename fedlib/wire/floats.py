"""Tensors as little-endian float32, one after the other, without shapes: both sides know the model's layout."""

import math
from collections.abc import Sequence

import numpy as np

from fedlib.errors import PayloadError


def encode(arrays: Sequence[np.ndarray], names: Sequence[str] | None = None) -> np.ndarray:
    """Float32 arrays of any shape as one uint8 array, 4 bytes a value; one copy.

    Raises PayloadError with the array's name (its index without `names`) where a value is NaN or infinite, and
    TypeError for another dtype: a silent cast could make infinities of large values.
    """
    values = np.empty(sum(array.size for array in arrays), "<f4")
    start = 0
    for index, array in enumerate(arrays):
        if array.dtype != np.float32:
            raise TypeError(f"{_name(names, index)}: {array.dtype}, expected float32")
        part = values[start : start + array.size]
        part.reshape(array.shape)[...] = array
        _check_finite(part, names, index)
        start += array.size
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
    arrays = []
    start = 0
    for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        part = values[start : start + size]
        _check_finite(part, names, index)
        arrays.append(part.reshape(shape))
        start += size
    return arrays


def _check_finite(values: np.ndarray, names: Sequence[str] | None, index: int) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        at = int(finite.argmin())
        raise PayloadError(f"{_name(names, index)}: value {at} is {values[at]}, only finite numbers travel")


def _name(names: Sequence[str] | None, index: int) -> str:
    return names[index] if names else f"tensor {index}"
