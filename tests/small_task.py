"""Tasks around networks that a test makes for itself, a client and a server on them, and plain torch to compare with.

No data, and no partition worth the name: tests hand a client its samples.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from known_answers import TINY
from torch import Tensor, nn

from fedlib.core import client
from fedlib.core.method import AnyMethod, Local, ServerState
from fedlib.core.plan import Plan, Samples, Tensors
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.data.partition import Partition
from fedlib.methods.update_codec import UpdateCodec
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.runs.spec import Spec

CPU = torch.device("cpu")
START = Rng(0)
NONE: Samples = (torch.zeros(0), torch.zeros(0))
# For `line_task`: x = 1 of class 0; three times x = 2 of class 1; weights of zero; what ends in no finite number
ONE: Samples = (torch.ones(1, 1), torch.tensor([0]))
THREE: Samples = (torch.full((3, 1), 2.0), torch.tensor([1, 1, 1]))
ZERO = {"weight": torch.zeros(3, 1)}
HUGE: Samples = (torch.full((1, 1), 1e30), torch.tensor([0]))


def make_task(network: nn.Module, plan: Plan) -> Task:
    nobody = Partition.of([np.arange(0)])
    return Task.of(network, plan=plan, train=NONE, test=NONE, partition=nobody, device=CPU)


def layers_task(*shapes: tuple[int, ...], batch: int = 4) -> Task:
    """Tensors of zeros of the given shapes, called "0", "1" and so on, and nothing else."""
    return make_task(nn.ParameterList(torch.zeros(shape) for shape in shapes), Plan(epochs=1, batch=batch, lr=0.1))


def line_task(lr: float = 0.3) -> Task:
    """Three weights and no bias, in one step a client."""
    return make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=lr))


@functools.cache
def digits_task(clients: int = 20, epochs: int = 3, batch: int = 16) -> Task:
    """A perceptron, on shards of 71 or 72 images each of twenty clients, or of 143 or 144 each of ten."""
    fields = {"clients": clients, "epochs": epochs, "batch": batch, "partition": {"kind": "iid", "seed": 0}}
    return build.task(Spec.from_dict(TINY | fields), CPU)


def convolutional(momentum: float = 0.1) -> nn.Sequential:  # of BatchNorm's running statistics
    """Weights 4 x 2 x 3 x 3 and 3 x 64; BatchNorm and a bias travel beside them."""
    torch.manual_seed(5)
    convolution = nn.Conv2d(2, 4, 3, bias=False)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def images(count: int, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def flat(model: Tensors, task: Task) -> Tensor:
    """All weights in one vector."""
    return torch.cat([model[name].flatten() for name in task.weights])


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def plain_training(
    network: nn.Module, shard: Samples, plan: Plan, rng: Rng, alive: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensors:
    """What FedAvg's client computes, as anybody would write it with torch alone; the batches are those of `rng`.

    alive: 0 where a weight has been pruned, whose gradient is cut, and 1 elsewhere.
    """
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=plan.lr)
    order = rng.child("order").stream()
    for _ in range(plan.epochs):
        permutation = order.permutation(len(shard[0]))
        for start in range(0, len(permutation), plan.batch):
            index = permutation[start : start + plan.batch]
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(network(shard[0][index]), shard[1][index]))
            for name, parameter in network.named_parameters():
                if name in alive and parameter.grad is not None:
                    parameter.grad.mul_(alive[name])
            optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


# A client and the server; without a model the task's own


def state_of(method: AnyMethod, model: Tensors | None = None) -> ServerState[Any]:
    initial: ServerState[Any] = method.initial(START)
    return initial if model is None else dataclasses.replace(initial, model=model)


def begun(method: AnyMethod, shard: Samples = NONE, rng: Rng = START, model: Tensors | None = None) -> Local:
    return method.begin(method.broadcast(state_of(method, model)), shard, rng)


def train(method: AnyMethod, local: Local, shard: Samples, rng: Rng) -> None:
    """Local training, in place."""
    member = client.Member(0, rng, shard, local, memory=None)
    for number, phase in enumerate(method.phases()):
        client.enter(member, number, phase)
        client.train(method, phase, [member])


def trained(method: AnyMethod, shard: Samples, rng: Rng, model: Tensors | None = None) -> Local:
    local = begun(method, shard, rng, model)
    train(method, local, shard, rng)
    return local


def uploaded(method: AnyMethod, shard: Samples, rng: Rng, model: Tensors | None = None) -> bytes:
    return method.upload(trained(method, shard, rng, model), NONE, rng)


def sent(method: AnyMethod, u: Tensor, samples: int = 1, rng: Rng = START, model: Tensors | None = None) -> bytes:
    """The upload of a client that has trained to the update `u` [d]."""
    local = begun(method, (torch.zeros(samples), torch.zeros(samples)), rng, model)
    local.trainable["u"] = u
    return method.upload(local, NONE, rng)


def served(method: AnyMethod, *messages: Buffer, model: Tensors | None = None) -> Tensors:
    """The new model."""
    return method.aggregate(state_of(method, model), Uploads(enumerate(messages))).model


def coded(method: UpdateCodec[Any], u: Tensor, rng: Rng = START) -> list[memoryview]:
    """An update's sections, as the server gets them."""
    return [memoryview(bytes(part)) for part in method.encode(u, begun(method), rng)]


def received(method: UpdateCodec[Any], u: Tensor, rng: Rng = START) -> Tensor:
    """An update as the server sees it."""
    return method.decode(coded(method, u, rng), None)
