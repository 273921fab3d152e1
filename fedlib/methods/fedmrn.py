"""FedMRN: Li et al., "Masked Random Noise for Communication-Efficient Federated Learning", ACM MM 2024.

The body of the paper could not be read; the algorithm follows the official code (`Leopold1423/fedmrn-mm24`, f0fb8a0).

    noise G(s)                          -> `drawn_noise`
    stochastic masking, SM              -> `masks`
    progressive stochastic masking, PSM -> `masked_update`
    local step, straight-through        -> `loss`
    upload of seed and mask             -> `encode`
    server: w + sum_k omega_k n_k m_k   -> `decode`, `UpdateCodec.aggregate`

Ours, and numbered on the page: one 64-bit seed per client and round with a stream per layer; weights omega_k by sample
counts unless `weighting` says otherwise; bits really packed and sent. The ablations of `masking` and the entropy coding
are ours too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Local, ServerState, Sizes
from fedlib.core.plan import Samples, Shapes, Tensors, count, layer_of_each_entry
from fedlib.core.settings import choice, number
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.messages import pack_broadcast, pack_seed, positive, unpack_broadcast, unpack_seed
from fedlib.methods.update_codec import Section, UpdateCodec, loss_at, start
from fedlib.rng import Rng, Stream, normal, signs, uniform
from fedlib.wire import bits, entropy
from fedlib.wire.contexts import BUCKETS, buckets

LAWS = {"uniform": uniform, "gauss": normal, "bernoulli": signs}
FLOOR = np.float32(1e-8)  # smaller noise is replaced, so that u / n is finite


@dataclass(frozen=True, kw_only=True)
class FedMRN(UpdateCodec[float]):
    """The server's own state is the magnitude of the noise in the round to come."""

    name = "fedmrn"
    sections = ("seed", "mask", "full precision")

    mask: str = choice("binary", "signed")  # {0, 1}, or "signed" for {-1, +1}
    noise: str = choice("uniform", *LAWS)  # on [-a, a); "gauss" with deviation a; "bernoulli" for -a or +a
    magnitude: float = number(0.01, 1e-6, 1e6)  # a, in units of a weight [code: 0.01 binary, 0.005 signed]
    # "sm": all entries from the first step; "pm": likelier value, not drawn; "after": upload only
    masking: str = choice("psm", "sm", "pm", "after")
    weighting: str = choice("samples", "batches")  # omega_k; "batches" as the released code has it
    # factor of the magnitude from one round to the next, for convergence; 1 in the released code
    decay: float = number(1.0, 1e-3, 1)
    coding: str = choice("packed", "entropy")  # one bit an entry; "entropy": by a range coder that knows |n|

    # Noise and masks

    def drawn_noise(self, seed: int, magnitude: float, shapes: Shapes) -> Tensor:
        """n [d] on the CPU: the entries of all masked layers, one stream per layer under a 64-bit seed."""
        parts = [LAWS[self.noise](seed, layer, shape.numel()) for layer, shape in enumerate(shapes.values())]
        n = np.concatenate(parts) * np.float32(magnitude)
        return torch.from_numpy(np.where(np.abs(n) < FLOOR, FLOOR, n))

    def clipped(self, u: Tensor, n: Tensor) -> Tensor:
        """u / n limited to the interval that the mask's alphabet spans."""
        return (u / n).clamp(0.0 if self.mask == "binary" else -1.0, 1.0)

    def masks(self, u: Tensor, n: Tensor, chance: Tensor) -> Tensor:
        """SM: True where the mask is 1 (binary) or +1 (signed), False where 0 or -1; `chance` [d] uniform on [0, 1)."""
        ratio = self.clipped(u, n)
        likely = ratio if self.mask == "binary" else ratio.add_(1).mul_(0.5)
        return likely > 0.5 if self.masking == "pm" else chance < likely

    def masked_update(self, u: Tensor, n: Tensor, progress: float, chance: Tensor) -> Tensor:
        """PSM: with probability `progress` an entry is n * mask, otherwise n * clip(u / n).

        One draw serves both choices: U < p selects masking, and given that, U < p q has probability q.
        """
        ratio = self.clipped(u, n)
        likely = ratio * progress if self.mask == "binary" else (ratio + 1).mul_(0.5 * progress)
        hard = positive(likely - (0.5 * progress if self.masking == "pm" else chance))
        if self.mask == "signed":
            hard.mul_(2).sub_(1)
        masked = positive(progress - chance)
        return (masked * hard + (1 - masked) * ratio) * n

    # The method

    @property
    def scale(self) -> Shapes:
        """What the broadcast holds beside the model: the magnitude of the round, where it changes."""
        return {"magnitude": torch.Size([1])} if self.decay < 1 else {}

    @override
    def initial(self, rng: Rng) -> ServerState[float]:
        magnitude = float(np.float32(self.magnitude)) if self.scale else self.magnitude  # as it travels
        return ServerState(self.task.initial(), magnitude)

    @override
    def broadcast(self, state: ServerState[float]) -> bytes:
        return pack_broadcast(self, state.model | {"magnitude": torch.tensor([state.own])}, self.scale)

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        local = start(self.task, unpack_broadcast(self, message, self.scale), len(shard[1]), self.scale)
        if self.scale and not 0 < self.own_of(local) <= float(np.float32(self.magnitude)):  # it only shrinks
            raise PayloadError(f"magnitude: {self.own_of(local):g}, expected above 0, at most {self.magnitude:g}")
        n = self.drawn_noise(rng.child("noise").seed(), self.own_of(local), self.task.weights)
        local.frozen["n"] = n.to(self.task.device)
        return local

    @override
    def own_of(self, local: Local) -> float:
        return float(local.frozen["magnitude"]) if self.scale else self.magnitude

    @override
    def draw(self, progress: float, stream: Stream) -> tuple[float, Tensor]:
        share = 1.0 if self.masking == "sm" else progress
        return share, stream.uniform(count(self.task.weights))

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: tuple[float, Tensor]) -> Tensor:
        u, effective = trainable["u"], frozen["w"]
        if self.masking == "after":
            return loss_at(self.task, effective + u, trainable, frozen, batch)
        effective = effective + self.masked_update(u.detach(), frozen["n"], *drawn)
        effective = effective + (u - u.detach())  # adds zero: straight-through, u gets the effective weight's gradient
        return loss_at(self.task, effective, trainable, frozen, batch)

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        n, chance = local.frozen["n"], rng.child("upload").stream(self.task.device).uniform(len(u))
        mask = self.masks(u, n, chance).cpu().numpy()
        if self.coding == "packed":
            coded = bits.pack(mask)
        else:
            coded = entropy.encode(mask, 2, self.contexts(n.cpu(), self.own_of(local)))
        return [pack_seed(rng.child("noise").seed()), coded]

    @override
    def decode(self, sections: Sequence[memoryview], own: float) -> Tensor:
        """The update n * m [d] of a seed and a mask."""
        seed, coded = sections
        d, n = count(self.task.weights), self.drawn_noise(unpack_seed(seed), own, self.task.weights)
        if self.coding == "packed":
            mask = torch.from_numpy(bits.unpack(coded, d)).float()
        else:
            mask = torch.from_numpy(entropy.decode(coded, d, 2, self.contexts(n, own))).float()
        if self.mask == "signed":
            mask = mask.mul_(2).sub_(1)
        return n.mul_(mask)

    def contexts(self, n: Tensor, magnitude: float) -> np.ndarray:
        """Which entries share a model of the range coder [d]: those of one layer and of about the same |n|."""
        return BUCKETS * layer_of_each_entry(self.task.weights) + buckets(n.abs().numpy(), 4 * magnitude)

    @override
    def weight(self, samples: int) -> int:
        return -(-samples // self.task.plan.batch) if self.weighting == "batches" else samples

    @override
    def aggregate(self, state: ServerState[float], uploads: Uploads) -> ServerState[float]:
        new = super().aggregate(state, uploads)
        if not self.scale:
            return new
        return dataclasses.replace(new, own=float(np.float32(state.own) * np.float32(self.decay)))

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(1.0 * count(self.task.weights))
