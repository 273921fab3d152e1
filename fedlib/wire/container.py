"""The envelope of every message: what it is, whom it is meant for, and up to four byte sections, under one checksum.

Layout, integers little-endian:

    "FLW" | version u8 | kind length u8 | kind, zero-padded | fingerprint 8 bytes | samples u32 | round u32 | client u32
    | section count u8 | one length u32 a section | the sections | lower half of XXH3-64 of all before it, u32

The padding brings the first section to a multiple of four bytes, so that float32 tensors put first are read in place.
Methods write messages of round 0 and client 0, and know of no other: who sends one addresses it.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fedlib.errors import PayloadError

OVERHEAD_LIMIT = 64  # bytes: no message spends more than this on its envelope

_MAGIC = b"FLW"
_VERSION = 2
_MAX_KIND = 18
_MAX_SECTIONS = 4
_U32_MAX = 2**32 - 1
_PREFIX = len(_MAGIC) + 2  # magic, version, kind length
_SUM = struct.Struct("<I")  # 32 bits tell of any accident; against forgery no checksum helps
_ADDRESS = struct.Struct("<II")
_ADDRESS_AT = 12  # bytes after the kind, behind fingerprint and samples


class Message(NamedTuple):
    """A message that passed every check."""

    samples: int  # training samples behind an upload, 0 for a broadcast
    sections: tuple[memoryview, ...]  # read-only views of the message, not copies


def pack(
    kind: str, fingerprint: bytes, samples: int, sections: Sequence[bytes | bytearray | memoryview | np.ndarray]
) -> bytes:
    """Join 1 to 4 contiguous byte buffers into one message; each buffer is copied once.

    kind: ASCII, 1 to 18 characters, such as "fedmrn.up". fingerprint: 8 bytes that stand for model layout, method and
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
    lengths = struct.pack(f"<3IB{len(sizes)}I", samples, 0, 0, len(sizes), *sizes)
    head = _MAGIC + bytes((_VERSION, len(field))) + field + fingerprint + lengths
    checksum = xxhash.xxh3_64(head)
    for buffer in buffers:
        checksum.update(buffer)
    return b"".join((head, *buffers, _low_half(checksum.intdigest())))


def address(message: bytes, round: int, client: int) -> bytes:
    """The same message as one of this round, to or from this client: 0 where it goes to all."""
    at = _PREFIX + message[_PREFIX - 1] + _ADDRESS_AT
    view = memoryview(message)
    body = b"".join((view[:at], _ADDRESS.pack(round, client), view[at + _ADDRESS.size : -_SUM.size]))
    return body + _low_half(xxhash.xxh3_64_intdigest(body))


def check_address(message: bytes | bytearray | memoryview, round: int, client: int) -> None:
    """PayloadError: a message of another round or client, replayed or swapped. The checksum is left to `unpack`."""
    view, field, *_ = _parse(message)
    found = _ADDRESS.unpack_from(view, _PREFIX + len(field) + _ADDRESS_AT)
    if found != (round, client):
        raise PayloadError(
            f"message of round {found[0]} and client {found[1]}, expected round {round} and client {client}"
        )


def unpack(data: bytes | bytearray | memoryview, kind: str, fingerprint: bytes, limits: Sequence[int]) -> Message:
    """Check a message and give its sections as read-only views.

    limits: for each section that the receiver expects, the largest length in bytes that its model allows.
    Raises PayloadError, naming what was found and what was expected, for every message that is not exactly so.
    """
    view, field, found, samples, bounds = _parse(data)
    checksum, stated = _low_half(xxhash.xxh3_64_intdigest(view[: -_SUM.size])), bytes(view[-_SUM.size :])
    if checksum != stated:
        raise PayloadError(f"message altered: checksum {checksum.hex()}, the message states {stated.hex()}")
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


def _low_half(digest: int) -> bytes:
    return _SUM.pack(digest & _U32_MAX)


def _kind_field(kind: str) -> bytes:
    """Kind as it travels, padded so that the head, 26 bytes + kind + 4 a section, is a multiple of four."""
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
    lengths_at = fingerprint_at + 21
    _need(view, lengths_at)
    samples, _, _, count = struct.unpack_from("<3IB", view, fingerprint_at + 8)
    start = lengths_at + 4 * count
    _need(view, start)
    bounds = []
    for size in struct.unpack_from(f"<{count}I", view, lengths_at):
        bounds.append((start, start + size))
        start += size
    _need(view, start + _SUM.size)
    if len(view) > start + _SUM.size:
        raise PayloadError(f"message of {len(view)} bytes, its header states {start + _SUM.size}: trailing bytes")
    return view, bytes(view[_PREFIX:fingerprint_at]), bytes(view[fingerprint_at : fingerprint_at + 8]), samples, bounds


def _need(view: memoryview, size: int) -> None:
    if len(view) < size:
        raise PayloadError(f"message truncated: {len(view)} bytes, at least {size} expected")
