"""One bit a weight after a random rotation, of a whole local update.

DRIVE: Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021
(`amitport/DRIVE-One-bit-Distributed-Mean-Estimation`, f87a915)

    rotation R, signs of y = R u, scale ||y||_2^2 / ||y||_1   -> `Drive.encode`
    scale R^-1 sign(y)                                        -> `Drive.decode`

EDEN at one bit: Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated
Learning", ICML 2022 (`amitport/EDEN-Distributed-Mean-Estimation`, 5c7639a)

    eta y = sqrt(n) y / ||y||_2, of unit variance   -> `Eden.encode`
    Q, the nearest centroid                         -> `quantised`
    scale ||y||_2^2 / <y, Q(eta y)>                 -> `Eden.encode`
    scale R^-1 Q                                    -> `Eden.decode`

The scales are those of the released code. With DRIVE's the decoded update is unbiased over uniform rotations; over
Hadamard rotations it is nearly so in high dimension, and not at all for two entries. EDEN's centroid cancels at one
bit: its decoded update is DRIVE's. Ours: all weights are one vector, zeros fill it up to a power of two, the server
cuts them off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Local, Sizes
from fedlib.core.plan import count
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError
from fedlib.methods.messages import pack_seed, pack_signs, unpack_seed, unpack_signs
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import floats, rotation

SECTIONS = ("seed", "signs", "scale", "full precision")
CENTROIDS = (-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi))  # -+0.79788: Lloyd and Max's for the normal law


@dataclass(frozen=True, kw_only=True)
class Drive(UpdateCodec[None]):
    """No settings beyond the training plan."""

    name = "drive"
    sections = SECTIONS

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        seed = rng.child("rotation").seed()
        y = rotation.rotate(u, seed)
        absolute = float(torch.linalg.vector_norm(y, 1, dtype=torch.float64))
        squares = float(torch.linalg.vector_norm(y, 2, dtype=torch.float64)) ** 2
        return write(seed, y, squares / (absolute or 1.0))  # no update: scale 0

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        return read(sections, count(self.task.weights))

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return size(count(self.task.weights))


@dataclass(frozen=True, kw_only=True)
class Eden(UpdateCodec[None]):
    """No settings beyond the training plan."""

    name = "eden"
    sections = SECTIONS

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        seed = rng.child("rotation").seed()
        y = rotation.rotate(u, seed)
        norm = float(torch.linalg.vector_norm(y, dtype=torch.float64))
        z = y * (math.sqrt(len(y)) / (norm or 1.0))
        inner = float(y @ quantised(z))
        return write(seed, z, norm**2 / (inner or 1.0))  # no update: scale 0

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        return read(sections, count(self.task.weights), CENTROIDS[1])  # Q is signs times the centroid

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return size(count(self.task.weights))


def quantised(z: Tensor) -> Tensor:
    """The centroid that is the nearer one to each entry, the positive one where both are as near."""
    low, high = z.new_tensor(CENTROIDS)
    return torch.where(z >= 0, high, low)


def write(seed: int, y: Tensor, scale: float) -> list[Section]:
    """Seed, one bit an entry of the rotated vector [n], scale. PayloadError where the scale is not finite."""
    return [pack_seed(seed), pack_signs(y), floats.encode([np.array([scale], np.float32)], ["scale"])]


def read(sections: Sequence[memoryview], d: int, unit: float = 1.0) -> Tensor:
    """The update [d] on the CPU, of signs -unit and unit. PayloadError."""
    seed, signs, scales = sections
    n = rotation.padded(d)
    y = unpack_signs(signs, n)
    scale = float(floats.decode(scales, [(1,)], ["scale"])[0][0])
    largest = torch.finfo(torch.float32).max / math.sqrt(n)  # sqrt(n): the largest entry of R^-1 (+-1, ..., +-1)
    if not 0 <= scale <= largest:
        raise PayloadError(f"scale: {scale:g}, expected 0 to {largest:g}, for which every update is finite")
    return rotation.unrotate(y, unpack_seed(seed), d, scale * unit)


def size(d: int) -> Sizes:
    return Sizes(rotation.padded(d) + 32.0)
