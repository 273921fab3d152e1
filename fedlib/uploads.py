"""What reaches the server in one round: read once, in the cohort's order, counted as it passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from fedlib.errors import PayloadError

T = TypeVar("T")
log = logging.getLogger("fedlib")


class NoUpdate(Exception):
    """Not one upload of the round could be used."""


class Uploads:
    """Wraps (client, upload) pairs; a client that could not encode its update stands there with its PayloadError."""

    def __init__(
        self, arrivals: Iterable[tuple[int, bytes | PayloadError]], meter: Callable[[bytes], object] = len
    ) -> None:
        self.arrivals = arrivals
        self.meter = meter  # called with every upload that arrived, readable or not
        self.refused: list[tuple[int, str]] = []
        self.accepted: list[int] = []

    def read(self, decode: Callable[[bytes], T]) -> Iterator[T]:
        """Decoded uploads. One that raises PayloadError is refused, logged and noted; if none is left: NoUpdate."""
        for client, upload in self.arrivals:
            try:
                if isinstance(upload, PayloadError):
                    raise upload
                self.meter(upload)
                update = decode(upload)
            except PayloadError as error:
                log.warning("upload of client %d refused: %s", client, error)
                self.refused.append((client, str(error)))
                continue
            self.accepted.append(client)
            yield update
        if not self.accepted:
            raise NoUpdate
