"""Integers of a fixed width as bits: integer i lies at bits i * width on, counted from the lowest bit of byte 0.

Widths up to 8 are one run of bits. From 9 to 16 the lower bytes come first, one each, and then the upper parts as a run
of their own: together no longer. What is left of the last byte is zero.
"""

import numpy as np

from fedlib.errors import PayloadError

WIDEST = 16


def size(n: int, width: int = 1) -> int:
    """Bytes that `n` integers take."""
    return (n * width + 7) // 8


def pack(symbols: np.ndarray, width: int = 1) -> bytes:
    """Integers of shape (n,) below 2^width as size(n, width) bytes; at width 1 also bool, or all but 0 for one.

    A larger integer is the caller's mistake, and is not looked for.
    """
    if width == 1:
        return np.packbits(symbols, bitorder="little").tobytes()
    _check_width(width)
    lower = symbols.astype(np.uint8)  # modulo 256
    if width <= 8:
        return _run(lower, width)
    return lower.tobytes() + pack(symbols.astype(np.uint16) >> 8, width - 8)


def unpack(data: bytes | bytearray | memoryview, n: int, width: int = 1) -> np.ndarray:
    """The integers of shape (n,): bool at width 1, uint8 up to 8, else uint16.

    Raises PayloadError on a wrong length and on bits set past the last integer.
    """
    _check_width(width)
    packed = np.frombuffer(data, np.uint8)
    if packed.size != size(n, width):
        raise PayloadError(f"bits: {packed.size} bytes, expected {size(n, width)} for {n} entries of width {width}")
    used = n * (width if width <= 8 else width - 8) % 8
    if used and packed[-1] >> used:
        raise PayloadError(f"bits: last byte is {packed[-1]:#04x}, but only its lowest {used} bits may be set")
    if width == 1:
        return np.unpackbits(packed, count=n, bitorder="little").view(np.bool_)
    if width <= 8:
        return _integers(packed, n, width)
    upper = unpack(packed[n:].data, n, width - 8)
    return packed[:n] | (upper.astype(np.uint16) << np.uint16(8))


def _check_width(width: int) -> None:
    if not 1 <= width <= WIDEST:
        raise ValueError(f"width: {width}, expected 1 to {WIDEST}")


def _run(symbols: np.ndarray, width: int) -> bytes:
    """Integers of at most 8 bits: eight of them are `width` bytes, and lie in one word of 64 bits."""
    padded = np.pad(symbols, (0, -symbols.size % 8))
    words = np.zeros(padded.size // 8, "<u8")
    for place in range(8):
        words |= padded[place::8].astype(np.uint64) << np.uint64(place * width)
    return words.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()[: size(symbols.size, width)]


def _integers(packed: np.ndarray, n: int, width: int) -> np.ndarray:
    padded = np.pad(packed, (0, size(n) * width - packed.size)).reshape(-1, width)
    words = np.pad(padded, ((0, 0), (0, 8 - width))).view("<u8").reshape(-1)
    symbols = np.empty((size(n), 8), np.uint8)
    for place in range(8):
        symbols[:, place] = words >> np.uint64(place * width) & np.uint64(2**width - 1)
    return symbols.reshape(-1)[:n]
