"""SignSGD on updates: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for Non-Convex
Problems", ICML 2018, applied to a whole local update with a scale per layer, as federated papers use it.

    sign(u) of a layer times mean |u| -> `encode`, `decode`

Deterministic and biased: every entry of a layer moves by the same amount.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlib.core.plan import count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError
from fedlib.methods import update_codec
from fedlib.rng import Rng
from fedlib.wire import bits, floats

SECTIONS = ("signs", "scales", "full precision")


@dataclass(frozen=True)
class Hyper:
    """Nothing beyond the training plan."""


def encode(u: Tensor, hyper: Hyper, task: Task, rng: Rng) -> list[update_codec.Section]:
    scales = torch.stack([layer.abs().mean() for layer in update_codec.layers(u, task).values()])
    return [bits.pack((u >= 0).cpu().numpy()), floats.encode([scales.cpu().numpy()])]


def decode(sections: Sequence[memoryview], hyper: Hyper, task: Task) -> Tensor:
    signs, scales = sections
    u = torch.from_numpy(bits.unpack(signs, count(task.weights))).float().mul_(2).sub_(1)
    (values,) = floats.decode(scales, [(len(task.weights),)], ["scales"])
    if (values < 0).any():
        raise PayloadError(f"scales: {values.min()}, expected none below 0")
    for layer, scale in zip(update_codec.layers(u, task).values(), values, strict=True):
        layer.mul_(float(scale))
    return u


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return count(task.weights) + 32.0 * len(task.weights)


broadcast, start, draws, objective, finish, server, sent = update_codec.method("signsgd", 2, encode, decode)
