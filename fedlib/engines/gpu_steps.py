"""What the two engines for a GPU share, where launching the kernels of a small step takes longer than the step itself.

    Stacked  the clients of a cohort side by side: one launch serves them all (fedlib.engines.vmapped)
    Graphed  one client after the other, a whole step in one launch (fedlib.engines.cuda_graph)

Both take the steps of `fedlib.core.client.train`, batch for batch and draw for draw; tests hold the three together for
every method.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedlib.core import client as client_side
from fedlib.core import optimizers
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.engines.in_process import InProcess, Memories, Upload, recalled, task_of
from fedlib.errors import PayloadError
from fedlib.methods import registry
from fedlib.rng import Rng
from fedlib.runs.spec import Spec

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Member:
    """A client between `method.start` and `method.finish`."""

    trainable: State
    frozen: State
    indices: Tensor  # int64 [samples] on the CPU: its samples' places in `task.train`
    rng: Rng
    moments: State  # of its optimizer
    memory: bytes | None = None


class Batched(InProcess, abc.ABC):
    """Starts `stack` clients of a cohort (all if None), lets `fit` train them, finishes them in the cohort's order."""

    def __init__(self, where: torch.device, stack: int | None = None) -> None:
        super().__init__(where)
        self.stack = stack

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        task = task_of(spec.key(), self.device)
        method, hyper = registry.METHODS[spec.method], registry.hyper(spec.method, spec.hyper)

        def start(client: int) -> Member:
            rng = Rng(spec.seed).child("client", round, client)
            trainable, frozen = client_side.start(method, message, task.shard(client), hyper, task, rng)
            indices = torch.from_numpy(task.indices(client))
            memory = recalled(memories, client)
            return Member(trainable, frozen, indices, rng, client_side.recalled(task, trainable, memory), memory)

        def finish(client: int, member: Member) -> bytes | client_side.Reply:
            trainable, frozen, samples = member.trainable, member.frozen, len(member.indices)
            upload = client_side.finish(
                method, trainable, frozen, member.moments, samples, hyper, task, member.rng, member.memory
            )
            return client_side.assessed(method, upload, client, hyper, task)

        stack = max(1, self.stack or len(cohort))
        for first in range(0, len(cohort), stack):
            clients = cohort[first : first + stack]
            members = [_attempt(start, client) for client in clients]
            for number, stage in enumerate(registry.stages(method, hyper, task)):
                members = [
                    m if isinstance(m, PayloadError) else entered(method, number, m, hyper, stage) for m in members
                ]
                task.network.train()
                now = [
                    dataclasses.replace(m, rng=client_side.staged(m.rng, number))
                    for m in members
                    if isinstance(m, Member)
                ]
                self.fit(method, hyper, stage, now)
            for client, member in zip(clients, members, strict=True):
                yield (
                    client,
                    _attempt(functools.partial(finish, client), member) if isinstance(member, Member) else member,
                )

    def client(self, spec: Spec, message: bytes, round: int, client: int, memory: bytes | None = None) -> Upload:
        memories = None if memory is None else {client: memory}
        ((_, upload),) = self.train(spec, message, round, [client], memories)
        return upload

    @abc.abstractmethod
    def fit(self, method: ModuleType, hyper: Any, task: Task, members: Sequence[Member]) -> None:
        """Local training: the members' tensors are replaced by trained ones, which are read before the next call."""


def entered(method: ModuleType, stage: int, member: Member, hyper: Any, task: Task) -> Member:
    """The member at the start of a stage: after the first its optimizer begins afresh."""
    registry.enter(method, stage, member.trainable, member.frozen, hyper, task, member.rng)
    if not stage:
        return member
    return dataclasses.replace(member, moments=client_side.recalled(task, member.trainable, None))


def _attempt(function: Callable[[In], Out], argument: In) -> Out | PayloadError:
    """What a client cannot read or send comes back as its error, and is nobody else's."""
    try:
        return function(argument)
    except PayloadError as error:
        return error


# The parts of a local step, as in `fedlib.core.client.train`


def orders(members: Sequence[Member], task: Task) -> Iterator[Tensor]:
    """For each epoch the places of the members' samples in their order of training: [members, most samples]."""
    generators = [member.rng.child("order").torch() for member in members]
    most = max(len(member.indices) for member in members)
    for _ in range(task.plan.epochs):
        table = torch.zeros(len(members), most, dtype=torch.int64)
        for row, member, generator in zip(table, members, generators, strict=True):
            samples = len(member.indices)
            row[:samples] = member.indices[torch.randperm(samples, generator=generator)]
        yield table.to(task.device)  # once an epoch: the GPU is waited for no more often


def progress(plan: Plan, samples: int, epoch: int, start: int) -> float:
    """Share of a client's steps done with the one that begins at sample `start` of an epoch."""
    steps = plan.steps(samples)
    return (epoch * (steps // plan.epochs) + start // plan.batch + 1) / steps


def descend(loss: Tensor, trainable: State, moments: State, plan: Plan) -> None:
    optimizers.step(plan, trainable, torch.autograd.grad(loss, list(trainable.values())), moments)


def same(first: Any, *others: Any) -> Any:
    """Anything else among the draws is part of the formula: the same at each step of each client."""
    if any(other != first for other in others):
        raise TypeError(f"draws: {first!r} changes from step to step; only tensors and floats may")
    return first
