"""Where clients run. A client is a function from bytes to bytes, so no method knows; all engines give the same record.

    InProcess  one client after the other in this process: the reference (fedlib.inprocess)
    Pool       worker processes of one thread each: fastest on a CPU (fedlib.pool)
    Auto       starts in process, measures the first round, and takes the pool when it pays

On a CPU every client trains with one thread, in whichever engine, so that sums are formed in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from fedlib.errors import RunError
from fedlib.inprocess import Base, InProcess, Upload, task_of
from fedlib.pool import Pool
from fedlib.spec import Spec
from fedlib.task import State

__all__ = ["Auto", "Engine", "InProcess", "Pool", "cores", "device", "open_engine", "task_of"]


class Engine(Protocol):
    device: torch.device

    def train(self, spec: Spec, message: bytes, round: int, cohort: Sequence[int]) -> Iterator[tuple[int, Upload]]:
        """Uploads of the cohort, in its order."""

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
    """`auto`, `process` (in process) or `pool`; use it as a context manager."""
    where = device(on)
    if processes is not None and processes < 1:
        raise RunError(f"processes: {processes} must be at least 1")
    if name == "process" or (name == "auto" and (where.type == "cuda" or cores() == 1)):
        return InProcess(where)
    if name == "pool" and where.type == "cuda":
        raise RunError("engine: pool runs on the CPU only; use --engine process or --device cpu")
    if name == "pool":
        return Pool(processes or cores())
    if name == "auto":
        return Auto(processes or cores())
    raise RunError(f"engine: {name!r} is unknown; allowed: auto, process, pool")


class Auto(Base):
    """In process until a measured round says that the rest of the run is worth the start of a pool."""

    device = torch.device("cpu")
    START = 5.0  # seconds that workers need to import torch and load data, measured on two cores

    def __init__(self, processes: int) -> None:
        self.local = InProcess(self.device)
        self.pool: Pool | None = None
        self.count = processes

    def train(self, spec: Spec, message: bytes, round: int, cohort: Sequence[int]) -> Iterator[tuple[int, Upload]]:
        if self.pool is not None:
            yield from self.pool.train(spec, message, round, cohort)
            return
        busy = 0.0
        for client in cohort:
            begin = time.perf_counter()
            upload = self.local.client(spec, message, round, client)
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
