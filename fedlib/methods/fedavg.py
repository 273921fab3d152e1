"""Federated averaging: McMahan, Moore, Ramage, Hampson, Aguera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.

    Algorithm 1, ClientUpdate -> `begin`, `loss` (with fedlib.core.client.train), `upload`
    Algorithm 1, server       -> `broadcast`, `aggregate`

Every tensor of the model travels both ways as float32. BatchNorm statistics are averaged like the rest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from fedlib.core.averaging import RunningMean
from fedlib.core.method import Draws, Local, Method, ServerState, train_model
from fedlib.core.plan import Samples, Tensors
from fedlib.core.uploads import Uploads
from fedlib.methods.messages import pack_broadcast, pack_model, unpack_broadcast, unpack_model
from fedlib.rng import Rng


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method[None]):
    """No settings beyond the training plan."""

    name = "fedavg"
    sections = ("model",)
    plain = True

    @override
    def broadcast(self, state: ServerState[None]) -> bytes:
        return pack_broadcast(self, state.model)

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        return train_model(self.task, unpack_broadcast(self, message), len(shard[1]))

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Draws) -> Tensor:
        return self.task.loss(trainable | frozen, batch)

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        return pack_model(self, local.trainable | local.frozen, local.samples)

    @override
    def aggregate(self, state: ServerState[None], uploads: Uploads) -> ServerState[None]:
        mean = RunningMean(self.task.tensors)
        for tensors, samples in uploads.read(lambda upload: unpack_model(self, upload)):
            mean.add(tensors, samples)
        return dataclasses.replace(state, model=mean.value())
