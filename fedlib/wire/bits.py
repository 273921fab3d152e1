"""Masks as bits: entry i is bit i % 8, counted from the lowest, of byte i // 8; the last byte is filled with zeros."""

import numpy as np

from fedlib.errors import PayloadError


def pack(mask: np.ndarray) -> bytes:
    """A mask of shape (n,), bool or integer with non-zero meaning one, as ceil(n / 8) bytes."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack(data: bytes | bytearray | memoryview, n: int) -> np.ndarray:
    """The bool mask of shape (n,). Raises PayloadError on a wrong length and on bits set past the last entry."""
    packed = np.frombuffer(data, np.uint8)
    if packed.size != (n + 7) // 8:
        raise PayloadError(f"bits: {packed.size} bytes, expected {(n + 7) // 8} for {n} entries")
    if n % 8 and packed[-1] >> (n % 8):
        raise PayloadError(f"bits: last byte is {packed[-1]:#04x}, but only its lowest {n % 8} bits may be set")
    return np.unpackbits(packed, count=n, bitorder="little").view(np.bool_)
