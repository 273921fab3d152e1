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

import torch
from torch import Tensor

from fedlib.core.plan import count
from fedlib.core.task import Task
from fedlib.methods import update_codec
from fedlib.methods.baselines import drive
from fedlib.methods.baselines.drive import SECTIONS, Hyper, paper_bits
from fedlib.rng import Rng
from fedlib.wire import rotation

__all__ = ["SECTIONS", "Hyper", "broadcast", "draws", "finish", "objective", "paper_bits", "server", "start"]

CENTROIDS = (-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi))  # -+0.79788: Lloyd and Max's for the normal law


def quantised(z: Tensor) -> Tensor:
    """True where the positive centroid is the nearer one, or as near as the other."""
    return z >= sum(CENTROIDS) / 2


def encode(u: Tensor, hyper: Hyper, task: Task, rng: Rng) -> list[update_codec.Section]:
    seed = rng.child("rotation").seed()
    y = rotation.rotate(u, seed)
    norm = float(torch.linalg.vector_norm(y, dtype=torch.float64))
    positive = quantised(y * (math.sqrt(len(y)) / (norm or 1.0)))
    low, high = y.new_tensor(CENTROIDS)
    inner = float(y @ torch.where(positive, high, low))
    return drive.sections(seed, positive, norm**2 / (inner or 1.0))  # no update: scale 0


def decode(parts: Sequence[memoryview], hyper: Hyper, task: Task) -> Tensor:
    d = count(task.weights)
    seed, signs, scale = drive.read(parts, d)
    return rotation.unrotate(signs, seed, d, scale * CENTROIDS[1])  # Q is signs times the centroid


broadcast, start, draws, objective, finish, server, sent = update_codec.method("eden", 3, encode, decode)
