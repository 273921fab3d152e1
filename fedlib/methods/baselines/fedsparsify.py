"""FedSparsify: Stripelis, Gupta, Ver Steeg, Ambite, "Federated Progressive Sparsification (Purge, Merge, Tune)+",
arXiv 2204.12430. Its abstract alone was at hand; the settings are ours.

    purge: the server prunes the smallest weights of the mean model, all layers together -> `largest`
    tune: clients train the weights that are left -> `loss`
    merge: they send these weights' values, whose positions the server knows -> `upload`, `aggregate`

A round keeps the share `keep` of the weights that are left, until `density` of them remain. Pruned weights are zero and
stay zero; the broadcast says which they are, so that both directions shrink.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Draws, Local, Method, ServerState, Sizes
from fedlib.core.plan import Samples, Tensors, count, flat, layers
from fedlib.core.settings import number
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.messages import largest, pack_tensors, unpack_tensors
from fedlib.methods.update_codec import Section, finite, loss_at, start
from fedlib.rng import Rng
from fedlib.wire import container, entropy, floats


@dataclass(frozen=True, kw_only=True)
class FedSparsify(Method[None]):
    name = "fedsparsify"
    averages = True
    sections = ("values", "full precision")

    keep: float = number(0.8, 1e-3, 1)  # share of the weights left that outlives a round
    density: float = number(1 / 32, 1e-6, 1)  # share of all weights at which pruning ends: one bit a weight

    @override
    def broadcast(self, state: ServerState[None]) -> bytes:
        w, full = flat(state.model, self.task.weights).numpy(), pack_tensors(state.model, self.task.others)
        sections: list[Section] = [entropy.encode(w != 0, 2), floats.encode([w[w != 0]], ["weights"]), full]
        return container.pack("fedsparsify.down", self.fingerprint(), 0, sections)

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        d, rest = count(self.task.weights), self.task.others
        limits = [64 + d, 4 * d, 4 * count(rest)]
        positions, values, full = container.unpack(message, "fedsparsify.down", self.fingerprint(), limits).sections
        alive = torch.from_numpy(entropy.decode(positions, d, 2) > 0)
        w = torch.zeros(d)
        w[alive] = read_values(values, int(alive.sum()))
        local = start(self.task, layers(w, self.task.weights) | unpack_tensors(full, rest), len(shard[1]))
        local.frozen["alive"] = alive.to(self.task.device, torch.float32)
        return local

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Draws) -> Tensor:
        effective = frozen["w"] + frozen["alive"] * trainable["u"]  # no gradient reaches a pruned weight
        return loss_at(self.task, effective, trainable, frozen, batch)

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        values = (local.frozen["w"] + finite(local.trainable["u"]))[local.frozen["alive"] > 0]
        coded = floats.encode([values.cpu().numpy()], ["weights"])
        full = pack_tensors(local.trainable | local.frozen, self.task.others)
        return container.pack("fedsparsify.up", self.fingerprint(), local.samples, [coded, full])

    @override
    def aggregate(self, state: ServerState[None], uploads: Uploads) -> ServerState[None]:
        w = flat(state.model, self.task.weights)
        alive = w != 0
        left, rest = int(alive.sum()), self.task.others

        def read(upload: Buffer) -> Update:
            limits = [4 * left, 4 * count(rest)]
            found = container.unpack(upload, "fedsparsify.up", self.fingerprint(), limits)
            values, full = found.sections
            return {"values": read_values(values, left)} | unpack_tensors(full, rest), found.samples

        here = {"values": w[alive]} | {name: state.model[name] for name in rest}
        average = uploads.mean(read, {"values": torch.Size([left])} | rest, here)
        values = largest(average.pop("values"), max(1, int(max(left * self.keep, len(w) * self.density))))
        pruned = layers(torch.zeros_like(w).masked_scatter_(alive, values), self.task.weights)
        return dataclasses.replace(state, model=pruned | average)

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(8.0 * container.section_sizes(upload)[0])


def read_values(section: memoryview, left: int) -> Tensor:
    """What is left of the weights. PayloadError: another number of them."""
    if len(section) != 4 * left:
        raise PayloadError(f"values: {len(section) // 4} weights, but {left} are left")
    return torch.from_numpy(floats.decode(section, [(left,)], ["weights"])[0].copy())
