"""Engines that choose among the others by measuring them in the first rounds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Iterator, Sequence

import torch
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.core.plan import Tensors
from fedlib.engines.in_process import Engine, InProcess, memory_of
from fedlib.engines.pool import Pool

log = logging.getLogger("fedlib")


class Auto(Engine):
    """In process until a measured round says that the rest of the run is worth the start of a pool."""

    device = torch.device("cpu")
    START = 5.0  # seconds that workers need to import torch and load data, measured on two cores

    def __init__(self, processes: int) -> None:
        self.local = InProcess(self.device)
        self.pool: Pool | None = None
        self.count = processes

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        if self.pool is not None:
            yield from self.pool.train(job, message, round, cohort, memories)
            return
        busy = 0.0
        for client in cohort:
            begin = time.perf_counter()
            upload = self.local.client(job, message, round, client, memory_of(memories, client))
            busy += time.perf_counter() - begin
            yield client, upload
        if busy * (job.rounds - round) * (1 - 1 / self.count) > 2 * self.START:
            self.pool = Pool(self.count)

    @override
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        return (self.pool or self.local).evaluate(job, model)

    @override
    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None


class Fastest(Engine):
    """Gives rounds to its rivals in turn, two to each, and then all to the one that took least time for a sample.

    A rival's first round counts for nothing: libraries are loaded and graphs captured in it. What was found holds for
    all runs of one kind: method, network, number of samples, plan and cohort.
    """

    ROUNDS = 2

    def __init__(self, rivals: Sequence[InProcess]) -> None:
        self.rivals, self.device = rivals, rivals[0].device
        self.last = rivals[0]
        self.paces: dict[tuple[Hashable, ...], list[list[float]]] = {}  # kind -> rival -> seconds a sample, by round

    @property
    @override
    def name(self) -> str:
        """For the record: who trained the last round, so most of them."""
        return f"Fastest: {type(self.last).__name__}"

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        task = job.task
        kind = (job.method.name, task.plan, task.cohort, len(task.train[1]), tuple(task.tensors.items()))
        paces = self.paces.setdefault(kind, [[] for _ in self.rivals])
        turn = min(range(len(self.rivals)), key=lambda rival: len(paces[rival]))
        if len(paces[turn]) >= self.ROUNDS:
            turn = min(range(len(self.rivals)), key=lambda rival: paces[rival][self.ROUNDS - 1])
        self.last = self.rivals[turn]
        samples = sum(len(task.partition.indices(client)) for client in cohort)
        busy, arrived = 0.0, 0
        begin = time.perf_counter()
        try:
            for pair in self.last.train(job, message, round, cohort, memories):
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
        yield from self.train(job, message, round, cohort, memories)

    @override
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        return self.rivals[0].evaluate(job, model)

    @override
    def close(self) -> None:
        for rival in self.rivals:
            rival.close()
