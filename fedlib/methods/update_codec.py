"""Methods that send an update of the weights in few bits: what they share.

The client trains at w + u from u = 0, which is FedAvg's local training written for the update u [d], all weights in one
vector. A method says how u becomes bytes; biases, BatchNorm and its statistics travel in full precision beside it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Draws, Local, Method, Own, ServerState
from fedlib.core.plan import Samples, Shapes, Tensors, all_finite, count, flat, layers
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.messages import NO_MORE, pack_broadcast, pack_tensors, unpack_broadcast, unpack_tensors
from fedlib.rng import Rng
from fedlib.wire import container

Section = bytes | np.ndarray


@dataclass(frozen=True, kw_only=True)
class UpdateCodec(Method[Own], Generic[Own]):
    """Compresses u after local training; `sections` names what `encode` gives, then "full precision"."""

    plain = True
    averages = True
    feeds_back = True

    @abc.abstractmethod
    def encode(self, u: Tensor, local: Local, rng: Rng) -> Sequence[Section]:
        """u [d] as byte sections."""

    @abc.abstractmethod
    def decode(self, sections: Sequence[memoryview], own: Own) -> Tensor:
        """The inverse, u as the server sees it, on the CPU. PayloadError: sections that cannot be read."""

    def own_of(self, local: Local) -> Own:
        """The method's own part of the server's state, as far as a client knows it."""
        return cast(Own, None)

    def weight(self, samples: int) -> int:
        """omega_k, up to a factor that is the same for all clients."""
        return samples

    @override
    def broadcast(self, state: ServerState[Own]) -> bytes:
        return pack_broadcast(self, state.model)

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        return start(self.task, unpack_broadcast(self, message), len(shard[1]))

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Draws) -> Tensor:
        return loss_at(self.task, frozen["w"] + trainable["u"], trainable, frozen, batch)

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        coded = self.encode(finite(local.trainable["u"]), local, rng)
        full = pack_tensors(local.trainable | local.frozen, self.task.others)
        return container.pack(f"{self.name}.up", self.fingerprint(), local.samples, [*coded, full])

    @override
    def aggregate(self, state: ServerState[Own], uploads: Uploads) -> ServerState[Own]:
        """w + sum_k omega_k u_k, and the mean of the rest."""
        shapes = {"u": torch.Size([count(self.task.weights)])} | self.task.others
        rest = {name: state.model[name] for name in self.task.others}
        average = uploads.mean(lambda upload: self.read(upload, state.own), shapes, rest, self.weight)
        return self.move(state, average.pop("u"), average)

    def move(self, state: ServerState[Own], step: Tensor, others: Tensors) -> ServerState[Own]:
        """The weights moved by a step [d], beside all else as it has become."""
        steps = layers(step, self.task.weights)
        return dataclasses.replace(state, model={name: state.model[name] + steps[name] for name in steps} | others)

    def read(self, upload: Buffer, own: Own) -> Update:
        """The update [d] under the name `u`, what travelled in full precision, and the sample count."""
        most = 64 + 4 * count(self.task.weights)  # no method sends more for a part; `decode` knows the exact size
        limits = [most] * (len(self.sections) - 1) + [4 * count(self.task.others)]
        read = container.unpack(upload, f"{self.name}.up", self.fingerprint(), limits)
        *coded, full = read.sections
        return {"u": self.decode(coded, own)} | unpack_tensors(full, self.task.others), read.samples

    @override
    def sent(self, upload: Buffer, local: Local) -> Tensor:
        return self.read(upload, self.own_of(local))[0]["u"]


def start(task: Task, model: Tensors, samples: int, more: Shapes = NO_MORE) -> Local:
    """Trained are `u` = 0 and the vectors; frozen are `w` [d], the statistics, and more of the model's tensors."""
    frozen = {name: model[name].to(task.device) for name in (*task.statistics, *more)}
    frozen["w"] = flat(model, task.weights).to(task.device)
    trainable = {"u": torch.zeros_like(frozen["w"])} | {name: model[name].to(task.device) for name in task.vectors}
    return Local({name: tensor.requires_grad_() for name, tensor in trainable.items()}, frozen, samples)


def loss_at(task: Task, effective: Tensor, trainable: Tensors, frozen: Tensors, batch: Samples) -> Tensor:
    """Loss of the network with the weights `effective` [d]."""
    rest = {name: trainable[name] for name in task.vectors} | {name: frozen[name] for name in task.statistics}
    return task.loss(layers(effective, task.weights) | rest, batch)


def finite(u: Tensor) -> Tensor:
    """u, detached. PayloadError where it is not finite."""
    if not all_finite(u):
        raise PayloadError("update u is not finite: local training diverged; lower the learning rate")
    return u.detach()
