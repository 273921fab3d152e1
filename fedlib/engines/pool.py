"""Clients in worker processes of one thread each: the fastest engine on a CPU (POSIX systems)."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
from typing_extensions import override

from fedlib.core import client
from fedlib.core.client import Job, Memories, Upload
from fedlib.core.plan import Tensors
from fedlib.engines import freed_memory
from fedlib.engines.in_process import Engine, InProcess, mean, memory_of
from fedlib.errors import PayloadError, RunError

# Jobs a worker holds: the second spares it waiting while the server reads its last upload. A job with a client's memory
# in it, megabytes perhaps, waits for an idle worker: a busy one and the server would wait for each other.
AHEAD = 2


class Pool(Engine):
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

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        jobs = [("client", round, number, memory_of(memories, number)) for number in cohort]
        ahead = AHEAD if memories is None else 1
        return zip(cohort, self._map((job.rebuild, job.key, message), jobs, ahead), strict=True)

    @override
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        jobs = [("chunk", index) for index in client.chunks(job.task)]
        arrays = {name: tensor.numpy() for name, tensor in model.items()}
        return mean(self._map((job.rebuild, job.key, arrays), jobs, AHEAD))

    def call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """function(engine, *arguments) in the workers, results in order; `function` is a module's own."""
        # A whole run waits for no server, and should not wait behind another.
        return self._map(None, [("call", function, *each) for each in arguments], ahead=1)

    def _map(self, shared: tuple[Any, ...] | None, jobs: Sequence[tuple[Any, ...]], ahead: int) -> Iterator[Any]:
        """Results in the order of the jobs. Each worker gets what is shared once, then one job after the other; it
        holds `ahead` of them."""
        if not self.workers:
            raise RunError("this pool is closed, or a worker of it died: open another one")
        try:
            for worker, left in self.busy.items():  # a round that was left half-way: its answers are not for this one
                for _ in left:
                    _receive(worker)
            self.busy = busy = {worker: collections.deque[int]() for worker in self.workers[: len(jobs)]}
            waiting, results = iter(enumerate(jobs)), {}

            def feed(worker: Connection) -> None:
                for index, job in waiting:
                    _send(worker, job)
                    busy[worker].append(index)
                    return

            for worker in busy:
                if shared:
                    _send(worker, ("shared", *shared[:2]))
                    _send(worker, shared[2])
            for worker in [*busy] * ahead:
                feed(worker)
            for index in range(len(jobs)):
                while index not in results:
                    if self.busy is not busy:
                        raise RunError("the pool has begun another round; results of this one are gone")
                    for ready in wait([worker for worker, at in busy.items() if at]):
                        worker = cast(Connection, ready)
                        done = busy[worker].popleft()
                        results[done] = _receive(worker)
                        feed(worker)
                result = results.pop(index)
                if isinstance(result, Exception) and (shared is None or not isinstance(result, PayloadError)):
                    raise result
                yield result
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self.close()
            raise RunError("a worker process died (out of memory?); try --engine process") from error

    @override
    def close(self) -> None:
        for process in self.processes:
            process.kill()  # workers hold nothing
            process.join()
        for worker in self.workers:
            worker.close()
        self.workers, self.processes, self.busy = [], [], {}


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(connection: Connection) -> None:
    torch.set_num_threads(1)
    freed_memory.keep()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is the parent's to handle
    engine = InProcess(torch.device("cpu"))
    job: Job | None = None
    rebuild: Any = None
    key, shared = "", cast(Any, None)
    while True:
        try:
            kind, *arguments = _receive(connection)
        except (EOFError, OSError, KeyboardInterrupt):
            return
        result: Any
        try:
            if kind == "shared":
                rebuild, key = arguments
                shared = _receive(connection)
                if not isinstance(shared, bytes):
                    shared = {name: torch.from_numpy(array) for name, array in shared.items()}
                continue
            if kind == "call":
                result = arguments[0](engine, *arguments[1:])
            else:
                if job is None or job.key != key:
                    job = rebuild(key, engine.device)
                if kind == "client":
                    result = engine.client(job, shared, *arguments)
                else:
                    result = client.evaluate(job.task, shared, *arguments)
        except Exception as error:  # sent to the parent, which raises it
            result = error
        try:
            _send(connection, result)
        except (BrokenPipeError, OSError):
            return


def _send(connection: Connection, content: Any) -> None:
    """A message of megabytes goes as it is: pickling copies it."""
    raw = isinstance(content, bytes)
    connection.send((raw, None if raw else content))
    if raw:
        connection.send_bytes(content)


def _receive(connection: Connection) -> Any:
    raw, content = connection.recv()
    return connection.recv_bytes() if raw else content
