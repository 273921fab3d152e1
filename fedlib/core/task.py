"""What the server and every client have agreed on before the first round: network, data, partition, training plan."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlib.core.plan import Plan, Samples, Tensors
from fedlib.data import partition
from fedlib.data.objective import CLASSIFICATION, Objective
from fedlib.rng import Rng

# In which the products of convolutions and linear layers are formed.
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Task:
    """Shapes are by name, in the network's order; `weights` are matrices and kernels, `vectors` the other trainable
    tensors (BatchNorm scale and shift, biases), `statistics` BatchNorm's running mean and variance. `frozen` parameters
    keep the values that the network has from the seed: no method trains or sends them, or knows of them."""

    network: nn.Module
    weights: dict[str, torch.Size]
    vectors: dict[str, torch.Size]
    statistics: dict[str, torch.Size]
    plan: Plan
    train: Samples  # x float32 [n, channels, side, side], y int64 [n]; own data may have other shapes and types
    test: Samples
    partition: partition.Partition
    device: torch.device
    held_out: float = 0.0
    cohort: int = 1  # clients that a round asks for, or expects
    frozen: dict[str, torch.Size] = dataclasses.field(default_factory=dict)
    objective: Objective = CLASSIFICATION
    precision: str = PRECISIONS[0]  # of products in the network; weights, gradients and sums are float32 always

    @classmethod
    def of(cls, network: nn.Module, frozen: Collection[str] = (), **agreed: Any) -> Task:
        """The task of a network, some of whose parameters are frozen; `agreed`: the fields that are not its shapes."""
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.num_batches_tracked = None  # a counter that nothing here reads
        parameters = {name: p.shape for name, p in network.named_parameters()}
        for name in frozen:
            network.get_parameter(name).requires_grad_(False)
        trained = {name: shape for name, shape in parameters.items() if name not in frozen}
        return cls(
            network=network,
            frozen={name: shape for name, shape in parameters.items() if name in frozen},
            weights={name: shape for name, shape in trained.items() if len(shape) > 1},
            vectors={name: shape for name, shape in trained.items() if len(shape) < 2},
            statistics=_statistics(network),
            **agreed,
        )

    @functools.cached_property
    def parameters(self) -> dict[str, torch.Size]:
        """Weights and vectors in the network's order, each layer's bias after its weights."""
        return {name: p.shape for name, p in self.network.named_parameters() if name not in self.frozen}

    @property
    def tensors(self) -> dict[str, torch.Size]:
        """All tensors of the model that may change: weights, vectors, statistics."""
        return self.weights | self.vectors | self.statistics

    @property
    def others(self) -> dict[str, torch.Size]:
        """All that is not a weight."""
        return self.vectors | self.statistics

    def initial(self) -> Tensors:
        """The model before the first round, on the CPU (where the server works)."""
        own = self.network.state_dict()
        return {name: own[name].detach().cpu().clone() for name in self.tensors}

    def shard(self, client: int) -> Samples:
        """Client's training samples, on the device: x [n, channels, side, side], y [n]."""
        return self._samples(self.indices(client))

    def held(self, client: int) -> Samples:
        """The samples that it does not train on."""
        return self._samples(self._split(client)[1])

    def indices(self, client: int) -> np.ndarray:
        """Places of a client's training samples in `train`, int64."""
        return self._split(client)[0]

    def count_samples(self, client: int) -> int:
        """Of a client's training; the most that its upload may stand for."""
        return len(self._split(client)[0])

    def _split(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        indices = self.partition.indices(client)
        if not self.held_out:
            return indices, indices[:0]
        # Shuffled first: some partitions deal class by class.
        order = np.random.RandomState(Rng(int(self.partition.hash, 16)).child("held out", client).seed() % 2**32)
        indices = indices[order.permutation(len(indices))]
        kept = len(indices) - int(self.held_out * len(indices))
        return indices[:kept], indices[kept:]

    def _samples(self, indices: np.ndarray) -> Samples:
        index = torch.from_numpy(indices).to(self.device)
        return self.train[0][index], self.train[1][index]

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's output, mostly [n, classes], by the given tensors; frozen ones are its own."""
        if self.precision == PRECISIONS[0]:
            return functional_call(self.network, dict(tensors), (x,))
        # No cache of rounded weights: here each is used once, and a cache outlives the graphs that a GPU captures.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            return functional_call(self.network, dict(tensors), (x,)).float()

    def loss(self, tensors: Mapping[str, Tensor], batch: Samples) -> Tensor:
        """Of a batch in training mode; BatchNorm updates the given statistics in place."""
        return self.objective.train(self.logits(tensors, batch[0]), batch[1])

    def fingerprint(self, method: str, settings: dict[str, Any]) -> bytes:
        """8 bytes that differ whenever a message could not be read right: other model, frozen values, method or
        settings."""
        layout = [(name, list(shape)) for name, shape in self.tensors.items()]
        text = json.dumps([method, settings, layout, self.frozen_digest])
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    @functools.cached_property
    def frozen_digest(self) -> str:
        """Of the frozen tensors' names and values, so that sides with different ones do not misread each other."""
        digest = hashlib.blake2b(digest_size=8)
        for name in self.frozen:
            digest.update(name.encode() + self.network.get_parameter(name).detach().cpu().numpy().tobytes())
        return digest.hexdigest()


def _statistics(network: nn.Module) -> dict[str, torch.Size]:
    """Running means and variances, in the network's order; its other buffers are constants of it."""
    own = {
        f"{place}.{name}" if place else name: buffer.shape
        for place, module in network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if isinstance(module, nn.modules.batchnorm._NormBase)
    }
    return {name: own[name] for name, _ in network.named_buffers() if name in own}
