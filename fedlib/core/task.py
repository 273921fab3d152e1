"""What the server and every client have agreed on before the first round: network, data, partition, training plan."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlib.data import partition, sets, sources
from fedlib.models.freezing import frozen_names
from fedlib.models.registry import build
from fedlib.rng import Rng

if TYPE_CHECKING:
    from fedlib.methods.model_codec import Downlink
    from fedlib.runs.spec import Spec

from fedlib.core.loss import cross_entropy
from fedlib.core.plan import Plan, State


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
    train: tuple[Tensor, Tensor]  # x float32 [n, channels, side, side], y int64 [n]
    test: tuple[Tensor, Tensor]
    partition: partition.Partition
    device: torch.device
    held_out: float = 0.0
    cohort: int = 1  # clients that a round asks for, or expects
    frozen: dict[str, torch.Size] = dataclasses.field(default_factory=dict)
    downlink: Downlink | None = None  # another method's way to write the broadcast model
    stages: dict[Any, tuple[Task, ...]] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, spec: Spec, device: torch.device) -> Task:
        dataset = _load(spec.data, device)
        (_, channels, side, _), classes = dataset.train_x.shape, len(dataset.classes)
        network = build(spec.model, channels, side, classes, Rng(spec.seed)).to(device)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # a counter that nothing here reads
        parameters = {name: p.shape for name, p in network.named_parameters()}
        frozen = frozen_names(spec.frozen, parameters, "frozen")
        for name in frozen:
            network.get_parameter(name).requires_grad_(False)
        trained = {name: shape for name, shape in parameters.items() if name not in frozen}
        return cls(
            network=network,
            frozen={name: parameters[name] for name in parameters if name in frozen},
            weights={name: shape for name, shape in trained.items() if len(shape) > 1},
            vectors={name: shape for name, shape in trained.items() if len(shape) == 1},
            statistics={name: b.shape for name, b in network.named_buffers()},
            plan=Plan(spec.epochs, spec.batch, spec.lr, spec.optimizer, spec.persistent, spec.momentum),
            train=(dataset.train_x, dataset.train_y),
            test=(dataset.test_x, dataset.test_y),
            partition=partition.make(
                dataset.train_y.cpu().numpy(), spec.clients, owners=dataset.owners, **spec.partition
            ),
            device=device,
            cohort=spec.cohort,
            held_out=spec.held_out,
        )

    @functools.cached_property
    def parameters(self) -> dict[str, torch.Size]:
        """Weights and vectors in the network's order, each layer's bias after its weights."""
        return {name: p.shape for name, p in self.network.named_parameters() if name not in self.frozen}

    @property
    def tensors(self) -> dict[str, torch.Size]:
        """All tensors of the model that may change: weights, vectors, statistics."""
        return self.weights | self.vectors | self.statistics

    def initial(self) -> State:
        """The model before the first round, on the CPU (where the server works)."""
        own = self.network.state_dict()
        return {name: own[name].detach().cpu().clone() for name in self.tensors}

    def shard(self, client: int) -> tuple[Tensor, Tensor]:
        """Client's training samples, on the device: x [n, channels, side, side], y [n]."""
        return self._samples(self.indices(client))

    def held(self, client: int) -> tuple[Tensor, Tensor]:
        """The samples that it does not train on."""
        return self._samples(self._split(client)[1])

    def indices(self, client: int) -> np.ndarray:
        """Places of a client's training samples in `train`, int64."""
        return self._split(client)[0]

    def _split(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        indices = self.partition.indices(client)
        if not self.held_out:
            return indices, indices[:0]
        # Shuffled first: some partitions deal class by class.
        order = np.random.RandomState(Rng(int(self.partition.hash, 16)).child("held out", client).seed() % 2**32)
        indices = indices[order.permutation(len(indices))]
        kept = len(indices) - int(self.held_out * len(indices))
        return indices[:kept], indices[kept:]

    def _samples(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(indices).to(self.device)
        return self.train[0][index], self.train[1][index]

    def logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's output [n, classes] with the given tensors in place of its own; frozen ones are its own."""
        return functional_call(self.network, dict(tensors), (x,))

    def loss(self, tensors: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch in training mode; BatchNorm updates the given statistics in place."""
        return cross_entropy(self.logits(tensors, batch[0]), batch[1], "mean")

    def fingerprint(self, method: str, hyper: Any) -> bytes:
        """8 bytes that differ whenever a message could not be read right: other model, frozen values, method or
        hyper-parameters."""
        layout = [(name, list(shape)) for name, shape in self.tensors.items()]
        text = json.dumps([method, dataclasses.asdict(hyper), layout, self.frozen_digest])
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    @functools.cached_property
    def frozen_digest(self) -> str:
        """Of the frozen tensors' names and values, so that sides with different ones do not misread each other."""
        digest = hashlib.blake2b(digest_size=8)
        for name in self.frozen:
            digest.update(name.encode() + self.network.get_parameter(name).detach().cpu().numpy().tobytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _load(name: str, device: torch.device) -> sets.Dataset:
    d = sources.load(name)
    # Fastest for convolutions on a CPU; the last bits of a result depend on the layout, so it is always this one.
    images = {k: getattr(d, k).to(device, memory_format=torch.channels_last) for k in ("train_x", "test_x")}
    return dataclasses.replace(d, **images, train_y=d.train_y.to(device), test_y=d.test_y.to(device))
