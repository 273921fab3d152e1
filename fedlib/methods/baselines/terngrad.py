"""TernGrad on updates: Wen, Xu, Yan, Wu, Wang, Chen, Li, "TernGrad: Ternary Gradients to Reduce Communication in
Distributed Deep Learning", NeurIPS 2017, applied to a whole local update with a scale per layer.

    s = max |u| of a layer; each entry s sign(u) with probability |u| / s, otherwise 0 -> `encode`, `decode`

Unbiased, with variance |u| (s - |u|). The paper clips gradients before; a whole update is not clipped here. Its log2(3)
bits a weight hold for equally frequent symbols: the entropy coder, with a histogram per layer, takes fewer where zeros
prevail.
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
from fedlib.wire import entropy, floats

SECTIONS = ("symbols", "scales", "full precision")


@dataclass(frozen=True)
class Hyper:
    """Nothing beyond the training plan."""


def encode(u: Tensor, hyper: Hyper, task: Task, rng: Rng) -> list[update_codec.Section]:
    scales = torch.stack([layer.abs().max() for layer in update_codec.layers(u, task).values()])
    chance = torch.rand(len(u), generator=rng.child("upload").torch(task.device), device=task.device)
    for layer, scale in zip(update_codec.layers(chance, task).values(), scales, strict=True):
        layer.mul_(scale)  # compared with |u| rather than with |u| / s, which a layer of zeros does not have
    symbols = u.sign().mul_(chance < u.abs()).add_(1).to(torch.uint8)  # 0 for -s, 1 for 0, 2 for +s
    coded = entropy.encode(symbols.cpu().numpy(), 3, _layer_of_each_entry(task))
    return [coded, floats.encode([scales.cpu().numpy()], ["scales"])]


def decode(sections: Sequence[memoryview], hyper: Hyper, task: Task) -> Tensor:
    symbols, scales = sections
    (values,) = floats.decode(scales, [(len(task.weights),)], ["scales"])
    if (values < 0).any():
        raise PayloadError(f"scales: {values.min()}, expected none below 0")
    u = torch.from_numpy(entropy.decode(symbols, count(task.weights), 3, _layer_of_each_entry(task))).float().sub_(1)
    for layer, scale in zip(update_codec.layers(u, task).values(), values, strict=True):
        layer.mul_(float(scale))
    return u


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return math.log2(3) * count(task.weights) + 32.0 * len(task.weights)


def _layer_of_each_entry(task: Task) -> np.ndarray:
    return np.repeat(np.arange(len(task.weights)), [shape.numel() for shape in task.weights.values()])


broadcast, start, draws, objective, finish, server, sent = update_codec.method("terngrad", 2, encode, decode)
