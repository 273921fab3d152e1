"""FedZip: of each update the largest entries, in three clusters, in prefix codes.

Malekijoo, Fadaeieslam, Malekijou, Homayounfar, Alizadeh-Shabdiz, Rawassizadeh, "FedZip: A Compression Framework for
Communication-Efficient Federated Learning" (arXiv:2102.01593), by its code (`malekijoo/FedZip`, cefedaa). Two things
differ: biases and BatchNorm travel as float32, and a prefix code for three symbols takes 1, 2 and 2 bits, where that
code counts 1, 1 and 2, which no code can have (its Kraft sum is 1.25).

    top-z sparsification -> `largest`
    three clusters       -> `quantized`
    codes                -> the entropy coder of `fedlib.wire.codebook`; `prefix_lengths` is for the paper's count
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Local, Method, ServerState, Sizes, train_model
from fedlib.core.plan import Samples, Tensors
from fedlib.core.settings import choice, integer, number
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.methods.fedcompress import augmentation, clustering, messages
from fedlib.methods.fedcompress.messages import Form, Metered
from fedlib.methods.messages import largest
from fedlib.rng import Rng, Stream
from fedlib.wire import codebook


@dataclass(frozen=True, kw_only=True)
class FedZip(Method[Metered]):
    name = "fedzip"
    averages = True
    sections = messages.SECTIONS
    own_type = Metered

    # share of a tensor's entries, the largest by magnitude; the others are set to zero
    keep: float = number(0.2, 1e-6, 1)
    clusters: int = integer(3, 2, codebook.MOST)  # of a tensor, zeros among them
    steps: int = integer(4, 0, 1000)  # of Lloyd, from centroids evenly between least and largest entry
    decay: float = number(1e-4, 0, 1e12)  # this and the next as of FedCompress
    augment: str = choice("corner", *augmentation.KINDS)

    @property
    def down(self) -> Form:
        return Form(self, "down", {})

    @property
    def up(self) -> Form:
        return Form(self, "up", self.task.weights)

    @override
    def initial(self, rng: Rng) -> ServerState[Metered]:
        return self.metered(self.task.initial(), Metered())

    def metered(self, model: Tensors, before: Metered) -> ServerState[Metered]:
        return ServerState(model, before.then(self.down, self.down.pack(model), model))

    @override
    def broadcast(self, state: ServerState[Metered]) -> bytes:
        return self.down.pack(state.model)

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        """The weights of the start stay beside the model that is trained."""
        local = train_model(self.task, self.down.unpack(message)[0], len(shard[1]))
        local.frozen |= {f"from {name}": local.trainable[name].detach().clone() for name in self.task.weights}
        return local

    @override
    def draw(self, progress: float, stream: Stream) -> Tensor | None:
        return augmentation.draws(self.augment, self.task, stream)

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Tensor | None) -> Tensor:
        batch = augmentation.augmented(batch, drawn, self.augment)
        loss = self.task.loss(trainable | {name: frozen[name] for name in self.task.statistics}, batch)
        if self.decay:
            loss = loss + self.decay * sum(trainable[name].square().sum() for name in self.task.weights)
        return loss

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        """Of the weights their changes, in few values; all else as it is."""
        moved = {n: local.trainable[n].detach() - local.frozen[f"from {n}"] for n in self.task.weights}
        change = {name: self.quantized(tensor) for name, tensor in moved.items()}
        return self.up.pack(local.trainable | local.frozen | change, local.samples)

    def quantized(self, change: Tensor) -> Tensor:
        """The largest entries and zeros, by clusters. PayloadError where an entry is not finite."""
        sparse = largest(change, max(1, round(self.keep * change.numel())))
        line = clustering.Line.of(sparse)
        first = np.linspace(line.values[0], line.values[-1], self.clusters, dtype=np.float32)
        centroids = torch.from_numpy(clustering.lloyd(line, first, self.steps))
        return clustering.clustered(sparse, centroids.to(sparse.device))

    @override
    def aggregate(self, state: ServerState[Metered], uploads: Uploads) -> ServerState[Metered]:
        """Weights plus the mean of their changes, and the mean of all else, by samples."""
        rest = {name: state.model[name] for name in self.task.others}
        average = uploads.mean(self.read, self.task.tensors, rest)
        return self.metered(
            average | {name: state.model[name] + average[name] for name in self.task.weights}, state.own
        )

    def read(self, upload: Buffer) -> Update:
        tensors, _, samples = self.up.unpack(upload)
        return tensors, samples

    @override
    def notes(self, state: ServerState[Metered]) -> dict[str, dict[str, float]]:
        return state.own.notes()

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        """Prefix codes and centroids of the weights, and float32 of all else; codebooks with indexes of fixed width;
        and the update as a compressed file, as of FedCompress."""
        tensors, _ = self.read(upload)
        bits = 0.0
        for name, tensor in tensors.items():
            if name not in self.task.weights:
                bits += 32.0 * tensor.numel()
                continue
            _, counts = np.unique(tensor.numpy(), return_counts=True)
            bits += 32.0 * counts.size + float(np.dot(prefix_lengths(counts), counts))
        return Sizes(bits, {"fixed": self.up.fixed_bits(upload), "zip": self.up.zip_bits(upload, tensors)})


def prefix_lengths(counts: Sequence[int] | np.ndarray) -> list[int]:
    """Bits of each symbol in the best prefix code (Huffman, 1952), by how often they occur; one alone takes 0."""
    lengths = [0] * len(counts)
    heap = [(int(count), place, [place]) for place, count in enumerate(counts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, place, first), (b, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in first + second:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, place, first + second))
    return lengths
