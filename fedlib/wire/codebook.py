"""Tensors of few distinct values as a codebook and indexes into it; what is read is what was written, bit for bit.

codebooks: tensor after tensor: distinct values less one u8 | the values, float32, little-endian, ascending
indexes:   tensor after tensor: length in bytes u32 | message of the entropy coder; nothing for a single value
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlib.errors import PayloadError
from fedlib.wire import entropy

MOST = 256  # values of a codebook


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
            indexes.append(entropy.framed(index, book.size))
    return b"".join(books), b"".join(indexes)


def decode(books: memoryview, indexes: memoryview, sizes: Sequence[int]) -> list[np.ndarray]:
    """The inverse for tensors of `sizes` entries: float32 [n] each.

    PayloadError where the sections do not fit each other or the sizes, a codebook does not ascend, or an index is out
    of range.
    """
    found, parts = [], entropy.Parts(indexes, "indexes")
    for place, (book, n) in enumerate(zip(read_books(books, len(sizes)), sizes, strict=True)):
        found.append(book[parts.symbols(n, book.size, place)] if book.size > 1 else np.repeat(book, n))
    parts.end("by the lengths in them")
    return found


def read_books(section: memoryview, tensors: int) -> list[np.ndarray]:
    """The codebooks. PayloadError: wrong length, values that are not finite or do not ascend."""
    found, parts = [], entropy.Parts(section, "codebooks")
    for place in range(tensors):
        more = section[parts.start] if parts.start < len(section) else 0
        book = np.frombuffer(parts.take(5 + 4 * more, place)[1:], "<f4").astype(np.float32)
        if not np.isfinite(book).all() or (book[1:] <= book[:-1]).any():
            raise PayloadError(f"codebook {place}: {book[:8]}, expected finite values in ascending order")
        found.append(book)
    parts.end(f"for {tensors} tensors")
    return found


def limits(sizes: Sequence[int]) -> list[int]:
    """The longest sections that tensors of these sizes can have."""
    return [(1 + 4 * MOST) * len(sizes), sum(n + 4 + 64 for n in sizes)]


def fixed_bits(books: Sequence[int], sizes: Sequence[int]) -> int:
    """Bits of codebooks with so many values in float32, and of indexes of one width, tensor by tensor whole bytes."""
    indexes = [(n * (values - 1).bit_length() + 7) // 8 for values, n in zip(books, sizes, strict=True)]
    return 8 * (4 * sum(books) + sum(indexes))
