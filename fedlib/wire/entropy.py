"""Integer symbols in close to as few bits as their histogram allows.

The first byte of a message names its codec, the encoder takes the shortest:

    0 | ceil(log2(alphabet)) bits a symbol, lowest bit first, as `bits` packs them
    1 | count of each symbol (LEB128) | words of a range coder (u32, little-endian; none when all symbols are equal)
    2 | for each context that occurs, in order, the count of each symbol but 0 | words; symbols sorted by context

A context is a small integer that both sides know of every symbol beforehand, such as its layer: codec 2 has a histogram
for each, and so gets by with the conditional entropy of the symbols, given their contexts.

The words, and the model that is made of the transmitted counts alone, are `fedlib.wire.range_coder`'s.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlib.errors import PayloadError
from fedlib.wire import bits, range_coder
from fedlib.wire.contexts import check_contexts, group_contexts

FIXED, RANGE, CONTEXTS = 0, 1, 2  # codecs, as the first byte names them
RANGE_CODER = range_coder.AVAILABLE  # False: this machine writes and reads codec 0 only, so that messages are longer
_LENGTH = struct.Struct("<I")
_MAX_RANGE_ALPHABET = 2**16  # the model has 24 bits of precision, of which each symbol holds one unit


def encode(symbols: np.ndarray, alphabet: int, contexts: np.ndarray | None = None) -> bytes:
    """Integers of shape (n,), each in [0, alphabet), as bytes; contexts, if any: of shape (n,), each in [0, 65536).

    Raises ValueError when they are anything else.
    """
    if symbols.ndim != 1 or symbols.dtype.kind not in "biu":
        raise ValueError(f"symbols: {symbols.dtype} of shape {symbols.shape}, expected integers of shape (n,)")
    if symbols.size and (symbols.min() < 0 or symbols.max() >= alphabet):
        raise ValueError(f"symbols: from {symbols.min()} to {symbols.max()}, expected 0 to {alphabet - 1}")
    check_contexts(contexts, symbols.size)
    shortest, size = None, 1 + (symbols.size * _width(alphabet) + 7) // 8
    if RANGE_CODER and alphabet <= _MAX_RANGE_ALPHABET:
        symbols = np.ascontiguousarray(symbols, np.int32)
        for codec in (RANGE,) if contexts is None else (CONTEXTS, RANGE):
            order, sizes = _grouping(codec, symbols.size, contexts)
            # The counts alone take a byte each: where they cannot pay, they are not even made.
            counted = len(sizes) * _counted(codec, alphabet)
            if counted >= size:
                continue
            groups = _split(symbols[order], sizes)
            counts = [np.bincount(group, minlength=alphabet) for group in groups]
            if counted + sum(map(entropy_bits, counts)) / 8 < size:
                message = _range_message(codec, groups, counts)
                if len(message) < size:
                    shortest, size = message, len(message)
    return shortest or bytes((FIXED,)) + _fixed(symbols, alphabet)


def decode(
    data: bytes | bytearray | memoryview, n: int, alphabet: int, contexts: np.ndarray | None = None
) -> np.ndarray:
    """The int32 symbols of shape (n,), given the encoder's contexts.

    Raises PayloadError unless the bytes are the very ones that its codec makes of these symbols. Takes memory for n
    symbols and the message, whatever the message claims. Without constriction, codecs 1 and 2 are PayloadErrors too.
    """
    _width(alphabet)
    check_contexts(contexts, n)
    message = bytes(data)
    if not message:
        raise PayloadError("symbols: no bytes, expected a codec and its message")
    if message[0] == FIXED:
        return _fixed_symbols(message, n, alphabet)
    if message[0] == RANGE or (message[0] == CONTEXTS and contexts is not None):
        return _range_symbols(message, n, alphabet, contexts)
    known = f"{FIXED} (fixed width) or {RANGE} (range coder)"
    more = "" if contexts is None else f" or {CONTEXTS} (range coder with contexts)"
    raise PayloadError(f"symbols: codec {message[0]}, expected {known}{more}")


class Parts:
    """A section's parts, one after another; `name` begins what errors say. Raises PayloadError where a part is cut."""

    def __init__(self, section: memoryview, name: str) -> None:
        self.section, self.name, self.start = section, name, 0

    def take(self, size: int, tensor: int) -> memoryview:
        """The next `size` bytes, which are those of tensor number `tensor`."""
        end = self.start + size
        if end > len(self.section):
            raise PayloadError(f"{self.name}: {len(self.section)} bytes, expected {end} or more up to tensor {tensor}")
        part, self.start = self.section[self.start : end], end
        return part

    def symbols(self, n: int, alphabet: int, tensor: int) -> np.ndarray:
        """The next symbols, as `framed` wrote them."""
        (length,) = _LENGTH.unpack(self.take(_LENGTH.size, tensor))
        return decode(self.take(length, tensor), n, alphabet)

    def end(self, reason: str) -> None:
        """PayloadError unless nothing is left."""
        if self.start != len(self.section):
            raise PayloadError(f"{self.name}: {len(self.section)} bytes, expected {self.start} {reason}")


