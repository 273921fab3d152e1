"""Quantized tensors as bytes: a header of nine bytes for each, and their levels, at exactly the width that it states.

header: width u8 | two float32, little-endian, whose meaning is the quantizer's (mostly origin and step)
levels: tensor after tensor, each from a byte of its own, as `bits` packs them; none at width 0
coded:  tensor after tensor, each its length in bytes (u32) and the message of the entropy coder
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlib.errors import PayloadError
from fedlib.wire import bits, entropy

HEADER = struct.Struct("<Bff")


@dataclass(frozen=True)
class Levels:
    """One tensor. levels: integers [n] below 2^width, empty at width 0; first and second are float32."""

    width: int
    first: float
    second: float
    levels: np.ndarray


def headers(tensors: Sequence[Levels]) -> bytes:
    return b"".join(HEADER.pack(t.width, t.first, t.second) for t in tensors)


def pack(tensors: Sequence[Levels], coded: bool) -> bytes:
    """The levels of all tensors."""
    shown = [t for t in tensors if t.width]
    if coded:
        return b"".join(entropy.framed(t.levels, 1 << t.width) for t in shown)
    return b"".join(bits.pack(t.levels, t.width) for t in shown)


def unpack(head: memoryview, body: memoryview, sizes: Sequence[int], coded: bool) -> list[Levels]:
    """The inverse, for tensors of `sizes` entries. PayloadError where headers and levels do not fit each other."""
    found, parts = [], entropy.Parts(body, "levels")
    for index, ((width, first, second), n) in enumerate(zip(read_headers(head, len(sizes)), sizes, strict=True)):
        symbols = np.empty(0, np.uint8)
        if width and coded:
            symbols = parts.symbols(n, 1 << width, index)
        elif width:
            symbols = bits.unpack(parts.take(bits.size(n, width), index), n, width)
        found.append(Levels(width, first, second, symbols))
    parts.end("by the widths of the headers")
    return found


def read_headers(head: memoryview, tensors: int) -> list[tuple[int, float, float]]:
    """Width and the two numbers of each tensor. PayloadError: wrong length, width out of bounds, number not finite."""
    if len(head) != HEADER.size * tensors:
        raise PayloadError(f"headers: {len(head)} bytes, expected {HEADER.size * tensors} for {tensors} tensors")
    found = list(HEADER.iter_unpack(head))
    for index, (width, first, second) in enumerate(found):
        if width > bits.WIDEST:
            raise PayloadError(f"header {index}: width {width}, expected 0 to {bits.WIDEST}")
        if not (math.isfinite(first) and math.isfinite(second)):
            raise PayloadError(f"header {index}: {first} and {second}, expected finite numbers")
    return found
