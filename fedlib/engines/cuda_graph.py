"""One client after the other, each local step launched as a whole: a CUDA graph, captured once and replayed.

The kernels are the reference's own. On a CPU the same step is run on the same tensors, and gives the reference's bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedlib.core.task import Task
from fedlib.engines.gpu_steps import Batched, Member, descend, orders, progress, same

WARM_UP = 3  # plain steps before one is captured: libraries choose their kernels in them, and rare lengths stay plain


class Graphed(Batched):
    """Captured graphs serve all clients and rounds of a run."""

    def __init__(self, where: torch.device) -> None:
        super().__init__(where, stack=1)
        self.steps: dict[int, StaticStep] = {}  # by the task of the stage

    def fit(self, method: ModuleType, hyper: Any, task: Task, members: Sequence[Member]) -> None:
        for member in members:
            if id(task) not in self.steps or not self.steps[id(task)].suits(task, member):
                if not any(task is stage for step in self.steps.values() for stage in step.task.stages.get(hyper, ())):
                    self.steps.clear()  # first, so that the memory of another task's is free
                self.steps[id(task)] = StaticStep(method, hyper, task, member)
            step, samples = self.steps[id(task)], len(member.indices)
            step.load(member)
            generator = member.rng.child("draws").torch(task.device)
            for epoch, (order,) in enumerate(orders([member], task)):
                for start in range(0, samples, task.plan.batch):
                    draws = method.draws(progress(task.plan, samples, epoch, start), hyper, task, generator)
                    step(order[start : start + task.plan.batch], draws)
            member.trainable.update(step.trainable)  # to be read before the next client is trained
            member.frozen.update(step.frozen)
            member.moments.update(step.moments)

    def close(self) -> None:
        self.steps.clear()


class StaticStep:
    """A local step on tensors that keep their places, so that a GPU can replay it; on a CPU it is simply run.

    What varies is copied in: a client's state; for each step the batch's places in the training set, and the draws.
    """

    def __init__(self, method: ModuleType, hyper: Any, task: Task, like: Member) -> None:
        self.method, self.hyper, self.task = method, hyper, task
        self.trainable = {name: torch.empty_like(tensor).requires_grad_() for name, tensor in like.trainable.items()}
        self.frozen = {name: torch.empty_like(tensor) for name, tensor in like.frozen.items()}
        self.moments = {name: torch.empty_like(tensor) for name, tensor in like.moments.items()}
        longest = min(task.plan.batch, len(task.train[1]))
        self.index = torch.zeros(longest, dtype=torch.int64, device=task.device)
        self.draws: Any = None
        self.met = collections.Counter[int]()  # batch length -> steps so far
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch length
        if task.device.type == "cuda":
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def suits(self, task: Task, member: Member) -> bool:
        """Whether it was made for this task, which stands for method and settings too, and for tensors like these."""

        def shapes(*states: dict[str, Tensor]) -> list[dict[str, Any]]:
            return [{name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} for state in states]

        return self.task is task and shapes(self.trainable, self.frozen) == shapes(member.trainable, member.frozen)

    def load(self, member: Member) -> None:
        with torch.no_grad():
            pairs = (self.trainable, member.trainable), (self.frozen, member.frozen), (self.moments, member.moments)
            for own, given in pairs:
                for name, tensor in own.items():
                    tensor.copy_(given[name])

    def __call__(self, index: Tensor, draws: Any) -> None:
        length = len(index)
        self.index[:length].copy_(index)
        if not self.met:
            self.draws = tree_map(self.place, draws)
        tree_map(filled, self.draws, draws)
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
        loss = self.method.objective(self.trainable, self.frozen, batch, self.draws, self.hyper, self.task)
        descend(loss, self.trainable, self.moments, self.task.plan)

    def place(self, leaf: Any) -> Any:
        """Where one of the draws is kept; float64 rounds a number as Python does."""
        if isinstance(leaf, float):
            return torch.empty((), dtype=torch.float64, device=self.task.device)
        return torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf


def filled(place: Any, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return place.copy_(leaf)
    return place.fill_(leaf) if isinstance(leaf, float) else same(place, leaf)
