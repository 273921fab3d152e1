"""The envelope of every message: what it is, whom it is meant for, and up to four byte sections, under one checksum.

Layout, integers little-endian:

    "FLW" | version u8 | kind length u8 | kind, zero-padded | fingerprint 8 bytes | samples u32
    | section count u8 | one length u32 a section | the sections | CRC-32 of all before it, u32

The padding brings the first section to a multiple of four bytes, so that float32 tensors put first are read in place.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedlib.errors import PayloadError

OVERHEAD_LIMIT = 64  # bytes: no message spends more than this on its envelope

_MAGIC = b"FLW"
_VERSION = 1
_MAX_KIND = 20
_MAX_SECTIONS = 4
_U32_MAX = 2**32 - 1
_PREFIX = len(_MAGIC) + 2  # magic, version, kind length
_CRC = struct.Struct("<I")


class Message(NamedTuple):
    """A message that passed every check."""

    samples: int  # training samples behind an upload, 0 for a broadcast
    sections: tuple[memoryview, ...]  # read-only views of the message, not copies


def pack(
    kind: str, fingerprint: bytes, samples: int, sections: Sequence[bytes | bytearray | memoryview | np.ndarray]
) -> bytes:
    """Join 1 to 4 contiguous byte buffers into one message; each buffer is copied once.

    kind: ASCII, 1 to 20 characters, such as "fedmrn.up". fingerprint: 8 bytes that stand for model layout, method and
    hyper-parameters. samples: training samples behind an upload, 0 for a broadcast.
    Raises ValueError when one of them is out of range: the caller's mistake, not a bad message.
    """
    if len(fingerprint) != 8:
        raise ValueError(f"fingerprint: {len(fingerprint)} bytes, expected 8")
    if not 0 <= samples <= _U32_MAX:
        raise ValueError(f"samples: {samples}, expected 0 to {_U32_MAX}")
    if not 1 <= len(sections) <= _MAX_SECTIONS:
        raise ValueError(f"sections: {len(sections)}, expected 1 to {_MAX_SECTIONS}")
    buffers: Sequence[Any] = sections  # numpy tells type checkers of its buffer protocol from Python 3.12 on only
    sizes = [memoryview(buffer).nbytes for buffer in buffers]
    if max(sizes) > _U32_MAX:
        raise ValueError(f"section {sizes.index(max(sizes))}: {max(sizes)} bytes, at most {_U32_MAX}")
    field = _kind_field(kind)
    lengths = struct.pack(f"<IB{len(sizes)}I", samples, len(sizes), *sizes)
    head = _MAGIC + bytes((_VERSION, len(field))) + field + fingerprint + lengths
    checksum = zlib.crc32(head)
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    return b"".join((head, *buffers, _CRC.pack(checksum)))


def unpack(data: bytes | bytearray | memoryview, kind: str, fingerprint: bytes, limits: Sequence[int]) -> Message:
    """Check a message and give its sections as read-only views.

    limits: for each section that the receiver expects, the largest length in bytes that its model allows.
    Raises PayloadError, naming what was found and what was expected, for every message that is not exactly so.
    """
    view, field, found, samples, bounds = _parse(data)
    checksum = zlib.crc32(view[: -_CRC.size])
    (stated,) = _CRC.unpack(view[-_CRC.size :])
    if checksum != stated:
        raise PayloadError(f"message altered: checksum {checksum:08x}, the message states {stated:08x}")
    if field != _kind_field(kind):
        name = field.rstrip(b"\0").decode("ascii", "backslashreplace")
        raise PayloadError(f"message of kind {name!r}, expected {kind!r}")
    if found != fingerprint:
        raise PayloadError(
            f"message for another model or other settings: fingerprint {found.hex()}, expected {fingerprint.hex()}"
        )
    if len(bounds) != len(limits):
        raise PayloadError(f"message of {len(bounds)} sections, expected {len(limits)}")
    for index, ((start, end), limit) in enumerate(zip(bounds, limits, strict=True)):
        if end - start > limit:
            raise PayloadError(f"section {index}: {end - start} bytes, the model allows at most {limit}")
    return Message(samples, tuple(view[start:end] for start, end in bounds))


def section_sizes(data: bytes | bytearray | memoryview) -> tuple[int, ...]:
    """Length of each section in bytes; what is left of len(data) is the envelope. Raises PayloadError."""
    return tuple(end - start for start, end in _parse(data)[-1])


def _kind_field(kind: str) -> bytes:
    """Kind as it travels, padded so that the head, 18 bytes + kind + 4 a section, is a multiple of four."""
    if not 1 <= len(kind) <= _MAX_KIND or not kind.isascii() or "\0" in kind:
        raise ValueError(f"kind: {kind!r}, expected 1 to {_MAX_KIND} ASCII characters")
    return kind.encode("ascii") + bytes((2 - len(kind)) % 4)


def _parse(data: bytes | bytearray | memoryview) -> tuple[memoryview, bytes, bytes, int, list[tuple[int, int]]]:
    """The read-only view, kind field, fingerprint, samples, and (start, end) of each section, lengths checked."""
    view = memoryview(data).toreadonly()
    if view.format != "B" or view.ndim != 1 or not view.c_contiguous:
        raise PayloadError("message is not one run of bytes")
    if view[: len(_MAGIC)] != _MAGIC:
        raise PayloadError(f"not a fedlib message: starts with {bytes(view[:3])!r}, expected {_MAGIC!r}")
    _need(view, _PREFIX)
    if view[3] != _VERSION:
        raise PayloadError(f"message of format version {view[3]}, this program reads version {_VERSION}")
    fingerprint_at = _PREFIX + view[4]
    lengths_at = fingerprint_at + 13
    _need(view, lengths_at)
    samples, count = struct.unpack_from("<IB", view, fingerprint_at + 8)
    start = lengths_at + 4 * count
    _need(view, start)
    bounds = []
    for size in struct.unpack_from(f"<{count}I", view, lengths_at):
        bounds.append((start, start + size))
        start += size
    _need(view, start + _CRC.size)
    if len(view) > start + _CRC.size:
        raise PayloadError(f"message of {len(view)} bytes, its header states {start + _CRC.size}: trailing bytes")
    return view, bytes(view[_PREFIX:fingerprint_at]), bytes(view[fingerprint_at : lengths_at - 5]), samples, bounds


def _need(view: memoryview, size: int) -> None:
    if len(view) < size:
        raise PayloadError(f"message truncated: {len(view)} bytes, at least {size} expected")
