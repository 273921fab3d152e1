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

from fedlib.core.method import Draws, Local, Method, ServerState, train_model
from fedlib.core.plan import Samples, Tensors, count
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.methods.messages import pack_broadcast, pack_tensors, unpack_broadcast, unpack_tensors
from fedlib.rng import Rng
from fedlib.wire import container


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method[None]):
    """No settings beyond the training plan."""

    name = "fedavg"
    sections = ("model",)
    plain = True
    averages = True

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
        model = pack_tensors(local.trainable | local.frozen, self.task.tensors)
        return container.pack("fedavg.up", self.fingerprint(), local.samples, [model])

    @override
    def aggregate(self, state: ServerState[None], uploads: Uploads) -> ServerState[None]:
        return dataclasses.replace(state, model=uploads.mean(self.read, self.task.tensors, state.model))

    def read(self, upload: Buffer) -> Update:
        """The client's model. PayloadError: an upload that cannot be read."""
        shapes = self.task.tensors
        read = container.unpack(upload, "fedavg.up", self.fingerprint(), [4 * count(shapes)])
        return unpack_tensors(read.sections[0], shapes), read.samples
