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

from fedlib.core.plan import count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError
from fedlib.methods import update_codec
from fedlib.rng import Rng
from fedlib.wire import bits, floats, rotation

SECTIONS = ("seed", "signs", "scale", "full precision")


@dataclass(frozen=True)
class Hyper:
    """Nothing beyond the training plan."""


def encode(u: Tensor, hyper: Hyper, task: Task, rng: Rng) -> list[update_codec.Section]:
    seed = rng.child("rotation").seed()
    y = rotation.rotate(u, seed)
    absolute = float(torch.linalg.vector_norm(y, 1, dtype=torch.float64))
    squares = float(torch.linalg.vector_norm(y, 2, dtype=torch.float64)) ** 2
    return sections(seed, y >= 0, squares / (absolute or 1.0))  # no update: scale 0


def decode(parts: Sequence[memoryview], hyper: Hyper, task: Task) -> Tensor:
    d = count(task.weights)
    seed, signs, scale = read(parts, d)
    return rotation.unrotate(signs, seed, d, scale)


def sections(seed: int, positive: Tensor, scale: float) -> list[update_codec.Section]:
    """Seed, one bit an entry of the rotated vector [n], scale. PayloadError where the scale is not finite."""
    coded = bits.pack(positive.cpu().numpy())
    return [seed.to_bytes(8, "little"), coded, floats.encode([np.array([scale], np.float32)], ["scale"])]


def read(parts: Sequence[memoryview], d: int) -> tuple[int, Tensor, float]:
    """The inverse for an update of d entries: seed, -1 or +1 [n] on the CPU, scale. PayloadError."""
    seed, coded, scales = parts
    n = rotation.padded(d)
    if len(seed) != 8:
        raise PayloadError(f"seed of {len(seed)} bytes where 8 were expected")
    signs = torch.from_numpy(bits.unpack(coded, n)).float().mul_(2).sub_(1)
    scale = float(floats.decode(scales, [(1,)], ["scale"])[0][0])
    largest = torch.finfo(torch.float32).max / math.sqrt(n)  # sqrt(n): the largest entry of R^-1 (+-1, ..., +-1)
    if not 0 <= scale <= largest:
        raise PayloadError(f"scale: {scale:g}, expected 0 to {largest:g}, for which every update is finite")
    return int.from_bytes(seed, "little"), signs, scale


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return rotation.padded(count(task.weights)) + 32.0


broadcast, start, draws, objective, finish, server, sent = update_codec.method("drive", 3, encode, decode)
