"""The reference engine: one client after the other, in this process. Every other engine gives the same record."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from fedlib.core import client as client_side
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.errors import PayloadError
from fedlib.methods import registry
from fedlib.runs.spec import Spec

Upload = bytes | bytearray | PayloadError | client_side.Reply
Memories = Mapping[int, bytes] | None  # by client, of those that have one; None without error feedback


@functools.lru_cache(maxsize=1)
def task_of(spec_key: str, where: torch.device) -> Task:
    """The task of `Spec.key()`'s spec; the last one is kept, since a run asks for it in every round."""
    spec = Spec.from_dict(json.loads(spec_key))
    return dataclasses.replace(Task.of(spec, where), downlink=registry.downlink(spec))


class Base:
    """An engine closes itself at the end of a with statement."""

    @property
    def name(self) -> str:
        """What a record says of where it was made."""
        return type(self).__name__

    def close(self) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class InProcess(Base):
    """On the CPU or on a GPU. Used by itself on a CPU, give torch one thread: `rounds.run` does."""

    def __init__(self, where: torch.device) -> None:
        self.device = where

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        for client in cohort:
            yield client, self.client(spec, message, round, client, recalled(memories, client))

    def client(self, spec: Spec, message: bytes, round: int, client: int, memory: bytes | None = None) -> Upload:
        return client_side.run_client(spec, task_of(spec.key(), self.device), message, round, client, memory)

    def evaluate(self, spec: Spec, state: State) -> tuple[float, float]:
        return mean(self.chunk(spec, state, index) for index in chunks(spec, self.device))

    def chunk(self, spec: Spec, state: State, index: int) -> tuple[int, float, int]:
        return client_side.evaluate(task_of(spec.key(), self.device), state, index)


def recalled(memories: Memories, client: int) -> bytes | None:
    return None if memories is None else memories.get(client, b"")


def chunks(spec: Spec, where: torch.device) -> range:
    return client_side.chunks(task_of(spec.key(), where))


def mean(parts: Iterable[tuple[int, float, int]]) -> tuple[float, float]:
    correct, loss, count = (sum(column) for column in zip(*parts, strict=True))
    return correct / count, loss / count
