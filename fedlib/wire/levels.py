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
_LENGTH = struct.Struct("<I")


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
    if not coded:
        return b"".join(bits.pack(t.levels, t.width) for t in shown)
    messages = [entropy.encode(t.levels, 1 << t.width) for t in shown]
    return b"".join(_LENGTH.pack(len(message)) + message for message in messages)


def unpack(head: memoryview, body: memoryview, sizes: Sequence[int], coded: bool) -> list[Levels]:
    """The inverse, for tensors of `sizes` entries. PayloadError where headers and levels do not fit each other."""
    widths = read_headers(head, len(sizes))
    found, start = [], 0
    for index, ((width, first, second), n) in enumerate(zip(widths, sizes, strict=True)):
        symbols = np.empty(0, np.uint8)
        if width:
            if coded:
                if start + _LENGTH.size > len(body):
                    raise PayloadError(f"levels: {len(body)} bytes end before tensor {index}")
                (length,) = _LENGTH.unpack_from(body, start)
                start += _LENGTH.size
            else:
                length = bits.size(n, width)
            if start + length > len(body):
                raise PayloadError(f"levels: {len(body)} bytes, expected {start + length} or more up to tensor {index}")
            part = body[start : start + length]
            symbols = entropy.decode(part, n, 1 << width) if coded else bits.unpack(part, n, width)
            start += length
        found.append(Levels(width, first, second, symbols))
    if start != len(body):
        raise PayloadError(f"levels: {len(body)} bytes, expected {start} by the widths of the headers")
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
