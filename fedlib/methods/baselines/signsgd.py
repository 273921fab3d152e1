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
from typing_extensions import override

from fedlib.core.method import Local, Sizes
from fedlib.core.plan import count
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError
from fedlib.methods.update_codec import Section, UpdateCodec, layers
from fedlib.rng import Rng
from fedlib.wire import bits, floats


@dataclass(frozen=True, kw_only=True)
class SignSGD(UpdateCodec[None]):
    """No settings beyond the training plan."""

    name = "signsgd"
    sections = ("signs", "scales", "full precision")

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        scales = torch.stack([layer.abs().mean() for layer in layers(u, self.task).values()])
        return [bits.pack((u >= 0).cpu().numpy()), floats.encode([scales.cpu().numpy()])]

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        signs, scales = sections
        u = torch.from_numpy(bits.unpack(signs, count(self.task.weights))).float().mul_(2).sub_(1)
        (values,) = floats.decode(scales, [(len(self.task.weights),)], ["scales"])
        if (values < 0).any():
            raise PayloadError(f"scales: {values.min()}, expected none below 0")
        for layer, scale in zip(layers(u, self.task).values(), values, strict=True):
            layer.mul_(float(scale))
        return u

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(count(self.task.weights) + 32.0 * len(self.task.weights))
