"""What the two engines for a GPU share, where launching the kernels of a small step takes longer than the step itself.

    Stacked  the clients of a cohort side by side: one launch serves them all (fedlib.engines.vmapped)
    Graphed  one client after the other, a whole step in one launch (fedlib.engines.cuda_graph)

Both take the steps of `fedlib.core.client.train`, batch for batch and draw for draw; tests hold the three together for
every method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlib.core import optimizers
from fedlib.core.client import Member
from fedlib.core.plan import Plan, Tensors
from fedlib.core.task import Task

# The parts of a local step, as in `fedlib.core.client.train`


def orders(members: Sequence[Member], task: Task, epochs: int) -> Iterator[Tensor]:
    """For each epoch the places in `task.train` of the members' samples, in their order of training [members, most]."""
    streams = [member.draws.child("order").stream() for member in members]
    places = [torch.from_numpy(task.indices(member.client)) for member in members]
    most = max(len(own) for own in places)
    for _ in range(epochs):
        table = torch.zeros(len(members), most, dtype=torch.int64)
        for row, own, stream in zip(table, places, streams, strict=True):
            row[: len(own)] = own[stream.permutation(len(own))]
        yield table.to(task.device)  # once an epoch: the GPU is waited for no more often


def progress(plan: Plan, samples: int, epoch: int, start: int) -> float:
    """Share of a client's steps done with the one that begins at sample `start` of an epoch."""
    steps = plan.steps(samples)
    return (epoch * (steps // plan.epochs) + start // plan.batch + 1) / steps


def descend(loss: Tensor, trainable: Tensors, moments: Tensors, plan: Plan) -> None:
    own = list(trainable.values())
    # With the strides of their parameters: a GPU takes no others in one launch for all tensors.
    gradients = [g.contiguous().flatten().view_as(p) for g, p in zip(torch.autograd.grad(loss, own), own, strict=True)]
    optimizers.step(plan, trainable, gradients, moments)


def same(first: Any, *others: Any) -> Any:
    """Anything else among the draws is part of the formula: the same at each step of each client."""
    if any(other != first for other in others):
        raise TypeError(f"draws: {first!r} changes from step to step; only tensors and floats may")
    return first
