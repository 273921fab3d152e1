"""Clients side by side: each tensor gets the clients as its first dimension, and one kernel serves them all.

Sums are formed in another order than in the reference, so that numbers agree within rounding, on a CPU too. Much faster
than one client after the other on a GPU; on a CPU only for small dense networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map
from typing_extensions import override

from fedlib.core.client import Member
from fedlib.core.method import AnyMethod, Draws, Phase
from fedlib.core.plan import Plan, Samples, Tensors
from fedlib.engines.gpu_steps import descend, orders, progress, same
from fedlib.engines.in_process import InProcess


class Stacked(InProcess):
    """A step takes together the clients whose batch then has the same length: BatchNorm would see padding.

    Memory grows with the cohort.
    """

    side_by_side = True

    @override
    def fit(self, method: AnyMethod, phase: Phase, members: Sequence[Member]) -> None:
        train(method, phase, members)


def train(method: AnyMethod, phase: Phase, members: Sequence[Member]) -> None:
    task, plan = method.task, phase.plan
    task.network.train()
    members = sorted(members, key=lambda member: -member.local.samples)  # equal lengths become neighbours
    sizes = [member.local.samples for member in members]
    trainable, frozen = stacked([m.local.trainable for m in members]), stacked([m.local.frozen for m in members])
    moments = stacked([m.moments for m in members])
    streams = [member.draws.child("draws").stream(task.device) for member in members]
    for epoch, table in enumerate(orders(members, task, plan.epochs)):
        for start in range(0, sizes[0], plan.batch):
            for rows, length in groups(sizes, start, plan.batch):
                drawn = [
                    method.draw(progress(plan, samples, epoch, start), stream)
                    for samples, stream in zip(sizes[rows], streams[rows], strict=True)
                ]
                draws = tree_map(lambda *leaves: together(leaves, task.device), *drawn)
                index = table[rows, start : start + length]
                # Views: trainable tensors, moments and BatchNorm statistics change in place in the stack.
                own = {name: tensor[rows].detach().requires_grad_() for name, tensor in trainable.items()}
                held, kept = ({name: tensor[rows] for name, tensor in s.items()} for s in (frozen, moments))
                step(method, plan, own, held, kept, (task.train[0][index], task.train[1][index]), draws)
    for row, member in enumerate(members):
        member.local.trainable.update({name: tensor[row] for name, tensor in trainable.items()})
        member.local.frozen.update({name: tensor[row] for name, tensor in frozen.items()})
        member.moments.update({name: tensor[row] for name, tensor in moments.items()})


def step(
    method: AnyMethod, plan: Plan, trainable: Tensors, frozen: Tensors, moments: Tensors, batch: Samples, draws: Draws
) -> None:
    """One local step of several clients, in place; every tensor has the clients as its first dimension."""
    dims = (0, 0, 0, tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, draws))
    losses = vmap(method.loss, in_dims=dims)(trainable, frozen, batch, draws)
    # A client's tensors enter its own loss alone, so the gradient of the sum is the gradient of each.
    descend(losses.sum(), trainable, moments, plan)


def groups(sizes: Sequence[int], start: int, batch: int) -> Iterator[tuple[slice, int]]:
    """Clients, as rows, and the common length of their batches at sample `start` of an epoch; `sizes` descend."""
    first = 0
    for length, clients in itertools.groupby(min(batch, size - start) for size in sizes if size > start):
        end = first + len(list(clients))
        yield slice(first, end), length
        first = end


def stacked(states: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def together(leaves: Sequence[Any], where: torch.device) -> Any:
    """One of the draws for several clients. Numbers become float64, in which they round as in Python."""
    if isinstance(leaves[0], Tensor):
        return torch.stack(tuple(leaves))
    if isinstance(leaves[0], float):
        on_gpu = where.type == "cuda"  # from pinned memory, so that nobody waits
        return torch.tensor(leaves, dtype=torch.float64, pin_memory=on_gpu).to(where, non_blocking=on_gpu)
    return same(*leaves)
