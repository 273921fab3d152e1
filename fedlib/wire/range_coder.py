"""Symbols as the words of a range coder, by a model that is made of their counts.

It takes neighbours together, as many as have at most 256 combinations: eight of a mask, say. That is two to three times
as fast, since its work goes by what it is given. The size is the same: in the model symbols are independent, so that a
combination's share is the product of its symbols'. What is left at the end, and few symbols, it takes one by one.

The coder is constriction's `queue.RangeEncoder` (R. Bamler, arXiv:2201.01741). Its model is made by divisions and
products alone, which IEEE 754 rounds alike on every machine: what one machine encodes another decodes, and to the same
words.
"""

import functools
from collections.abc import Iterable

import numpy as np

from fedlib.errors import PayloadError

try:
    from constriction import stream
except ImportError:  # no wheel for this machine
    stream = None

AVAILABLE = stream is not None
COMBINATIONS, FEW = 256, 2048  # of neighbours that are taken together; symbols for which their model does not pay


def encode(groups: Iterable[np.ndarray], counts: Iterable[np.ndarray]) -> bytes:
    """Words, u32, little-endian, of groups of int32 symbols, each with its counts; none where all symbols are equal."""
    coder = stream.queue.RangeEncoder()
    for group, own in zip(groups, counts, strict=True):
        if own.max() < group.size:
            together, end = _together(group.size, own.size)
            if end:
                coder.encode(_joined(group[:end], own.size, together), _model(_products(own, together)))
            if end < group.size:
                coder.encode(group[end:], _model(own))
    words: np.ndarray = coder.get_compressed()
    return words.astype("<u4").tobytes()


def decode(words: np.ndarray, groups: Iterable[np.ndarray], counts: Iterable[np.ndarray]) -> None:
    """Fill the groups. PayloadError: words that fit no symbols; others may decode to symbols that encode otherwise."""
    try:
        coder = stream.queue.RangeDecoder(words.astype(np.uint32))
        for group, own in zip(groups, counts, strict=True):
            if own.max() == group.size:
                group[:] = own.argmax()
                continue
            together, end = _together(group.size, own.size)
            if end:
                joined = coder.decode(_model(_products(own, together)), end // together)
                group[:end] = _parted(own.size, together)[joined].reshape(-1)
            if end < group.size:
                group[end:] = coder.decode(_model(own), group.size - end)
    except BaseException as error:
        # A panic in the Rust library arrives as PanicException, which is no Exception and cannot be imported.
        if not isinstance(error, AssertionError) and type(error).__name__ != "PanicException":
            raise
        raise PayloadError("symbols: the range coder's words fit no symbols") from error


def _model(shares: np.ndarray) -> "stream.model.Categorical":
    # perfect=True would optimise with logarithms, which machines round differently.
    return stream.model.Categorical(shares.astype(np.float64), perfect=False)


def _together(n: int, alphabet: int) -> tuple[int, int]:
    """How many neighbours are taken as one, and the end of those that are."""
    if n < FEW or alphabet**2 > COMBINATIONS:
        return 1, 0
    together = next(k for k in range(8, 0, -1) if alphabet**k <= COMBINATIONS)
    return together, n - n % together


def _products(counts: np.ndarray, together: int) -> np.ndarray:
    """What the counts of combinations are in proportion to, the first neighbour's symbol running fastest."""
    products = np.ones(1)
    for _ in range(together):  # each product rounded by itself: the same everywhere
        products = np.outer(counts.astype(np.float64), products).reshape(-1)
    return products


def _joined(symbols: np.ndarray, alphabet: int, together: int) -> np.ndarray:
    joined = symbols[::together].copy()
    for place in range(1, together):
        joined += symbols[place::together] * np.int32(alphabet**place)
    return joined


@functools.cache
def _parted(alphabet: int, together: int) -> np.ndarray:
    """The neighbours of each combination [alphabet**together, together]."""
    combinations = np.arange(alphabet**together, dtype=np.int32)[:, None]
    return combinations // np.array([alphabet**place for place in range(together)], np.int32) % np.int32(alphabet)
