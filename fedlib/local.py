"""What happens at a client: start from the broadcast, train on the shard, finish with an upload. Written once."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedlib.rng import Rng
from fedlib.task import Task


def client(method: ModuleType, message: bytes, shard: tuple[Tensor, Tensor], hyper: Any, task: Task, rng: Rng) -> bytes:
    """The function from bytes to bytes that a client is. PayloadError: unreadable message, or an update not finite."""
    trainable, frozen = method.start(message, hyper, task, rng)
    train(method, trainable, frozen, shard, hyper, task, rng)
    return method.finish(trainable, frozen, len(shard[0]), hyper, task, rng)


def train(
    method: ModuleType,
    trainable: dict[str, Tensor],
    frozen: dict[str, Tensor],
    shard: tuple[Tensor, Tensor],
    hyper: Any,
    task: Task,
    rng: Rng,
) -> None:
    """S steps of SGD on `method.objective`, in place. `frozen` has no gradient; BatchNorm statistics do change."""
    x, y = shard
    optimizer = torch.optim.SGD(list(trainable.values()), lr=task.plan.lr)
    order, local = rng.child("order").torch(), rng.child("draws").torch(task.device)
    step, steps = 0, task.plan.steps(len(x))
    task.network.train()
    for _ in range(task.plan.epochs):
        permutation = torch.randperm(len(x), generator=order).to(task.device)
        for index in permutation.split(task.plan.batch):
            step += 1
            draws = method.draws(step / steps, hyper, task, local)
            loss = method.objective(trainable, frozen, (x[index], y[index]), draws, hyper, task)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def evaluate(task: Task, tensors: dict[str, Tensor], chunk: tuple[Tensor, Tensor]) -> tuple[int, float]:
    """Correct answers and summed cross-entropy on a chunk of the test set, BatchNorm in evaluation mode."""
    task.network.eval()
    logits = task.logits(tensors, chunk[0])
    correct = int((logits.argmax(1) == chunk[1]).sum())
    return correct, float(torch.nn.functional.cross_entropy(logits, chunk[1], reduction="sum"))
