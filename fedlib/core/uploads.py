"""What reaches the server in one round: read once, in the cohort's order, counted as it passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from fedlib.core.averaging import RobustMean, RunningMean
from fedlib.core.plan import Shapes, Tensors, all_finite
from fedlib.errors import PayloadError
from fedlib.wire import container

Buffer = bytes | bytearray
Update = tuple[Tensors, int]  # tensors, and the number of training samples behind them
NOWHERE: Mapping[str, Tensor] = {}
LONGEST = 200  # characters of a reason: what a stranger sent is not repeated at length
log = logging.getLogger("fedlib")


class NoUpdate(Exception):
    """Not one upload of the round could be used."""


class Uploads:
    """Wraps (client, upload) pairs; a client that could not encode its update stands there with its PayloadError."""

    def __init__(
        self,
        arrivals: Iterable[tuple[int, Buffer | PayloadError]],
        measure: Callable[[Buffer], object] | None = None,
        most: Callable[[int], int] | None = None,
        robust: str = "none",
        round: int | None = None,
    ) -> None:
        self.arrivals = arrivals
        self.round = round  # that uploads must be of, each of its client; None: they are addressed to nobody
        self.measure = measure  # called with each accepted upload
        self.most = most  # samples that a client can have
        self.robust = robust  # a rule of `core.averaging` in place of the mean
        self.bytes = 0  # of all messages that arrived, readable or not
        self.wasted = 0  # of those refused
        self.accepted: list[int] = []
        self.refused: list[tuple[int, str]] = []

    def read(self, decode: Callable[[Buffer], Update]) -> Iterator[Update]:
        """Decoded uploads. One that cannot be read, for whatever reason, is refused, logged and noted, and the others
        go on; if none is left: NoUpdate."""
        for client, upload in self.arrivals:
            try:
                if isinstance(upload, PayloadError):
                    raise upload
                self.bytes += len(upload)
                if self.round is not None:
                    container.check_address(upload, self.round, client)
                update = self._checked(client, decode(upload))
            except Exception as error:  # no message of a stranger ends the run of all
                reason = error if isinstance(error, PayloadError) else f"{type(error).__name__}: {error}"
                where = "" if self.round is None else f"round {self.round}: "
                log.warning("%supload of client %d refused: %s", where, client, shorten(reason))
                log.debug("upload of client %d", client, exc_info=not isinstance(error, PayloadError))
                self.refused.append((client, shorten(reason)))
                self.wasted += 0 if isinstance(upload, PayloadError) else len(upload)
                continue
            self.accepted.append(client)
            if self.measure:
                self.measure(upload)
            yield update
        if not self.accepted:
            raise NoUpdate

    def _checked(self, client: int, update: Update) -> Update:
        tensors, samples = update
        if samples < 1:
            raise PayloadError("upload stands for no training sample")
        if self.most and samples > (most := self.most(client)):
            raise PayloadError(f"upload stands for {samples} training samples, this client has at most {most}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise PayloadError(f"{name}: decodes to values that are not finite")
        return update

    def averager(self, shapes: Shapes, center: Mapping[str, Tensor] = NOWHERE) -> RunningMean | RobustMean:
        """What takes the mean, or what stands in its place; center: as of `RobustMean`."""
        return RunningMean(shapes) if self.robust == "none" else RobustMean(self.robust, shapes, center)

    def mean(
        self,
        decode: Callable[[Buffer], Update],
        shapes: Shapes,
        center: Mapping[str, Tensor] = NOWHERE,
        weight: Callable[[int], int] | None = None,
    ) -> Tensors:
        """The mean of what is read, weighted by the number of samples, or by `weight` of it. NoUpdate as of `read`."""
        mean = self.averager(shapes, center)
        for tensors, samples in self.read(decode):
            mean.add(tensors, weight(samples) if weight else samples)
        return mean.value()


def shorten(reason: object) -> str:
    """At most 200 characters."""
    text = str(reason)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
