"""Integer symbols in close to as few bits as their histogram allows.

The first byte of a message names its codec, the encoder takes the shorter:

    0 | ceil(log2(alphabet)) bits a symbol, lowest bit first, as `bits` packs them
    1 | count of each symbol (LEB128) | words of a range coder (u32, little-endian; none when all symbols are equal)

Range coder: constriction's `queue.RangeEncoder` (R. Bamler, arXiv:2201.01741). Its model is made of the transmitted
counts alone, by one division and one product a symbol that IEEE 754 rounds alike on every machine: what one machine
encodes another decodes, and to the same bytes.
"""

import numpy as np

from fedlib.errors import PayloadError
from fedlib.wire import bits

try:
    from constriction import stream
except ImportError:  # no wheel for this machine: longer messages, each says so in its first byte
    stream = None

FIXED, RANGE = 0, 1  # codecs, as the first byte names them
RANGE_CODER = stream is not None  # False: this machine writes and reads codec 0 only
_MAX_RANGE_ALPHABET = 2**16  # the model has 24 bits of precision, of which each symbol holds one unit


def encode(symbols: np.ndarray, alphabet: int) -> bytes:
    """Integers of shape (n,), each in [0, alphabet), as bytes. Raises ValueError when they are anything else."""
    if symbols.ndim != 1 or symbols.dtype.kind not in "biu":
        raise ValueError(f"symbols: {symbols.dtype} of shape {symbols.shape}, expected integers of shape (n,)")
    if symbols.size and (symbols.min() < 0 or symbols.max() >= alphabet):
        raise ValueError(f"symbols: from {symbols.min()} to {symbols.max()}, expected 0 to {alphabet - 1}")
    fixed_size = 1 + (symbols.size * _width(alphabet) + 7) // 8
    # The counts alone take a byte a symbol of the alphabet: where they cannot pay, they are not even made.
    if RANGE_CODER and alphabet < fixed_size and alphabet <= _MAX_RANGE_ALPHABET:
        symbols = np.ascontiguousarray(symbols, np.int32)
        counts = np.bincount(symbols, minlength=alphabet)
        if alphabet + entropy_bits(counts) / 8 < fixed_size:
            message = _range_message(symbols, counts)
            if len(message) < fixed_size:
                return message
    return bytes((FIXED,)) + _fixed(symbols, alphabet)


def decode(data: bytes | bytearray | memoryview, n: int, alphabet: int) -> np.ndarray:
    """The int32 symbols of shape (n,).

    Raises PayloadError unless the bytes are the very ones that its codec makes of these symbols. Takes memory for n
    symbols and the message, whatever the message claims. Without constriction, codec 1 is a PayloadError too.
    """
    _width(alphabet)
    message = bytes(data)
    if not message:
        raise PayloadError("symbols: no bytes, expected a codec and its message")
    if message[0] == FIXED:
        return _fixed_symbols(message, n, alphabet)
    if message[0] == RANGE:
        return _range_symbols(message, n, alphabet)
    raise PayloadError(f"symbols: codec {message[0]}, expected {FIXED} (fixed width) or {RANGE} (range coder)")


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


def _model(counts: np.ndarray) -> "stream.model.Categorical":
    # perfect=True would optimise with logarithms, which machines round differently.
    return stream.model.Categorical(counts.astype(np.float64), perfect=False)


def _range_message(symbols: np.ndarray, counts: np.ndarray) -> bytes:
    head = bytearray((RANGE,))
    for count in counts.tolist():
        while count > 127:
            head.append(count & 127 | 128)
            count >>= 7
        head.append(count)
    if counts.max() == symbols.size:
        return bytes(head)
    coder = stream.queue.RangeEncoder()
    coder.encode(symbols, _model(counts))
    words: np.ndarray = coder.get_compressed()
    return bytes(head) + words.astype("<u4").tobytes()


def _range_symbols(message: bytes, n: int, alphabet: int) -> np.ndarray:
    if not RANGE_CODER:
        raise PayloadError("symbols: coded by the range coder; install the package constriction to read them")
    if alphabet > _MAX_RANGE_ALPHABET:
        raise PayloadError(f"symbols: range coder for an alphabet of {alphabet}, at most {_MAX_RANGE_ALPHABET}")
    counts, start = _read_counts(message, n, alphabet)
    if (len(message) - start) % 4:
        raise PayloadError(f"symbols: {len(message) - start} bytes of range coder, expected a multiple of 4")
    if counts.max() == n:
        symbols = np.full(n, counts.argmax(), np.int32)
    else:
        words = np.frombuffer(message, "<u4", offset=start).astype(np.uint32)
        try:
            symbols = stream.queue.RangeDecoder(words).decode(_model(counts), n)
        except BaseException as error:
            # A panic in the Rust library arrives as PanicException, which is no Exception and cannot be imported.
            if not isinstance(error, AssertionError) and type(error).__name__ != "PanicException":
                raise
            raise PayloadError("symbols: the range coder's words fit no symbols") from error
    # Words may be missing, left over or altered and still decode to something; then this rebuilds other bytes.
    if _range_message(symbols, np.bincount(symbols, minlength=alphabet)) != message:
        raise PayloadError("symbols: altered, what they decode to has other counts or another code")
    return symbols


def _read_counts(message: bytes, n: int, alphabet: int) -> tuple[np.ndarray, int]:
    """The counts, of shape (alphabet,), and where the range coder's words begin."""
    counts: list[int] = []
    count = shift = 0
    for position in range(1, len(message)):
        count |= (message[position] & 127) << shift
        shift += 7
        if count > n:
            raise PayloadError(f"symbols: {count} or more of symbol {len(counts)}, expected {n} in all")
        if message[position] < 128:
            counts.append(count)
            count = shift = 0
        if len(counts) == alphabet:
            break
    if len(counts) != alphabet or sum(counts) != n:
        raise PayloadError(
            f"symbols: counts of {len(counts)} symbols with sum {sum(counts)}, expected {alphabet} and {n}"
        )
    return np.array(counts, np.int64), position + 1
