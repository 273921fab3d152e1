"""Methods that send an update of the weights in few bits: what they share.

The client trains at w + u from u = 0, which is FedAvg's local training written for the update u [d], all weights in one
vector. A method says how u becomes bytes; biases, BatchNorm and its statistics travel in full precision beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import Shapes, State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.messages import NO_MORE, pack_model, pack_tensors, unpack_model, unpack_tensors
from fedlib.rng import Rng
from fedlib.wire import container

Section = bytes | np.ndarray
Encode = Callable[[Tensor, Any, Task, Rng], Sequence[Section]]
Decode = Callable[[Sequence[memoryview], Any, Task], Tensor]


def start(message: bytes, name: str, hyper: Any, task: Task, more: Shapes = NO_MORE) -> tuple[State, State]:
    """From the broadcast model: `u` = 0 and the other trainable tensors; frozen `w` [d], the statistics, and more."""
    model, _ = unpack_model(message, f"{name}.down", hyper, task, more)
    frozen = {name: model[name].to(task.device) for name in (*task.statistics, *more)}
    frozen["w"] = torch.cat([model[name].flatten() for name in task.weights]).to(task.device)
    trainable = {"u": torch.zeros_like(frozen["w"])} | {name: model[name].to(task.device) for name in task.vectors}
    return {name: tensor.requires_grad_() for name, tensor in trainable.items()}, frozen


def layers(flat: Tensor, task: Task) -> State:
    """A vector [d] as the weights' tensors by name (views)."""
    parts = flat.split([shape.numel() for shape in task.weights.values()])
    return {name: part.view(shape) for (name, shape), part in zip(task.weights.items(), parts, strict=True)}


def loss_at(effective: Tensor, trainable: State, frozen: State, batch: tuple[Tensor, Tensor], task: Task) -> Tensor:
    """Loss of the network with the weights `effective` [d]."""
    others = {name: trainable[name] for name in task.vectors} | {name: frozen[name] for name in task.statistics}
    return task.loss(layers(effective, task) | others, batch)


def pack_update(
    name: str, sections: Sequence[Section], trainable: State, frozen: State, samples: int, hyper: Any, task: Task
) -> bytes:
    """The upload: the method's sections, then all that is not a weight as float32."""
    full = pack_tensors(trainable | frozen, task.vectors | task.statistics)
    return container.pack(f"{name}.up", task.fingerprint(name, hyper), samples, [*sections, full])


def finite(u: Tensor) -> Tensor:
    """u, detached. PayloadError where it is not finite."""
    if not bool(torch.isfinite(u).all()):
        raise PayloadError("update u is not finite: local training diverged; lower the learning rate")
    return u.detach()


def read_update(upload: Buffer, name: str, sections: int, decode: Decode, hyper: Any, task: Task) -> tuple[State, int]:
    """The update [d] under the name `u`, what travelled in full precision, and the sample count."""
    others = task.vectors | task.statistics
    most = 64 + 4 * count(task.weights)  # no method sends more for a part; `decode` knows the exact size
    limits = [most] * sections + [4 * count(others)]
    read = container.unpack(upload, f"{name}.up", task.fingerprint(name, hyper), limits)
    return {"u": decode(read.sections[:-1], hyper, task)} | unpack_tensors(read.sections[-1], others), read.samples


def add_mean(
    state: State, uploads: Uploads, read: Callable[[Buffer], tuple[State, int]], task: Task, by_batches: bool = False
) -> State:
    """w + sum_k omega_k u_k, and the mean of the rest. omega_k is by samples, or by mini-batches."""
    mean = RunningMean({"u": torch.Size([count(task.weights)])} | task.vectors | task.statistics)
    for tensors, samples in uploads.read(read):
        mean.add(tensors, -(-samples // task.plan.batch) if by_batches else samples)
    average = mean.value()
    updates = layers(average.pop("u"), task)
    return {name: state[name] + update for name, update in updates.items()} | average


def method(name: str, sections: int, encode: Encode, decode: Decode) -> tuple[Callable[..., Any], ...]:
    """broadcast, start, draws, objective, finish, server and sent of a method that compresses u after local training.

    encode: u [d] -> `sections` byte sections. decode: the inverse, u as the server sees it; PayloadError.
    """

    def broadcast(state: State, hyper: Any, task: Task) -> bytes:
        return pack_model(f"{name}.down", state, 0, hyper, task)

    def begin(message: bytes, hyper: Any, task: Task, rng: Rng) -> tuple[State, State]:
        return start(message, name, hyper, task)

    def draws(progress: float, hyper: Any, task: Task, generator: torch.Generator) -> None:
        return None

    def objective(
        trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: None, hyper: Any, task: Task
    ) -> Tensor:
        return loss_at(frozen["w"] + trainable["u"], trainable, frozen, batch, task)

    def finish(trainable: State, frozen: State, samples: int, hyper: Any, task: Task, rng: Rng) -> bytes:
        coded = encode(finite(trainable["u"]), hyper, task, rng)
        return pack_update(name, coded, trainable, frozen, samples, hyper, task)

    def server(state: State, uploads: Uploads, hyper: Any, task: Task) -> State:
        return add_mean(state, uploads, lambda upload: read_update(upload, name, sections, decode, hyper, task), task)

    def sent(upload: Buffer, frozen: State, hyper: Any, task: Task) -> Tensor:
        return read_update(upload, name, sections, decode, hyper, task)[0]["u"]

    return broadcast, begin, draws, objective, finish, server, sent
