"""FedSparsify: Stripelis, Gupta, Ver Steeg, Ambite, "Federated Progressive Sparsification (Purge, Merge, Tune)+",
arXiv 2204.12430. Its abstract alone was at hand; the settings are ours.

    purge: the server prunes the smallest weights of the mean model, all layers together -> `prune`
    tune: clients train the weights that are left -> `objective`
    merge: they send these weights' values, whose positions the server knows -> `finish`, `server`

A round keeps the share `keep` of the weights that are left, until `density` of them remain. Pruned weights are zero and
stay zero; the broadcast says which they are, so that both directions shrink.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError, require_number
from fedlib.methods import update_codec
from fedlib.methods.messages import pack_tensors, unpack_tensors
from fedlib.rng import Rng
from fedlib.wire import container, entropy, floats

SECTIONS = ("values", "full precision")


@dataclass(frozen=True)
class Hyper:
    keep: float = 0.8  # share of the weights left that outlives a round
    density: float = 1 / 32  # share of all weights at which pruning ends: one bit a weight

    def __post_init__(self) -> None:
        require_number("hyper.keep", self.keep, 1e-3, 1)
        require_number("hyper.density", self.density, 1e-6, 1)


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    w = torch.cat([state[name].flatten() for name in task.weights]).numpy()
    full = pack_tensors(state, task.vectors | task.statistics)
    sections: list[update_codec.Section] = [entropy.encode(w != 0, 2), floats.encode([w[w != 0]], ["weights"]), full]
    return container.pack("fedsparsify.down", task.fingerprint("fedsparsify", hyper), 0, sections)


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    d, others = count(task.weights), task.vectors | task.statistics
    limits = [64 + d, 4 * d, 4 * count(others)]
    read = container.unpack(message, "fedsparsify.down", task.fingerprint("fedsparsify", hyper), limits)
    alive = torch.from_numpy(entropy.decode(read.sections[0], d, 2) > 0)
    w = torch.zeros(d)
    w[alive] = _values(read.sections[1], int(alive.sum()))
    rest = {name: tensor.to(task.device) for name, tensor in unpack_tensors(read.sections[2], others).items()}
    trainable = {"u": torch.zeros_like(w, device=task.device)} | {name: rest[name] for name in task.vectors}
    frozen = {name: rest[name] for name in task.statistics}
    frozen |= {"w": w.to(task.device), "alive": alive.to(task.device, torch.float32)}
    return {name: tensor.requires_grad_() for name, tensor in trainable.items()}, frozen


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> None:
    return None


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: None, hyper: Hyper, task: Task
) -> Tensor:
    effective = frozen["w"] + frozen["alive"] * trainable["u"]  # no gradient reaches a pruned weight
    return update_codec.loss_at(effective, trainable, frozen, batch, task)


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    values = (frozen["w"] + update_codec.finite(trainable["u"]))[frozen["alive"] > 0]
    coded = floats.encode([values.cpu().numpy()], ["weights"])
    return update_codec.pack_update("fedsparsify", [coded], trainable, frozen, samples, hyper, task)


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    w = torch.cat([state[name].flatten() for name in task.weights])
    alive = w != 0
    left, others = int(alive.sum()), task.vectors | task.statistics

    def read(upload: Buffer) -> tuple[State, int]:
        limits = [4 * left, 4 * count(others)]
        found = container.unpack(upload, "fedsparsify.up", task.fingerprint("fedsparsify", hyper), limits)
        rest = unpack_tensors(found.sections[1], others)
        return {"values": _values(found.sections[0], left)} | rest, found.samples

    mean = RunningMean({"values": torch.Size([left])} | others)
    for tensors, samples in uploads.read(read):
        mean.add(tensors, samples)
    average = mean.value()
    values = prune(average.pop("values"), max(1, int(max(left * hyper.keep, len(w) * hyper.density))))
    return update_codec.layers(torch.zeros_like(w).masked_scatter_(alive, values), task) | average


def prune(values: Tensor, left: int) -> Tensor:
    """The values, all but the `left` largest by magnitude set to zero."""
    if left >= len(values):
        return values
    keep = torch.topk(values.abs(), left).indices
    return torch.zeros_like(values).index_copy_(0, keep, values[keep])


def _values(section: memoryview, left: int) -> Tensor:
    if len(section) != 4 * left:
        raise PayloadError(f"values: {len(section) // 4} weights, but {left} are left")
    return torch.from_numpy(floats.decode(section, [(left,)], ["weights"])[0].copy())


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return 8.0 * container.section_sizes(upload)[0]
