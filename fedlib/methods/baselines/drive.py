"""DRIVE: Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021, on a whole local update.

    rotation R, signs of y = R u, scale ||y||_2^2 / ||y||_1   -> `encode`
    scale R^-1 sign(y)                                        -> `decode`

The scale is that of the released code (`amitport/DRIVE-One-bit-Distributed-Mean-Estimation`, f87a915). With it the
decoded update is unbiased over uniform rotations; over Hadamard rotations it is nearly so in high dimension, and not at
all for two entries. Ours: all weights are one vector, zeros fill it up to a power of two, the server cuts them off.
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
from fedlib.methods.messages import pack_seed, unpack_seed
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import bits, floats, rotation

SECTIONS = ("seed", "signs", "scale", "full precision")


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
        return write(seed, y >= 0, squares / (absolute or 1.0))  # no update: scale 0

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        d = count(self.task.weights)
        seed, signs, scale = read(sections, d)
        return rotation.unrotate(signs, seed, d, scale)

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return size(count(self.task.weights))


def write(seed: int, positive: Tensor, scale: float) -> list[Section]:
    """Seed, one bit an entry of the rotated vector [n], scale. PayloadError where the scale is not finite."""
    coded = bits.pack(positive.cpu().numpy())
    return [pack_seed(seed), coded, floats.encode([np.array([scale], np.float32)], ["scale"])]


def read(sections: Sequence[memoryview], d: int) -> tuple[int, Tensor, float]:
    """The inverse for an update of d entries: seed, -1 or +1 [n] on the CPU, scale. PayloadError."""
    seed, coded, scales = sections
    n = rotation.padded(d)
    number = unpack_seed(seed)
    signs = torch.from_numpy(bits.unpack(coded, n)).float().mul_(2).sub_(1)
    scale = float(floats.decode(scales, [(1,)], ["scale"])[0][0])
    largest = torch.finfo(torch.float32).max / math.sqrt(n)  # sqrt(n): the largest entry of R^-1 (+-1, ..., +-1)
    if not 0 <= scale <= largest:
        raise PayloadError(f"scale: {scale:g}, expected 0 to {largest:g}, for which every update is finite")
    return number, signs, scale


def size(d: int) -> Sizes:
    return Sizes(rotation.padded(d) + 32.0)
