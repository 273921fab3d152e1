"""Federated averaging: McMahan, Moore, Ramage, Hampson, Aguera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.

    Algorithm 1, ClientUpdate -> `start`, `objective` (with fedlib.core.client.train), `finish`
    Algorithm 1, server       -> `broadcast`, `server`

Every tensor of the model travels both ways as float32. BatchNorm statistics are averaged like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.methods.messages import pack_model, unpack_model
from fedlib.rng import Rng

SECTIONS = ("model",)


@dataclass(frozen=True)
class Hyper:
    """Nothing beyond the training plan."""


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    return pack_model("fedavg.down", state, 0, hyper, task)


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    model, _ = unpack_model(message, "fedavg.down", hyper, task)
    local = {name: tensor.to(task.device) for name, tensor in model.items()}
    trainable = {name: local[name].requires_grad_() for name in task.weights | task.vectors}
    return trainable, {name: local[name] for name in task.statistics}


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> None:
    return None


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: None, hyper: Hyper, task: Task
) -> Tensor:
    return task.loss(trainable | frozen, batch)


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    return pack_model("fedavg.up", trainable | frozen, samples, hyper, task)


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    mean = RunningMean(task.tensors)
    for tensors, samples in uploads.read(lambda upload: unpack_model(upload, "fedavg.up", hyper, task)):
        mean.add(tensors, samples)
    return mean.value()


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return 32.0 * count(task.tensors)
