"""What reaches the server in one round: read once, in the cohort's order, counted as it passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import Shapes, Tensors
from fedlib.errors import PayloadError

Buffer = bytes | bytearray
Update = tuple[Tensors, int]  # tensors, and the number of training samples behind them
log = logging.getLogger("fedlib")


class NoUpdate(Exception):
    """Not one upload of the round could be used."""


class Uploads:
    """Wraps (client, upload) pairs; a client that could not encode its update stands there with its PayloadError."""

    def __init__(
        self, arrivals: Iterable[tuple[int, Buffer | PayloadError]], measure: Callable[[Buffer], object] | None = None
    ) -> None:
        self.arrivals = arrivals
        self.measure = measure  # called with each accepted upload
        self.bytes = 0  # of all messages that arrived, readable or not
        self.wasted = 0  # of those refused
        self.accepted: list[int] = []
        self.refused: list[tuple[int, str]] = []

    def read(self, decode: Callable[[Buffer], Update]) -> Iterator[Update]:
        """Decoded uploads. One that raises PayloadError is refused, logged and noted; if none is left: NoUpdate."""
        for client, upload in self.arrivals:
            try:
                if isinstance(upload, PayloadError):
                    raise upload
                self.bytes += len(upload)
                update = decode(upload)
                if update[1] < 1:
                    raise PayloadError("upload stands for no training sample")
            except PayloadError as error:
                log.warning("upload of client %d refused: %s", client, error)
                self.refused.append((client, str(error)))
                self.wasted += 0 if isinstance(upload, PayloadError) else len(upload)
                continue
            self.accepted.append(client)
            if self.measure:
                self.measure(upload)
            yield update
        if not self.accepted:
            raise NoUpdate

    def mean(
        self, decode: Callable[[Buffer], Update], shapes: Shapes, weight: Callable[[int], int] | None = None
    ) -> Tensors:
        """The mean of what is read, weighted by the number of samples, or by `weight` of it. NoUpdate as of `read`."""
        mean = RunningMean(shapes)
        for tensors, samples in self.read(decode):
            mean.add(tensors, weight(samples) if weight else samples)
        return mean.value()
