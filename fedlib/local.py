"""What happens at a client: start from the broadcast, train on the shard, finish with an upload. Written once."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlib import methods
from fedlib.errors import PayloadError
from fedlib.rng import Rng
from fedlib.task import State, Task

if TYPE_CHECKING:
    from fedlib.spec import Spec

CHUNK = 500  # test images evaluated at once; sums are formed chunk by chunk


def run_client(spec: Spec, task: Task, message: bytes, round: int, client_id: int) -> bytes | PayloadError:
    """One client's part in a round; its randomness is named after both. What cannot be sent comes back as its error."""
    method, hyper = methods.METHODS[spec.method], methods.hyper(spec.method, spec.hyper)
    rng = Rng(spec.seed).child("client", round, client_id)
    try:
        return client(method, message, task.shard(client_id), hyper, task, rng)
    except PayloadError as error:
        return error


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
    parameters = list(trainable.values())
    order, local = rng.child("order").torch(), rng.child("draws").torch(task.device)
    step, steps = 0, task.plan.steps(len(x))
    task.network.train()
    for _ in range(task.plan.epochs):
        permutation = torch.randperm(len(x), generator=order).to(task.device)
        for index in permutation.split(task.plan.batch):
            step += 1
            draws = method.draws(step / steps, hyper, task, local)
            loss = method.objective(trainable, frozen, (x[index], y[index]), draws, hyper, task)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():  # what torch.optim.SGD does, without its bookkeeping
                torch._foreach_add_(parameters, gradients, alpha=-task.plan.lr)


@torch.no_grad()
def evaluate(task: Task, state: State, chunk: int) -> tuple[int, float, int]:
    """Correct answers, summed cross-entropy and images of a chunk of the test set; BatchNorm in evaluation mode."""
    task.network.eval()
    x, y = (part[chunk * CHUNK : (chunk + 1) * CHUNK] for part in task.test)
    logits = task.logits({name: tensor.to(task.device) for name, tensor in state.items()}, x)
    correct = int((logits.argmax(1) == y).sum())
    return correct, float(torch.nn.functional.cross_entropy(logits, y, reduction="sum")), len(x)


def chunks(task: Task) -> range:
    return range(-(-len(task.test[1]) // CHUNK))
