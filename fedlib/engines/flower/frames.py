"""What a server and its nodes say to each other over Flower: a line of JSON, and the byte strings that it speaks of.

    length of the JSON u32, little-endian | JSON with the sizes of the parts | the parts, one after the other

No pickle, and nothing in it is executed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlib.errors import PayloadError

Head = dict[str, Any]
LOST = "transport: "  # how the reason begins for which a client is missing in a round, where its node is to blame


@dataclass(frozen=True)
class Lost:
    """In place of a frame: why there is none, and whether that is because the node is gone."""

    why: str
    gone: bool = False


_LENGTH = struct.Struct("<I")


def pack(head: Head, parts: Sequence[bytes | bytearray] = ()) -> bytes:
    """One byte string of both."""
    text = json.dumps(head | {"sizes": [len(part) for part in parts]}, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *parts))


def unpack(frame: bytes) -> tuple[Head, list[bytes]]:
    """The inverse. PayloadError: bytes that are no such frame."""
    try:
        (length,) = _LENGTH.unpack_from(frame)
        start = _LENGTH.size + length
        head = json.loads(frame[_LENGTH.size : start])
        sizes = head.pop("sizes")
        right = all(type(size) is int and size >= 0 for size in sizes) and start + sum(sizes) == len(frame)
    except (struct.error, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise PayloadError("frame cannot be read") from error
    if not right:
        raise PayloadError(f"frame of {len(frame)} bytes does not have the parts that it states")
    parts = []
    for size in sizes:
        parts.append(frame[start : start + size])
        start += size
    return head, parts
