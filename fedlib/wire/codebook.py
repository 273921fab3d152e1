"""Tensors of few distinct values as a codebook and indexes into it; what is read is what was written, bit for bit.

codebooks: tensor after tensor: distinct values less one u8 | the values, float32, little-endian, ascending
indexes:   tensor after tensor: length in bytes u32 | message of the entropy coder; nothing for a single value
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from fedlib.errors import PayloadError
from fedlib.wire import entropy

MOST = 256  # values of a codebook
_LENGTH = struct.Struct("<I")


def split(values: np.ndarray, name: str = "tensor") -> tuple[np.ndarray, np.ndarray]:
    """Ascending codebook, float32 [values], and the index of each entry, uint8 [n]. -0.0 becomes 0.0.

    PayloadError where a value is not finite, or there are more than 256 of them.
    """
    flat = values.ravel() + np.float32(0)
    if not np.isfinite(flat).all():
        raise PayloadError(f"{name}: values are not finite, only finite numbers travel")
    book = np.unique(flat)
    if not 1 <= book.size <= MOST:
        raise PayloadError(f"{name}: {book.size} distinct values, expected 1 to {MOST}")
    return book, np.searchsorted(book, flat).astype(np.uint8)


def encode(tensors: Sequence[np.ndarray], names: Sequence[str] | None = None) -> tuple[bytes, bytes]:
    """Both sections for float32 tensors of any shape; raises as `split` does."""
    books, indexes = [], []
    for place, tensor in enumerate(tensors):
        book, index = split(tensor, names[place] if names else f"tensor {place}")
        books.append(bytes((book.size - 1,)) + book.astype("<f4").tobytes())
        if book.size > 1:
            message = entropy.encode(index, book.size)
            indexes.append(_LENGTH.pack(len(message)) + message)
    return b"".join(books), b"".join(indexes)


def decode(books: memoryview, indexes: memoryview, sizes: Sequence[int]) -> list[np.ndarray]:
    """The inverse for tensors of `sizes` entries: float32 [n] each.

    PayloadError where the sections do not fit each other or the sizes, a codebook does not ascend, or an index is out
    of range.
    """
    found = []
    start = 0
    for place, (book, n) in enumerate(zip(read_books(books, len(sizes)), sizes, strict=True)):
        if book.size == 1:
            found.append(np.repeat(book, n))
            continue
        if start + _LENGTH.size > len(indexes):
            raise PayloadError(f"indexes: {len(indexes)} bytes end before tensor {place}")
        (length,) = _LENGTH.unpack_from(indexes, start)
        start += _LENGTH.size
        if start + length > len(indexes):
            raise PayloadError(f"indexes: {len(indexes)} bytes, expected {start + length} or more up to tensor {place}")
        found.append(book[entropy.decode(indexes[start : start + length], n, book.size)])
        start += length
    if start != len(indexes):
        raise PayloadError(f"indexes: {len(indexes)} bytes, expected {start} by the lengths in them")
    return found


def read_books(section: memoryview, tensors: int) -> list[np.ndarray]:
    """The codebooks. PayloadError: wrong length, values that are not finite or do not ascend."""
    found, start = [], 0
    for place in range(tensors):
        end = start + 1 + 4 * (section[start] + 1) if start < len(section) else start + 5
        if end > len(section):
            raise PayloadError(f"codebooks: {len(section)} bytes, expected {end} or more up to tensor {place}")
        book = np.frombuffer(section[start + 1 : end], "<f4").astype(np.float32)
        if not np.isfinite(book).all() or (book[1:] <= book[:-1]).any():
            raise PayloadError(f"codebook {place}: {book[:8]}, expected finite values in ascending order")
        found.append(book)
        start = end
    if start != len(section):
        raise PayloadError(f"codebooks: {len(section)} bytes, expected {start} for {tensors} tensors")
    return found


def limits(sizes: Sequence[int]) -> list[int]:
    """The longest sections that tensors of these sizes can have."""
    return [(1 + 4 * MOST) * len(sizes), sum(n + _LENGTH.size + 64 for n in sizes)]


def fixed_bits(books: Sequence[int], sizes: Sequence[int]) -> int:
    """Bits of codebooks with so many values in float32, and of indexes of one width, tensor by tensor whole bytes."""
    indexes = [(n * (values - 1).bit_length() + 7) // 8 for values, n in zip(books, sizes, strict=True)]
    return 8 * (4 * sum(books) + sum(indexes))
