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

import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Local, Sizes
from fedlib.core.plan import count, layer_of_each_entry, layers
from fedlib.core.uploads import Buffer
from fedlib.methods.baselines.signsgd import scale_layers
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import entropy, floats


@dataclass(frozen=True, kw_only=True)
class TernGrad(UpdateCodec[None]):
    """No settings beyond the training plan."""

    name = "terngrad"
    sections = ("symbols", "scales", "full precision")

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        task = self.task
        scales = torch.stack([layer.abs().max() for layer in layers(u, task.weights).values()])
        chance = rng.child("upload").stream(task.device).uniform(len(u))
        for layer, scale in zip(layers(chance, task.weights).values(), scales, strict=True):
            layer.mul_(scale)  # compared with |u| rather than with |u| / s, which a layer of zeros does not have
        symbols = u.sign().mul_(chance < u.abs()).add_(1).to(torch.uint8)  # 0 for -s, 1 for 0, 2 for +s
        coded = entropy.encode(symbols.cpu().numpy(), 3, layer_of_each_entry(task.weights))
        return [coded, floats.encode([scales.cpu().numpy()], ["scales"])]

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        task, (symbols, scales) = self.task, sections
        u = torch.from_numpy(entropy.decode(symbols, count(task.weights), 3, layer_of_each_entry(task.weights)))
        return scale_layers(u.float().sub_(1), scales, task)

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(math.log2(3) * count(self.task.weights) + 32.0 * len(self.task.weights))
