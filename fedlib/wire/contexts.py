"""What both sides know of every symbol before it is read, as small integers: one model of the entropy coder for each.

`buckets` makes them of magnitudes. Where a symbol's chance of being 1 falls like 1 / x and x is uniform, buckets as
wide as a fixed share of x lose least for their number: so many in each factor of two. With two in each, loss and counts
(about 50 bytes together) stay below one percent for the masks of `bench/entropy.py`.
"""

import numpy as np

LIMIT = 2**16  # contexts; integers of 16 bits are sorted by radix
BUCKETS = 20  # two for each factor of two, down to top / 1024


def check_contexts(contexts: np.ndarray | None, n: int) -> None:
    """Raises ValueError unless these are integers of shape (n,), each in [0, LIMIT), or None."""
    if contexts is None:
        return
    if contexts.shape != (n,) or contexts.dtype.kind not in "biu":
        raise ValueError(f"contexts: {contexts.dtype} of shape {contexts.shape}, expected integers of shape ({n},)")
    if n and (contexts.min() < 0 or contexts.max() >= LIMIT):
        raise ValueError(f"contexts: from {contexts.min()} to {contexts.max()}, expected 0 to {LIMIT - 1}")


def group_contexts(contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stable order that sorts the contexts, and how many there are of each that occurs."""
    keys = contexts.astype(np.uint8 if contexts.max(initial=0) < 256 else np.uint16)
    sizes = np.bincount(keys)
    return np.argsort(keys, kind="stable"), sizes[sizes > 0]


def buckets(magnitudes: np.ndarray, top: float, count: int = BUCKETS) -> np.ndarray:
    """Float32 magnitudes of shape (n,), none negative, as uint8 numbers in [0, count): two for each factor of two.

    The last holds all from 3/4 top on, the one before begins at 1/2 top, then 3/8, 1/4, ...; the first holds the rest.
    Noise of FedMRN: top = 4 a for each of its laws; buckets that stay empty cost nothing.
    One IEEE division and integers alone: equal magnitudes have equal buckets on every machine.
    Raises ValueError for another dtype, for values that are negative or no numbers, and for arguments out of range.
    """
    if magnitudes.dtype != np.float32 or not 1 <= count <= 256 or not np.float32(top) > 0:
        raise ValueError(
            f"buckets: {magnitudes.dtype}, top {top}, {count} of them; expected float32, above 0, 1 to 256"
        )
    if magnitudes.size and not magnitudes.min() >= 0:
        raise ValueError(f"magnitudes: the least is {magnitudes.min()}, expected none below 0")
    # A float32 holds its power of two in bits 23 to 30 and the digits after the leading one below: bit 22 halves it.
    halves = np.divide(magnitudes, np.float32(top)).view(np.int32) >> 22
    last = np.float32(0.75).view(np.int32) >> 22
    return np.clip(halves - last + (count - 1), 0, count - 1).astype(np.uint8)