def framed(symbols: np.ndarray, alphabet: int) -> bytes:
    """`encode`'s message after its length, u32, little-endian."""
    message = encode(symbols, alphabet)
    return _LENGTH.pack(len(message)) + message


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon's bound in bits for a message in which symbol i occurs counts[i] times (empirical entropy times n)."""
    used = counts[counts > 0].astype(np.float64)
    return float((used * np.log2(used.sum() / used)).sum())


def _width(alphabet: int) -> int:
    """Bits a symbol of codec 0."""
    if not 1 <= alphabet <= 2**31:
        raise ValueError(f"alphabet: {alphabet} symbols, expected 1 to {2**31}")
    return (alphabet - 1).bit_length()


def _fixed(symbols: np.ndarray, alphabet: int) -> bytes:
    width = _width(alphabet)
    if width == 1:
        return bits.pack(symbols)
    octets = symbols.astype("<u4").view(np.uint8).reshape(-1, 4)
    return bits.pack(np.unpackbits(octets, axis=1, count=width, bitorder="little").reshape(-1))


def _fixed_symbols(message: bytes, n: int, alphabet: int) -> np.ndarray:
    width = _width(alphabet)
    flags = bits.unpack(memoryview(message)[1:], n * width).reshape(n, width)
    symbols = np.zeros(n, np.int32)
    for bit in range(width):
        symbols |= flags[:, bit].astype(np.int32) << bit
    if n and symbols.max() >= alphabet:
        raise PayloadError(f"symbols: found {symbols.max()}, expected at most {alphabet - 1}")
    return symbols


def _grouping(codec: int, n: int, contexts: np.ndarray | None) -> tuple[Any, np.ndarray]:
    """The order in which a codec takes the symbols, and how many there are of each context that occurs."""
    return (slice(None), np.array([n])) if codec == RANGE or contexts is None else group_contexts(contexts)


def _split(symbols: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    return [symbols[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]


def _counted(codec: int, alphabet: int) -> int:
    """Counts that travel for each context: its size is known, and so the count of symbol 0, in masks the largest."""
    return alphabet - (codec == CONTEXTS)


def _range_message(codec: int, groups: list[np.ndarray], counts: Sequence[np.ndarray]) -> bytes:
    head = bytearray((codec,))
    for own in counts:
        for count in own[own.size - _counted(codec, own.size) :].tolist():
            while count > 127:
                head.append(count & 127 | 128)
                count >>= 7
            head.append(count)
    return bytes(head) + range_coder.encode(groups, counts)


def _range_symbols(message: bytes, n: int, alphabet: int, contexts: np.ndarray | None) -> np.ndarray:
    if not RANGE_CODER:
        raise PayloadError("symbols: coded by the range coder; install the package constriction to read them")
    if alphabet > _MAX_RANGE_ALPHABET:
        raise PayloadError(f"symbols: range coder for an alphabet of {alphabet}, at most {_MAX_RANGE_ALPHABET}")
    longest = 64 + (n * _width(alphabet) + 7) // 8  # an encoder takes codec 0 where this one is no shorter
    if len(message) > longest:
        raise PayloadError(f"symbols: {len(message)} bytes of range coder, expected at most {longest}")
    order, sizes = _grouping(message[0], n, contexts)
    counts, start = _read_counts(message, sizes, alphabet)
    if (len(message) - start) % 4:
        raise PayloadError(f"symbols: {len(message) - start} bytes of range coder, expected a multiple of 4")
    symbols = np.empty(n, np.int32)
    groups = _split(symbols, sizes)
    range_coder.decode(np.frombuffer(message, "<u4", offset=start), groups, counts)
    # Words may be missing, left over or altered and still decode to something; then this rebuilds other bytes.
    if _range_message(message[0], groups, [np.bincount(group, minlength=alphabet) for group in groups]) != message:
        raise PayloadError("symbols: altered, what they decode to has other counts or another code")
    if message[0] == RANGE:
        return symbols
    unsorted = np.empty_like(symbols)
    unsorted[order] = symbols
    return unsorted


def _read_counts(message: bytes, sizes: np.ndarray, alphabet: int) -> tuple[np.ndarray, int]:
    """The counts, of shape (contexts, alphabet), and where the range coder's words begin."""
    n, each = int(sizes.sum()), _counted(message[0], alphabet)
    numbers: list[int] = []
    number = shift = 0
    start = 1
    while len(numbers) < len(sizes) * each and start < len(message):
        number |= (message[start] & 127) << shift
        shift += 7
        if shift > 35:
            raise PayloadError(f"symbols: a count of more than 5 bytes, expected {n} in all")
        if number > n:
            raise PayloadError(
                f"symbols: {number} or more of symbol {len(numbers) % each + alphabet - each}, expected {n} in all"
            )
        if message[start] < 128:
            numbers.append(number)
            number = shift = 0
        start += 1
    if len(numbers) == len(sizes) * each:
        counts = np.array(numbers, np.int64).reshape(len(sizes), each)
        rest = sizes - counts.sum(1)
        if each < alphabet:
            counts, rest = np.column_stack([rest, counts]), np.minimum(rest, 0)
        if not rest.any():
            return counts, start
    raise PayloadError(
        f"symbols: counts of {len(numbers)} symbols with sum {sum(numbers)}, expected {len(sizes) * each} and {n}"
    )
