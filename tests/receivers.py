"""Whoever reads bytes from outside, and hostile inputs as edits of what an honest sender writes.

An input says little and reaches far: it holds for a network of any size, and one line of `tests/attacks` shows it.

    1@0-4          of section 1, from byte 0 on, four bytes are cut out; -end: all the rest
    1@0+8001*300   in their place comes 0x8001, three hundred times
    1@0-4+00 2@7+ff    edits follow one another; a section that is not there is added

`bench/fuzz.py` finds inputs, `tests/methods/test_attacks.py` replays those that are kept.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from malformed import CHANNELS, Channel, channels, sealed

from fedlib.errors import PayloadError
from fedlib.methods.messages import unpack_seed, unpack_signs
from fedlib.wire import bits, codebook, container, entropy, floats, levels, rotation
from fedlib.wire.levels import Levels

KEPT = Path(__file__).parent / "attacks"
MOST_EDITS = 8
MOST_PUT = 2**18  # bytes that one edit puts in
END = 2**32 - 1
_EDIT = struct.Struct("<BIIHH")  # section, at, cut, times, length of what follows
_TEXT = re.compile(r"(\d+)@(\d+)(?:-(\d+|end))?(?:\+([0-9a-f]*))?(?:\*(\d+))?")


class Edit(NamedTuple):
    section: int
    at: int  # beyond the end: counted from the start again
    cut: int = 0  # bytes
    put: bytes = b""
    times: int = 1

    @property
    def text(self) -> str:
        cut = "-end" if self.cut == END else f"-{self.cut}" if self.cut else ""
        put = f"+{self.put.hex()}" if self.put else ""
        return f"{self.section}@{self.at}{cut}{put}" + (f"*{self.times}" if self.times != 1 else "")


Edits = Sequence[Edit]


def from_bytes(data: bytes) -> list[Edit]:
    """Of any bytes: what is cut off at the end is missing in the last edit."""
    found, start = list[Edit](), 0
    while len(data) - start >= _EDIT.size and len(found) < MOST_EDITS:
        section, at, cut, times, length = _EDIT.unpack_from(data, start)
        start += _EDIT.size + length
        found.append(Edit(section, at, cut, data[start - length : start], times))
    return found


def to_bytes(edits: Edits) -> bytes:
    return b"".join(_EDIT.pack(e.section, e.at, e.cut, e.times, len(e.put)) + e.put for e in edits)


def from_text(line: str) -> list[Edit]:
    found = []
    for word in line.split():
        match = _TEXT.fullmatch(word)
        assert match, f"{word}: expected such as 1@0-4+00ff*2"
        section, at, cut, put, times = match.groups()
        size = END if cut == "end" else int(cut or 0)
        found.append(Edit(int(section), int(at), size, bytes.fromhex(put or ""), int(times or 1)))
    return found


def to_text(edits: Edits) -> str:
    return " ".join(edit.text for edit in edits)


def edited(sections: Sequence[bytes], edits: Edits) -> list[bytes]:
    parts = list(sections)
    for section, at, cut, put, times in edits:
        if section >= len(parts):
            if len(parts) == 4:  # no message has more
                continue
            parts.append(b"")
        index = min(section, len(parts) - 1)
        part = parts[index]
        at %= len(part) + 1
        parts[index] = part[:at] + put * min(times, MOST_PUT // max(1, len(put))) + part[at + cut :]
    return parts


# Receivers


@dataclass(frozen=True)
class Receiver:
    sections: list[bytes]  # as an honest sender writes them
    packed: Callable[[list[bytes]], Any]  # what arrives of sections
    accepts: Callable[[Any], bool]  # whether that is read, and if so, rightly; False for a refusal
    model: int  # bytes of what is read
    bounded: bool = True  # how long a section can be is checked before

    def reads(self, line: str) -> bool:
        return self.accepts(self.packed(edited(self.sections, from_text(line))))


def of_channel(channel: Channel) -> Receiver:
    return Receiver(channel.sections, channel.packed, channel.reads, channel.model)


def envelope() -> Receiver:
    """The whole message is the one section, edited as it is and with its checksum made right again."""
    channel = channels("fedmrn coded")["up"]
    kind, fingerprint = channel.label

    def unpacked(message: bytes) -> bool:
        try:
            container.check_address(message, 2, 3)
            read = container.unpack(message, kind, fingerprint, [8, 600, 0])
        except PayloadError:
            return False
        again = container.pack(kind, fingerprint, read.samples, [bytes(part) for part in read.sections])
        assert container.address(again, 2, 3) == message, "read, but there is another message of the same content"
        return True

    def accepts(messages: tuple[bytes, bytes]) -> bool:
        plain, resealed = map(unpacked, messages)
        return plain or resealed

    return Receiver([channel.message], lambda parts: (parts[0], sealed(parts[0])), accepts, channel.model)


SIZES = (5, 0, 300, 1)  # entries of the tensors that the decoders below read


def decoder(sections: Sequence[bytes], decode: Callable[..., Sequence[np.ndarray]], sizes: Sequence[int]) -> Receiver:
    """Of arrays with so many entries each."""
    honest = [bytes(part) for part in sections]

    def accepts(parts: list[bytes]) -> bool:
        try:
            found = decode(*[memoryview(part) for part in parts[: len(honest)]])
        except PayloadError:
            return False
        assert [array.shape for array in found] == [(n,) for n in sizes]
        assert all(np.isfinite(array).all() for array in found)
        return True

    return Receiver(honest, lambda parts: parts, accepts, 4 * sum(sizes) or 4, bounded=False)


def of_symbols(n: int, alphabet: int, contexts: np.ndarray | None = None) -> Receiver:
    symbols = np.minimum(np.arange(n) % 7 * (np.arange(n) % 3 == 0), alphabet - 1)

    def decode(message: memoryview) -> list[np.ndarray]:
        found = entropy.decode(message, n, alphabet, contexts)
        assert not n or (found.min() >= 0 and found.max() < alphabet)
        return [found]

    return decoder([entropy.encode(symbols, alphabet, contexts)], decode, [n])


def of_levels(coded: bool) -> Receiver:
    tensors = [Levels(w, -1.0, 0.5, np.arange(n) % (1 << w)) for w, n in zip((3, 2, 9, 1), SIZES, strict=True)]
    honest = [levels.headers(tensors), levels.pack(tensors, coded)]

    def decode(head: memoryview, body: memoryview) -> list[np.ndarray]:
        read = levels.unpack(head, body, SIZES, coded)
        for part, n in zip(read, SIZES, strict=True):
            assert len(part.levels) == (n if part.width else 0)
            assert not len(part.levels) or part.levels.max() < 1 << part.width
            assert np.isfinite([part.first, part.second]).all()
        return [np.resize(part.levels, n) for part, n in zip(read, SIZES, strict=True)]

    return decoder(honest, decode, SIZES)


def of_integers(width: int) -> Receiver:
    return decoder([bits.pack(np.arange(301) % 2**width, width)], lambda data: [bits.unpack(data, 301, width)], [301])


def of_tensors() -> Receiver:
    shapes = [(n,) for n in SIZES]
    honest = [floats.encode([np.arange(n, dtype=np.float32) for n in SIZES]).tobytes()]
    return decoder(honest, lambda data: floats.decode(data, shapes), SIZES)


def of_codebooks() -> Receiver:
    tensors = [np.arange(n, dtype=np.float32) % 4 for n in SIZES if n]
    sizes = [len(tensor) for tensor in tensors]

    def decode(books: memoryview, indexes: memoryview) -> list[np.ndarray]:
        found = codebook.decode(books, indexes, sizes)
        for book in codebook.read_books(books, len(sizes)):  # also of values that nothing points to
            assert np.isfinite(book).all() and (np.diff(book) > 0).all()
        return found

    return decoder(codebook.encode(tensors), decode, sizes)


def of_rotation() -> Receiver:
    def decode(seed: memoryview, signs: memoryview) -> list[np.ndarray]:
        return [rotation.unrotate(unpack_signs(signs, 512), unpack_seed(seed), 300).numpy()]

    return decoder([bytes(range(8)), bytes(range(64))], decode, [300])


WIRE: dict[str, Callable[[], Receiver]] = {
    "envelope": envelope,
    "entropy bits": lambda: of_symbols(300, 2),
    "entropy contexts": lambda: of_symbols(300, 3, np.arange(300) % 5),
    "entropy bytes": lambda: of_symbols(300, 256),
    "entropy wide": lambda: of_symbols(300, 2**17),
    "entropy nothing": lambda: of_symbols(0, 2),
    "levels": lambda: of_levels(False),
    "levels coded": lambda: of_levels(True),
    "codebook": of_codebooks,
    "bits": lambda: of_integers(1),
    "bits of width 5": lambda: of_integers(5),
    "bits of width 11": lambda: of_integers(11),
    "floats": of_tensors,
    "rotation": of_rotation,
}
NAMES = [*WIRE, *(f"{name} {direction}" for name, direction in CHANNELS)]


@functools.cache
def receiver(name: str) -> Receiver:
    if name in WIRE:
        return WIRE[name]()
    case, direction = name.rsplit(" ", 1)
    return of_channel(channels(case)[direction])


def file_of(name: str) -> Path:
    """Where its inputs are kept, a line each."""
    return KEPT / f"{name.replace(',', '').replace(' ', '-')}.txt"


def kept(name: str) -> list[str]:
    file = file_of(name)
    return file.read_text(encoding="ascii").splitlines() if file.exists() else []
