"""Where clients run. A client is a function from bytes to bytes, so no method knows; all engines give the same record.

    InProcess  one client after the other in this process: the reference (fedlib.inprocess)
    Pool       worker processes of one thread each: fastest on a CPU (fedlib.pool)
    Graphed    for a GPU: one client after the other, a whole local step in one launch (fedlib.graphed)
    Stacked    for a GPU: the clients of a round side by side (fedlib.stacked)
    Auto       on a CPU: starts in process, measures the first round, and takes the pool when it pays
    Fastest    on a GPU: tries in process, graphed and stacked in the first rounds, and keeps the fastest

On a CPU every client trains with one thread, in whichever engine, so that sums are formed in the same order. Only
Stacked sums in another order, and agrees within rounding, as all engines do on a GPU.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from fedlib.errors import RunError
from fedlib.graphed import Graphed
from fedlib.inprocess import Base, InProcess, Memories, Upload, recalled, task_of
from fedlib.pool import Pool
from fedlib.spec import Spec
from fedlib.stacked import Stacked
from fedlib.task import State

__all__ = [
    "ENGINES", "Auto", "Engine", "Fastest", "Graphed", "InProcess", "Pool", "Stacked", "Upload",
    "cores", "device", "open_engine", "task_of",
]  # fmt: skip
ENGINES = ("auto", "process", "pool", "stacked", "graphed")  # as the command line names them
log = logging.getLogger("fedlib")


class Engine(Protocol):
    device: torch.device

    @property
    def name(self) -> str: ...

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        """Uploads of the cohort, in its order; each with the client's new memory where `memories` are given."""

    def evaluate(self, spec: Spec, state: State) -> tuple[float, float]:
        """Accuracy (share of the test set) and mean cross-entropy."""

    def close(self) -> None: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *failure: Any) -> None: ...


def device(name: str = "auto") -> torch.device:
    """`auto` is the GPU where there is one. RunError at once when CUDA is asked for and absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise RunError(f"device: {name!r} is unknown; allowed: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("device: cuda was asked for, but torch finds no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_engine(name: str = "auto", on: str = "auto", processes: int | None = None) -> Engine:
    """One of ENGINES; use it as a context manager. `stacked` and `graphed` work on a CPU too, and gain little there."""
    where = device(on)
    if name not in ENGINES:
        raise RunError(f"engine: {name!r} is unknown; allowed: {', '.join(ENGINES)}")
    if processes is not None and processes < 1:
        raise RunError(f"processes: {processes} must be at least 1")
    if name == "pool" and where.type == "cuda":
        raise RunError("engine: pool runs on the CPU only; use --engine process or --device cpu")
    if name == "pool":
        return Pool(processes or cores())
    if name == "stacked":
        return Stacked(where)
    if name == "graphed":
        return Graphed(where)
    if name == "auto" and where.type == "cuda":
        return Fastest([InProcess(where), Graphed(where), Stacked(where)])
    if name == "auto" and cores() > 1:
        return Auto(processes or cores())
    return InProcess(where)


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
