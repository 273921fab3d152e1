"""Engines that choose among the others by measuring them in the first rounds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence

import torch

from fedlib.core.plan import State
from fedlib.engines.in_process import Base, InProcess, Memories, Upload, recalled, task_of
from fedlib.engines.pool import Pool
from fedlib.runs.spec import Spec

log = logging.getLogger("fedlib")


class Auto(Base):
    """In process until a measured round says that the rest of the run is worth the start of a pool."""

    device = torch.device("cpu")
    START = 5.0  # seconds that workers need to import torch and load data, measured on two cores

    def __init__(self, processes: int) -> None:
        self.local = InProcess(self.device)
        self.pool: Pool | None = None
        self.count = processes

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        if self.pool is not None:
            yield from self.pool.train(spec, message, round, cohort, memories)
            return
        busy = 0.0
        for client in cohort:
            begin = time.perf_counter()
            upload = self.local.client(spec, message, round, client, recalled(memories, client))
            busy += time.perf_counter() - begin
            yield client, upload
        if busy * (spec.rounds - round) * (1 - 1 / self.count) > 2 * self.START:
            self.pool = Pool(self.count)

    def evaluate(self, spec: Spec, state: State) -> tuple[float, float]:
        return (self.pool or self.local).evaluate(spec, state)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None


class Fastest(Base):
    """Gives rounds to its rivals in turn, two to each, and then all to the one that took least time for a sample.

    A rival's first round counts for nothing: libraries are loaded and graphs captured in it. What was found holds for
    all runs of one kind: method, model, data set, batch and cohort.
    """

    ROUNDS = 2

    def __init__(self, rivals: Sequence[InProcess]) -> None:
        self.rivals, self.device = rivals, rivals[0].device
        self.last = rivals[0]
        self.paces: dict[tuple[str | int, ...], list[list[float]]] = {}  # kind -> rival -> seconds a sample, by round

    @property
    def name(self) -> str:
        """For the record: who trained the last round, so most of them."""
        return f"Fastest: {type(self.last).__name__}"

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        kind = (spec.method, spec.model, spec.data, spec.batch, spec.cohort)
        paces = self.paces.setdefault(kind, [[] for _ in self.rivals])
        turn = min(range(len(self.rivals)), key=lambda rival: len(paces[rival]))
        if len(paces[turn]) >= self.ROUNDS:
            turn = min(range(len(self.rivals)), key=lambda rival: paces[rival][self.ROUNDS - 1])
        self.last = self.rivals[turn]
        samples = sum(len(task_of(spec.key(), self.device).partition.indices(client)) for client in cohort)
        busy, arrived = 0.0, 0
        begin = time.perf_counter()
        try:
            for pair in self.last.train(spec, message, round, cohort, memories):
                busy += time.perf_counter() - begin
                arrived += 1
                yield pair
                begin = time.perf_counter()
        except torch.OutOfMemoryError:
            if arrived or all(math.inf in pace for pace in paces):
                raise
            log.warning("engine %s does not fit into the GPU's memory: left out", type(self.last).__name__.lower())
            paces[turn][:] = [math.inf] * self.ROUNDS
        else:
            paces[turn].append(busy / max(1, samples))
            return
        yield from self.train(spec, message, round, cohort, memories)

    def evaluate(self, spec: Spec, state: State) -> tuple[float, float]:
        return self.rivals[0].evaluate(spec, state)

    def close(self) -> None:
        for rival in self.rivals:
            rival.close()
