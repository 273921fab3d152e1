"""A method's messages without its loop, for those who have a simulator of their own: an update in, bytes out, and back.

    codec = fedlib.Codec(network, "fedmrn", {"magnitude": 0.01})
    upload = codec.encode(update, seed=client)        # what a client would send
    update = codec.decode(upload)                     # what the server would read

The bytes are those that a run of this book sends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlib.core.method import ServerState
from fedlib.core.plan import Plan, flat
from fedlib.core.task import Task
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.data.partition import Partition
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.models import given
from fedlib.rng import Rng

NOBODY = 0  # the client whose upload stands alone
NO_UPDATES = ("fedcompress", "fedsparsify")  # their servers take means, of models that are pruned or clustered


class Codec:
    """Encodes updates of a network's tensors by a method whose server takes their mean."""

    def __init__(self, network: Any, method: str = "fedmrn", settings: Mapping[str, Any] | None = None) -> None:
        """network: a module, or a function that makes one; both sides must give the same. SpecError: a method whose
        messages are no updates, such as masks of fixed weights, or a value that it refuses."""
        self.network: nn.Module = given.given(network)(0, 0, 0, Rng(0))
        chosen = registry.make(method, dict(settings or {}))
        if not chosen.takes_mean() or method in NO_UPDATES:
            able = [name for name in sorted(registry.METHODS) if name not in NO_UPDATES]
            able = [name for name in able if registry.make(name, {}).takes_mean()]
            raise SpecError(f"method: {method} has no messages that are updates; use one of {', '.join(able)}")
        nothing = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
        names = {name for name, p in self.network.named_parameters() if not p.requires_grad}
        one = Partition.of([np.zeros(1, np.int64)])
        cpu = torch.device("cpu")
        task = Task.of(
            self.network, names, plan=Plan(1, 1, 1.0), train=nothing, test=nothing, partition=one, device=cpu
        )
        self.method = chosen.bind(task)
        first = self.method.initial(Rng(0))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in first.model.items()}
        self.state: ServerState[Any] = dataclasses.replace(first, model=zeros)

    @property
    def tensors(self) -> dict[str, torch.Size]:
        """Names and shapes of what an update holds: all that a method trains, and BatchNorm's statistics."""
        return {name: tensor.shape for name, tensor in self.state.model.items()}

    def encode(self, update: Mapping[str, Tensor], *, samples: int = 1, seed: int = 0) -> bytes:
        """A client's upload. update: by name, how much each tensor changes, float [shape]. samples: behind it, its
        weight in a mean. seed: of what is drawn, another one for each client and round.

        SpecError: a tensor that is missing, or of another shape. PayloadError: a value that is not finite.
        """
        task, rng = self.method.task, Rng(seed)
        for name, shape in self.tensors.items():
            if name not in update or update[name].shape != shape:
                found = list(update[name].shape) if name in update else "nothing"
                raise SpecError(f"update: {name} has {found}; expected {list(shape)}")
        local = self.method.begin(self.method.broadcast(self.state), task.train, rng)
        local.samples = samples
        own = {name: update[name].detach().float() for name in self.tensors}
        whole = own | {"u": flat(own, task.weights)} if "u" in local.trainable else own
        for part in (local.trainable, local.frozen):
            part.update({name: whole[name] for name in part if name in whole})
        return bytes(self.method.upload(local, task.held(NOBODY), rng))

    def decode(self, upload: bytes) -> dict[str, Tensor]:
        """The update as the server reads it. PayloadError: bytes that cannot be read."""
        uploads = Uploads([(NOBODY, upload)])
        try:
            new = self.method.aggregate(self.state, uploads)
        except NoUpdate:
            raise PayloadError(uploads.refused[0][1]) from None
        return {name: new.model[name] for name in self.tensors}
