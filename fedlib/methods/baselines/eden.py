"""EDEN at one bit: Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for
Federated Learning", ICML 2022, on a whole local update.

    eta y = sqrt(n) y / ||y||_2, of unit variance   -> `encode`
    Q, the nearest centroid                         -> `quantised`
    scale ||y||_2^2 / <y, Q(eta y)>                 -> `encode`
    scale R^-1 Q                                    -> `decode`

After the released code (`amitport/EDEN-Distributed-Mean-Estimation`, 5c7639a). At one bit the centroid cancels: the
decoded update is DRIVE's, whose rotation and message this module takes; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Local, Sizes
from fedlib.core.plan import count
from fedlib.core.uploads import Buffer
from fedlib.methods.baselines import drive
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import rotation

CENTROIDS = (-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi))  # -+0.79788: Lloyd and Max's for the normal law


@dataclass(frozen=True, kw_only=True)
class Eden(UpdateCodec[None]):
    """No settings beyond the training plan."""

    name = "eden"
    sections = drive.SECTIONS

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        seed = rng.child("rotation").seed()
        y = rotation.rotate(u, seed)
        norm = float(torch.linalg.vector_norm(y, dtype=torch.float64))
        positive = quantised(y * (math.sqrt(len(y)) / (norm or 1.0)))
        low, high = y.new_tensor(CENTROIDS)
        inner = float(y @ torch.where(positive, high, low))
        return drive.write(seed, positive, norm**2 / (inner or 1.0))  # no update: scale 0

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        d = count(self.task.weights)
        seed, signs, scale = drive.read(sections, d)
        return rotation.unrotate(signs, seed, d, scale * CENTROIDS[1])  # Q is signs times the centroid

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return drive.size(count(self.task.weights))


def quantised(z: Tensor) -> Tensor:
    """True where the positive centroid is the nearer one, or as near as the other."""
    return z >= sum(CENTROIDS) / 2
