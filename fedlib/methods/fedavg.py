"""Federated averaging: McMahan, Moore, Ramage, Hampson, Aguera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.

    Algorithm 1, ClientUpdate -> `start`, `objective` (with fedlib.local.train), `finish`
    Algorithm 1, server       -> `broadcast`, `server`

Every tensor of the model travels both ways as float32. BatchNorm statistics are averaged like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlib.methods.parts import RunningMean, pack_tensors, unpack_tensors
from fedlib.rng import Rng
from fedlib.task import State, Task
from fedlib.uploads import Uploads
from fedlib.wire import container

SECTIONS = ("model",)


@dataclass(frozen=True)
class Hyper:
    """Nothing beyond the training plan."""


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    model = pack_tensors(state, task.tensors)
    return container.pack("fedavg.down", task.fingerprint("fedavg", hyper), 0, [model])


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    tensors, _ = _read(message, "fedavg.down", hyper, task)
    local = {name: tensor.to(task.device) for name, tensor in tensors.items()}
    trainable = {name: local[name].requires_grad_() for name in task.weights | task.vectors}
    return trainable, {name: local[name] for name in task.statistics}


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> None:
    return None


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], draws: None, hyper: Hyper, task: Task
) -> Tensor:
    return task.loss(trainable | frozen, batch)


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    model = pack_tensors(trainable | frozen, task.tensors)
    return container.pack("fedavg.up", task.fingerprint("fedavg", hyper), samples, [model])


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    mean = RunningMean(task.tensors)
    for tensors, samples in uploads.read(lambda upload: _read(upload, "fedavg.up", hyper, task)):
        mean.add(tensors, samples)
    return mean.value()


def paper_bits(upload: bytes, hyper: Hyper, task: Task) -> float:
    return 32.0 * sum(shape.numel() for shape in task.tensors.values())


def _read(message: bytes, kind: str, hyper: Hyper, task: Task) -> tuple[State, int]:
    size = 4 * sum(shape.numel() for shape in task.tensors.values())
    read = container.unpack(message, kind, task.fingerprint("fedavg", hyper), [size])
    return unpack_tensors(read.sections[0], task.tensors), read.samples
