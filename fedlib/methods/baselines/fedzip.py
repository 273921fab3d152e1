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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import require_name, require_number
from fedlib.methods.fedcompress import augmentation, clustering, messages
from fedlib.rng import Rng
from fedlib.wire import codebook

SECTIONS = messages.SECTIONS


@dataclass(frozen=True)
class Hyper:
    keep: float = 0.2  # share of a tensor's entries, the largest by magnitude; the others are set to zero
    clusters: int = 3  # of a tensor, zeros among them
    steps: int = 4  # of Lloyd, from centroids evenly between least and largest entry
    decay: float = 1e-4  # this and the next as of FedCompress
    augment: str = "corner"

    def __post_init__(self) -> None:
        require_number("hyper.keep", self.keep, 1e-6, 1)
        require_number("hyper.clusters", self.clusters, 2, codebook.MOST, integer=True)
        require_number("hyper.steps", self.steps, 0, 1000, integer=True)
        require_number("hyper.decay", self.decay, 0, 1e12)
        require_name("hyper.augment", self.augment, augmentation.KINDS)


def initial(hyper: Hyper, task: Task, rng: Rng) -> State:
    return measured(task.initial(), hyper, task)


def measured(state: State, hyper: Hyper, task: Task) -> State:
    """With the bits of its broadcast, for the record."""
    found = messages.Form.of("fedzip.down", {}, hyper, task).bits(broadcast(state, hyper, task), state, task)
    return state | {"bits": torch.tensor(found, dtype=torch.float64)}


def models(state: State, hyper: Hyper, task: Task, rng: Rng) -> list[State]:
    return [{name: state[name] for name in task.tensors}]


def form(hyper: Hyper, task: Task) -> messages.Form:
    """Of an upload."""
    return messages.Form.of("fedzip.up", task.weights, hyper, task)


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    return messages.Form.of("fedzip.down", {}, hyper, task).pack(state)


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    """Trained is the model itself; frozen stand its statistics, and the weights of the start."""
    model, _, _ = messages.Form.of("fedzip.down", {}, hyper, task).unpack(message)
    local = {name: tensor.to(task.device) for name, tensor in model.items()}
    frozen = {name: local[name] for name in task.statistics}
    frozen |= {f"from {name}": local[name].clone() for name in task.weights}
    return {name: local[name].requires_grad_() for name in task.weights | task.vectors}, frozen


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> Tensor | None:
    return augmentation.draws(hyper.augment, task, generator)


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: Tensor | None, hyper: Hyper, task: Task
) -> Tensor:
    batch = augmentation.augmented(batch, drawn, hyper.augment)
    loss = task.loss(trainable | {name: frozen[name] for name in task.statistics}, batch)
    if hyper.decay:
        loss = loss + hyper.decay * sum(trainable[name].square().sum() for name in task.weights)
    return loss


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    """Of the weights their changes, in few values; all else as it is."""
    change = {name: quantized(trainable[name].detach() - frozen[f"from {name}"], hyper) for name in task.weights}
    return form(hyper, task).pack(trainable | frozen | change, samples)


def quantized(change: Tensor, hyper: Hyper) -> Tensor:
    """The largest entries and zeros, by clusters. PayloadError where an entry is not finite."""
    sparse = largest(change, hyper.keep)
    line = clustering.Line.of(sparse)
    first = np.linspace(line.values[0], line.values[-1], hyper.clusters, dtype=np.float32)
    return clustering.clustered(sparse, torch.from_numpy(clustering.lloyd(line, first, hyper.steps)).to(sparse.device))


def largest(change: Tensor, keep: float) -> Tensor:
    """All but the share `keep` of the entries, the largest by magnitude, set to zero; at least one stays."""
    kept = torch.topk(change.abs().flatten(), max(1, round(keep * change.numel()))).indices
    flat = change.flatten()
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(change)


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    """Weights plus the mean of their changes, and the mean of all else, by samples."""
    mean = RunningMean(task.tensors)
    for tensors, samples in uploads.read(lambda upload: read_upload(upload, hyper, task)):
        mean.add(tensors, samples)
    average = mean.value()
    new = average | {name: state[name] + average[name] for name in task.weights}
    return measured(new, hyper, task) | {"sent": state["bits"]}


def read_upload(upload: Buffer, hyper: Hyper, task: Task) -> tuple[State, int]:
    tensors, _, samples = form(hyper, task).unpack(upload)
    return tensors, samples


def notes(state: State, hyper: Hyper, task: Task) -> dict[str, Any]:
    return dict(messages.noted(state))


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    """Prefix codes and centroids of the weights, and float32 of all else."""
    tensors, _ = read_upload(upload, hyper, task)
    bits = 0.0
    for name, tensor in tensors.items():
        if name not in task.weights:
            bits += 32.0 * tensor.numel()
            continue
        _, counts = np.unique(tensor.numpy(), return_counts=True)
        bits += 32.0 * counts.size + float(np.dot(prefix_lengths(counts), counts))
    return bits


def other_bits(upload: Buffer, hyper: Hyper, task: Task) -> dict[str, float]:
    """Codebooks with indexes of fixed width; and the update as a compressed file, as of FedCompress."""
    fixed = form(hyper, task).fixed_bits(upload)
    return {"fixed": fixed, "zip": messages.zip_bits(read_upload(upload, hyper, task)[0], task)}


def prefix_lengths(counts: Sequence[int] | np.ndarray) -> list[int]:
    """Bits of each symbol in the best prefix code (Huffman, 1952), for symbols that occur so often; one alone takes 0.

    ValueError where a count is not positive.
    """
    if not len(counts) or min(counts) < 1:
        raise ValueError(f"counts: {list(counts)}, expected positive numbers")
    lengths = [0] * len(counts)
    heap = [(int(count), place, [place]) for place, count in enumerate(counts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, place, first), (b, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in first + second:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, place, first + second))
    return lengths
