"""FedSparsify on layers made for the purpose: what its test files share."""

from typing import Any

import numpy as np
import small_task
import torch
from torch import Tensor, nn

from fedlib.core import client
from fedlib.core.client import Member
from fedlib.core.method import Local, Phase, ServerState
from fedlib.core.plan import Plan, Samples, Tensors
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.methods.baselines.fedsparsify import FedSparsify
from fedlib.rng import Rng
from fedlib.wire import container

NONE: Samples = (torch.zeros(0), torch.zeros(0))


def layers_task(*shapes: tuple[int, ...]) -> Task:
    """Weights of the given shapes and nothing else."""
    task = small_task.make_task(nn.Sequential(), Plan(epochs=1, batch=4, lr=0.1))
    task.weights.update({str(index): torch.Size(shape) for index, shape in enumerate(shapes)})
    return task


def convolutional(plan: Plan, **settings: Any) -> FedSparsify:
    """72 weights, BatchNorm, 192 weights, a bias."""
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )
    return FedSparsify(**settings).bind(small_task.make_task(network, plan))


def images(count: int, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def flat(model: Tensors, task: Task) -> Tensor:
    return torch.cat([model[name].flatten() for name in task.weights])


def broadcast(method: FedSparsify, model: Tensors) -> bytes:
    return method.broadcast(ServerState(model, None))


def begun(method: FedSparsify, model: Tensors, samples: int = 1) -> Local:
    return method.begin(broadcast(method, model), (torch.zeros(samples), torch.zeros(samples)), Rng(0))


def trained(method: FedSparsify, model: Tensors, shard: Samples, rng: Rng) -> Local:
    member = Member(0, rng, shard, method.begin(broadcast(method, model), shard, rng), None)
    client.train(method, Phase(method.task.plan), [member])
    return member.local


def uploaded(method: FedSparsify, model: Tensors, shard: Samples, rng: Rng) -> bytes:
    return method.upload(trained(method, model, shard, rng), NONE, rng)


def sent(method: FedSparsify, model: Tensors, weights: list[float], samples: int) -> bytes:
    """The upload of a client whose weights, pruned ones included, have become the given ones."""
    local = begun(method, model, samples)
    local.trainable["u"] = torch.tensor(weights) - local.frozen["w"]
    return method.upload(local, NONE, Rng(0))


def served(method: FedSparsify, model: Tensors, *messages: Buffer) -> Tensors:
    return method.aggregate(ServerState(model, None), Uploads(enumerate(messages))).model


def values_of(method: FedSparsify, upload: bytes) -> list[float]:
    read = container.unpack(upload, "fedsparsify.up", method.fingerprint(), [10**6] * 2)
    found: list[float] = np.frombuffer(read.sections[0], "<f4").tolist()
    return found


# Six weights in two layers, of which the second and the fifth have been pruned
TASK = layers_task((2, 2), (1, 2))
MODEL = {"0": torch.tensor([[0.5, 0.0], [-0.25, 2.0]]), "1": torch.tensor([[0.0, -1.0]])}
HALF, ALL = FedSparsify(keep=0.5, density=0.1).bind(TASK), FedSparsify(keep=1.0).bind(TASK)
