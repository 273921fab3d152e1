"""Engines that choose among the others by measuring them in the first rounds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.core.plan import Tensors
from fedlib.engines.cuda_device import out_of_memory
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


@dataclass
class Trial:
    """What is known of a rival at runs of one kind."""

    rounds: int = 0
    pace: float | None = None  # seconds a sample, once they count

    def note(self, pace: float, warm: bool) -> None:
        self.rounds += 1
        if (warm and self.rounds > 1) or self.rounds >= Fastest.MOST:
            self.pace = pace


class Fastest(Engine):
    """Gives rounds to its rivals in turn, until each had a warm one, and then all to the one that took least time for a
    sample in it.

    Cold is a rival's first round, in which libraries are loaded, and each in which a graph is captured: there is one
    for every length of a batch. Who never has a warm one is judged by round MOST. What was found holds for all runs of
    one kind: see `kind`.
    """

    MOST = 6

    def __init__(self, rivals: Sequence[InProcess]) -> None:
        self.rivals, self.device = rivals, rivals[0].device
        self.last = rivals[0]
        self.trials: dict[tuple[Hashable, ...], list[Trial]] = {}  # by kind, a rival each

    @property
    @override
    def name(self) -> str:
        """For the record: who trained the last round, so most of them."""
        return f"Fastest: {type(self.last).__name__}"

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        trials = self.trials.setdefault(kind(job), [Trial() for _ in self.rivals])
        untold = [turn for turn, trial in enumerate(trials) if trial.pace is None]
        turn = min(untold, key=lambda rival: trials[rival].rounds) if untold else fastest(trials)
        self.last = self.rivals[turn]
        samples = sum(len(job.task.partition.indices(client)) for client in cohort)
        busy, arrived, captured = 0.0, 0, self.last.captured
        begin = time.perf_counter()
        try:
            for pair in self.last.train(job, message, round, cohort, memories):
                busy += time.perf_counter() - begin
                arrived += 1
                yield pair
                begin = time.perf_counter()
        except RuntimeError as error:
            others = [trial for trial in trials if trial is not trials[turn]]
            if not out_of_memory(error) or arrived or all(trial.pace == math.inf for trial in others):
                raise
            log.warning("engine %s does not fit into the GPU's memory: left out", type(self.last).__name__.lower())
            trials[turn].pace = math.inf
            self.last.close()  # what it holds is wanted
        else:
            if untold:
                trials[turn].note(busy / max(1, samples), warm=self.last.captured == captured)
            return
        yield from self.train(job, message, round, cohort, memories)

    @override
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        return self.rivals[0].evaluate(job, model)

    @override
    def close(self) -> None:
        for rival in self.rivals:
            rival.close()


def fastest(trials: Sequence[Trial]) -> int:
    """Of rivals that all have a pace."""
    paces = [trial.pace for trial in trials if trial.pace is not None]
    return paces.index(min(paces))


def kind(job: Job) -> tuple[Hashable, ...]:
    """All that decides how long a step takes, and how many there are: with another partition batches have other
    lengths."""
    task = job.task
    shapes = tuple(task.tensors.items()), tuple(task.frozen.items()), task.train[0].shape
    agreed = task.plan, task.cohort, task.held_out, task.partition.hash
    return job.method, job.method.writer, str(task.network), *shapes, *agreed
