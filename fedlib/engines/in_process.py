"""The reference engine: one client after the other, in this process. Every other engine gives the same record."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

import torch
from typing_extensions import override

from fedlib.core import client
from fedlib.core.client import Job, Member, Memories, Upload
from fedlib.core.method import AnyMethod, Phase
from fedlib.core.plan import Tensors


class Engine(abc.ABC):
    """Where clients run. It closes itself at the end of a with statement."""

    device: torch.device

    @property
    def name(self) -> str:
        """What a record says of where it was made."""
        return type(self).__name__

    @abc.abstractmethod
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        """Uploads of the cohort, in its order; each with the client's new memory where `memories` are given."""

    @abc.abstractmethod
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        """What the objective names, in its order: accuracy (share of the test set) and mean cross-entropy."""

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Give back what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class InProcess(Engine):
    """On the CPU or on a GPU. Used by itself on a CPU, give torch one thread: `rounds.run` does."""

    side_by_side = False  # whether a whole cohort is trained at a time
    captured = 0  # steps so far that it has made ready for replaying

    def __init__(self, where: torch.device) -> None:
        self.device = where

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        for clients in [cohort] if self.side_by_side else [[number] for number in cohort]:
            yield from client.walk(job, message, round, clients, memories, self.fit)

    def fit(self, method: AnyMethod, phase: Phase, members: Sequence[Member]) -> None:
        """A phase of local training, in place."""
        client.train(method, phase, members)

    def client(self, job: Job, message: bytes, round: int, number: int, memory: bytes | None = None) -> Upload:
        """One client's upload; memory: what it kept, where clients keep something."""
        memories = None if memory is None else {number: memory}
        ((_, upload),) = self.train(job, message, round, [number], memories)
        return upload

    @override
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        there = {name: tensor.to(job.task.device) for name, tensor in model.items()}  # once, not for every chunk
        return mean(client.evaluate(job.task, there, index) for index in client.chunks(job.task))


def memory_of(memories: Memories, client: int) -> bytes | None:
    return None if memories is None else memories.get(client, b"")


def mean(parts: Iterable[tuple[list[float], int]]) -> tuple[float, ...]:
    """Of the sums of some parts, over all that they count."""
    sums, counts = zip(*parts, strict=True)
    return tuple(sum(column) / sum(counts) for column in zip(*sums, strict=True))
