"""One client after the other, each local step launched as a whole: a CUDA graph, captured once and replayed.

The kernels are the reference's own. On a CPU the same step is run on the same tensors, and gives the reference's bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from fedlib.core.client import Member
from fedlib.core.method import AnyMethod, Phase
from fedlib.core.plan import Plan, Tensors
from fedlib.engines.gpu_steps import descend, orders, progress, same
from fedlib.engines.in_process import InProcess

WARM_UP = 3  # plain steps before one is captured: libraries choose their kernels in them, and rare lengths stay plain


class Graphed(InProcess):
    """Captured graphs serve all clients and rounds of a run."""

    def __init__(self, where: torch.device) -> None:
        super().__init__(where)
        self.steps: dict[Plan, StaticStep] = {}  # by the plan of the phase

    @override
    def fit(self, method: AnyMethod, phase: Phase, members: Sequence[Member]) -> None:
        method.task.network.train()
        plan = phase.plan
        if any(step.method is not method for step in self.steps.values()):
            self.steps.clear()  # first, so that the memory of another run's is free
        for member in members:
            if plan not in self.steps or not self.steps[plan].suits(member):
                self.steps[plan] = StaticStep(method, plan, member)
            step, samples = self.steps[plan], member.local.samples
            step.load(member)
            ready = len(step.graphs)
            stream = member.draws.child("draws").stream(method.task.device)
            for epoch, (order,) in enumerate(orders([member], method.task, plan.epochs)):
                for start in range(0, samples, plan.batch):
                    drawn = method.draw(progress(plan, samples, epoch, start), stream)
                    step(order[start : start + plan.batch], drawn)
            self.captured += len(step.graphs) - ready
            for own, given in zip(step.own, parts(member), strict=True):
                given.update(own)  # to be read before the next client is trained

    @override
    def close(self) -> None:
        self.steps.clear()


def parts(member: Member) -> tuple[Tensors, Tensors, Tensors]:
    return member.local.trainable, member.local.frozen, member.moments


class StaticStep:
    """A local step on tensors that keep their places, so that a GPU can replay it; on a CPU it is simply run.

    What varies is copied in: a client's state; for each step the batch's places in the training set, and the draws.
    """

    def __init__(self, method: AnyMethod, plan: Plan, like: Member) -> None:
        self.method, self.task, self.plan = method, method.task, plan
        trainable, frozen, moments = parts(like)
        self.trainable = {name: torch.empty_like(tensor).requires_grad_() for name, tensor in trainable.items()}
        self.frozen = {name: torch.empty_like(tensor) for name, tensor in frozen.items()}
        self.moments = {name: torch.empty_like(tensor) for name, tensor in moments.items()}
        longest = min(plan.batch, len(self.task.train[1]))
        self.index = torch.zeros(longest, dtype=torch.int64, device=self.task.device)
        self.draws: Any = None
        self.met = collections.Counter[int]()  # batch length -> steps so far
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch length
        if self.task.device.type == "cuda":
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @property
    def own(self) -> tuple[Tensors, Tensors, Tensors]:
        return self.trainable, self.frozen, self.moments

    def suits(self, member: Member) -> bool:
        """Whether it was made for tensors like these."""

        def shapes(*states: Tensors) -> list[dict[str, Any]]:
            return [{name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} for state in states]

        return shapes(*self.own) == shapes(*parts(member))

    def load(self, member: Member) -> None:
        with torch.no_grad():
            for own, given in zip(self.own, parts(member), strict=True):
                for name, tensor in own.items():
                    tensor.copy_(given[name])

    def __call__(self, index: Tensor, draws: Any) -> None:
        length = len(index)
        self.index[:length].copy_(index)
        if not self.met:
            self.draws = tree_map(self.place, draws)
        tree_map(fill, self.draws, draws)
        self.met[length] += 1
        if length in self.graphs:
            self.graphs[length].replay()
        elif self.task.device.type == "cpu":
            self.run(length)
        elif self.met[length] <= WARM_UP:  # what comes before a capture must not run on the default stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.run(length)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            graph = torch.cuda.CUDAGraph()
            # One pool for all: nothing made within a step is read after it, so graphs may overwrite each other's.
            with torch.cuda.graph(graph, pool=self.pool):
                self.run(length)
            self.graphs[length] = graph
            graph.replay()  # capturing computed nothing

    def run(self, length: int) -> None:
        index = self.index[:length]
        batch = self.task.train[0][index], self.task.train[1][index]
        loss = self.method.loss(self.trainable, self.frozen, batch, self.draws)
        descend(loss, self.trainable, self.moments, self.plan)

    def place(self, leaf: Any) -> Any:
        """Where one of the draws is kept; float64 rounds a number as Python does."""
        if isinstance(leaf, float):
            return torch.empty((), dtype=torch.float64, device=self.task.device)
        return torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf


def fill(place: Any, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return place.copy_(leaf)
    return place.fill_(leaf) if isinstance(leaf, float) else same(place, leaf)
