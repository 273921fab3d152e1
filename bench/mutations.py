"""Mutations of messages, networks as papers have them, and what the reading of a message costs."""

import contextlib
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from malformed import EVERY, Channel

from fedlib.errors import PayloadError

# Networks as papers have them, by method; for the others CNN4 with 389,920 weights.
REAL = {"fedcompress": "resnet20", "feddq": "vanilla", "fedpm": "conv4", "fedpt": "emnist"}
LARGE = {"data": "fashion-mnist", "clients": 90, "cohort": 2, "lr": 0.01}
REPEATS = 3  # times that something is timed; the median counts

# Bytes that often mean something: ends of ranges, numbers that are not finite or enormous, lengths
BYTES = (b"\0", b"\x80", b"\xff", b"\x7f")
WORDS = (*BYTES, b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\x7f" * 4, b"\x7f" * 3 + b"\xff", b"\xff" * 4, b"\x80" * 5 + b"\1")

# Mutators


def place(size: int, draw: random.Random) -> int:
    """Anywhere; every third time where numbers begin that say much: at the start, after a byte, at the end."""
    return draw.randrange(size) if draw.randrange(3) else draw.choice((0, 1, 5, size - 8, size - 4)) % size


def flip(part: bytes, draw: random.Random) -> bytes:
    changed = bytearray(part)
    for _ in range(draw.choice((1, 1, 2, 16))):
        changed[place(len(part), draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def put(part: bytes, draw: random.Random) -> bytes:
    word, at = draw.choice(WORDS), place(len(part), draw)
    return part[:at] + word + part[at + len(word) :]


def cut(part: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(part))
    return part[:start] + part[start + draw.choice((1, 4, 64, len(part))) :]


def splice(part: bytes, draw: random.Random) -> bytes:
    one, other = draw.randrange(len(part)), draw.randrange(len(part))
    return part[:one] + part[other:]


def repeat(part: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(part))
    piece = part[start : start + draw.choice((1, 4, 32))]
    return part[:start] + piece * draw.choice((2, 16, 300)) + part[start:]


def grow(part: bytes, draw: random.Random) -> bytes:
    """Up to the length that a receiver lets pass, and beyond."""
    at, byte = draw.randrange(len(part) + 1), draw.choice((b"\0", b"\x80", b"\xff", b"\1"))
    return part[:at] + byte * draw.choice((7, 100, 2100, 5000, 70_000)) + part[at:]


MUTATORS = (flip, put, cut, splice, repeat, grow)


def mutation(parts: Sequence[bytes], draw: random.Random) -> tuple[int, bytes]:
    """A section's number, and what has become of it."""
    index, mutate = draw.randrange(len(parts)), draw.choice(MUTATORS)
    return index, mutate(parts[index], draw) if parts[index] or mutate is grow else bytes(draw.randrange(9))


def mutated(channel: Channel, draw: random.Random) -> bytes:
    parts = list(channel.sections)
    for _ in range(draw.choice((1, 1, 1, 2))):
        index, content = mutation(parts, draw)
        parts[index] = content
    return channel.packed(parts)


def real(name: str) -> dict[str, Any]:
    """What makes the network of a case, and its data, those of a paper."""
    case = EVERY[name]
    if "frozen" in case:
        return LARGE | {"model": "emnist"}
    return LARGE | {"model": "resnet20" if "resnet" in case.get("model", "") else REAL.get(case.get("method"), "cnn4")}


# Costs


def typical(channel: Channel, message: bytes, repeats: int = REPEATS) -> float:
    """Seconds that a receiver takes, as median."""
    return median(timed(lambda: tried(channel, message)) for _ in range(repeats))


def tried(channel: Channel, message: bytes) -> None:
    with contextlib.suppress(PayloadError):
        channel.read(message)


def peak(channel: Channel, message: bytes) -> int:
    tracemalloc.start()
    try:
        tried(channel, message)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return max(time.process_time() - start, 1e-4)
