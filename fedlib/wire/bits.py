"""Integers of a fixed width as bits: integer i lies at bits i * width on, counted from the lowest bit of byte 0.

Widths up to 8 are one run of bits. From 9 to 16 the lower bytes come first, one each, and then the upper parts as a run
of their own: together no longer. What is left of the last byte is zero.
"""

import numpy as np

from fedlib.errors import PayloadError

WIDEST = 16
_BLOCK = 2**17  # integers at a time: their bytes stay in the cache


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


def _steps(width: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """Eight integers, a byte each in a word of 64 bits, become a run of 8 * width bits in three steps, each of which
    moves every second field down to its neighbour: (mask of those that stay, shift of the others, mask of these)."""
    found = []
    for field, lane in ((width, 8), (2 * width, 16), (4 * width, 32)):
        stay = sum(((1 << field) - 1) << at for at in range(0, 64, 2 * lane))
        found.append((np.uint64(stay), np.uint64(lane - field), np.uint64(stay << field & (1 << 64) - 1)))
    return found


def _run(symbols: np.ndarray, width: int) -> bytes:
    steps, parts = _steps(width), []
    for start in range(0, symbols.size, _BLOCK):
        block = symbols[start : start + _BLOCK]
        if block.size % 8:
            block = np.concatenate([block, np.zeros(-block.size % 8, np.uint8)])
        words = block.view("<u8")
        for stay, shift, moved in steps:
            words = (words & stay) | ((words >> shift) & moved)
        parts.append(words.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :width].tobytes())
    return b"".join(parts)[: size(symbols.size, width)]


def _integers(packed: np.ndarray, n: int, width: int) -> np.ndarray:
    octets = -(-n // 8)
    if packed.size < octets * width:
        packed = np.concatenate([packed, np.zeros(octets * width - packed.size, np.uint8)])
    words, steps = np.zeros((octets, 8), np.uint8), _steps(width)[::-1]
    words[:, :width] = packed.reshape(octets, width)
    fields = words.view("<u8").reshape(-1)
    for start in range(0, octets, _BLOCK // 8):
        block = fields[start : start + _BLOCK // 8]
        for stay, shift, moved in steps:
            block[:] = (block & stay) | ((block & moved) << shift)
    return words.reshape(-1)[:n]
