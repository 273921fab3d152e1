"""Where clients run. A client is a function from bytes to bytes, so no method knows; all engines give the same record.

    InProcess  one client after the other in this process: the reference
    Pool       worker processes of one thread each: fastest on a CPU
    Auto       starts in process, measures the first round, and takes the pool when it pays

On a CPU every client trains with one thread, in whichever engine, so that sums are formed in the same order.
"""

from __future__ import annotations

import collections
import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, cast

import torch

from fedlib import local
from fedlib.errors import PayloadError, RunError
from fedlib.spec import Spec
from fedlib.task import State, Task

AHEAD = 2  # jobs a worker holds: the second spares it waiting while the server reads its last upload
Upload = bytes | bytearray | PayloadError


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


@functools.lru_cache(maxsize=1)
def task_of(spec_key: str, where: torch.device) -> Task:
    return Task.of(Spec.from_dict(json.loads(spec_key)), where)


class Base:
    def close(self) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class InProcess(Base):
    def __init__(self, where: torch.device) -> None:
        self.device = where

    def train(self, spec: Spec, message: bytes, round: int, cohort: Sequence[int]) -> Iterator[tuple[int, Upload]]:
        for client in cohort:
            yield client, self.client(spec, message, round, client)

    def client(self, spec: Spec, message: bytes, round: int, client: int) -> Upload:
        return local.run_client(spec, task_of(spec.key(), self.device), message, round, client)

    def evaluate(self, spec: Spec, state: State) -> tuple[float, float]:
        return _mean(self.chunk(spec, state, index) for index in _chunks(spec, self.device))

    def chunk(self, spec: Spec, state: State, index: int) -> tuple[int, float, int]:
        return local.evaluate(task_of(spec.key(), self.device), state, index)


class Pool(Base):
    """Worker processes, started afresh (not forked: threads do not survive a fork) and fed one job at a time.

    A worker whose parent is gone, killed included, reads the end of its pipe and ends too.
    """

    device = torch.device("cpu")

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers: list[Connection] = []
        self.processes = []
        self.busy: dict[Connection, collections.deque[int]] = {}  # which jobs a worker has, the first at work
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append(ours)
            self.processes.append(process)

    def train(self, spec: Spec, message: bytes, round: int, cohort: Sequence[int]) -> Iterator[tuple[int, Upload]]:
        jobs = [("client", round, client) for client in cohort]
        return zip(cohort, self._map(spec, message, jobs), strict=True)

    def evaluate(self, spec: Spec, state: State) -> tuple[float, float]:
        jobs = [("chunk", index) for index in _chunks(spec, self.device)]
        return _mean(self._map(spec, {name: tensor.numpy() for name, tensor in state.items()}, jobs))

    def _map(self, spec: Spec, shared: Any, jobs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in the order of the jobs. Each worker gets `shared` once, then one job after the other."""
        if not self.workers:
            raise RunError("this pool is closed, or a worker of it died: open another one")
        try:
            for worker, left in self.busy.items():  # a round that was left half-way: its answers are not for this one
                for _ in left:
                    _receive(worker)
            busy: dict[Connection, collections.deque[int]] = {
                worker: collections.deque() for worker in self.workers[: len(jobs)]
            }
            self.busy = busy
            waiting, results = iter(enumerate(jobs)), {}

            def feed(worker: Connection) -> None:
                for index, job in waiting:
                    busy[worker].append(index)
                    worker.send(job)
                    return

            for worker in busy:
                worker.send(("shared", spec.key(), len(shared) if isinstance(shared, bytes) else shared))
                if isinstance(shared, bytes):
                    _write(worker, shared)
            for _ in range(AHEAD):
                for worker in busy:
                    feed(worker)
            for index in range(len(jobs)):
                while index not in results:
                    if self.busy is not busy:
                        raise RunError("the pool has begun another round; results of this one are gone")
                    for ready in wait([worker for worker, at in busy.items() if at]):
                        worker = cast(Connection, ready)
                        results[busy[worker].popleft()] = _receive(worker)
                        feed(worker)
                result = results.pop(index)
                if isinstance(result, Exception) and not isinstance(result, PayloadError):
                    raise result
                yield result
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self.close()
            raise RunError("a worker process died (out of memory?); try --engine process") from error

    def close(self) -> None:
        for process in self.processes:
            process.kill()  # workers hold nothing
            process.join()
        for worker in self.workers:
            worker.close()
        self.workers, self.processes, self.busy = [], [], {}


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


def _chunks(spec: Spec, where: torch.device) -> range:
    return local.chunks(task_of(spec.key(), where))


def _mean(parts: Any) -> tuple[float, float]:
    correct, loss, count = (sum(column) for column in zip(*parts, strict=True))
    return correct / count, loss / count


def _work(connection: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is the parent's to handle
    engine = InProcess(torch.device("cpu"))
    spec: Any = None
    shared: Any = None
    while True:
        try:
            kind, *arguments = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        result: Any
        try:
            if kind == "shared":
                spec, shared = Spec.from_dict(json.loads(arguments[0])), arguments[1]
                if isinstance(shared, int):
                    shared = bytes(_read(connection, shared))
                else:
                    shared = {name: torch.from_numpy(array) for name, array in shared.items()}
                continue
            result = (
                engine.client(spec, shared, *arguments) if kind == "client" else engine.chunk(spec, shared, *arguments)
            )
        except Exception as error:  # sent to the parent, which raises it
            result = error
        try:
            if isinstance(result, bytes):
                connection.send(len(result))
                _write(connection, result)
            else:
                connection.send(result)
        except (BrokenPipeError, OSError):
            return


def _receive(worker: Connection) -> Any:
    result = worker.recv()
    return _read(worker, result) if isinstance(result, int) else result


# Messages go by system calls: Connection's own methods copy megabytes three times, a tenth of a client's training.


def _write(connection: Connection, message: bytes) -> None:
    rest = memoryview(message)
    while rest:
        rest = rest[os.write(connection.fileno(), rest) :]


def _read(connection: Connection, size: int) -> bytearray:
    message = bytearray(size)
    rest = memoryview(message)
    while rest:
        count = os.readv(connection.fileno(), [rest])
        if count == 0:
            raise EOFError
        rest = rest[count:]
    return message
