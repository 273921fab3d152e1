"""How a tensor becomes levels: the settings that say so, and the rules for the number of bits.

    range       FedDQ: ceil(log2(range of the tensor / resolution)) bits -> `Rule.width_for`
    fixed       the same width always, as in FedPAQ (Reisizadeh et al., AISTATS 2020)
    ascending   AdaQuantFL (Jhunjhunwala et al., ICASSP 2021): s_0 sqrt(f_0 / f) intervals -> `Rule.next_intervals`
    loss        our mirror image of it, s_0 sqrt(f / f_0): the formula of the paper's first version is unknown

f is the training loss that clients measure on the model they receive, f_0 that of the first round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlib.core.plan import Shapes, Tensors
from fedlib.core.settings import check_settings, choice, integer, number
from fedlib.errors import PayloadError, SpecError
from fedlib.methods.feddq import quantizers
from fedlib.methods.feddq.quantizers import NORMED, NOTHING
from fedlib.rng import Rng
from fedlib.wire import bits
from fedlib.wire.levels import Levels

LEAST_LOSS_INTERVALS = 3  # of the loss-based schedule


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A schedule with a quantizer. Defaults are FedDQ's on Fashion-MNIST, except that rounding is stochastic."""

    schedule: str = choice("range", "fixed", "ascending", "loss")  # or "fixed", "ascending", "loss"
    # or "affine_nearest", "symmetric_nearest", "norm", "buckets"
    quantizer: str = choice("affine_stochastic", *quantizers.AFFINE, *NORMED)
    # of schedule range: the step stays near it; unit of a parameter (code)
    resolution: float = number(0.005, 1e-12, 1e12)
    # of schedule fixed: bits an entry; a norm quantizer takes one more, for the sign
    width: int = integer(4, 1, bits.WIDEST)
    least: int = integer(2, 1, bits.WIDEST)  # bits, of schedule range (code: for one of three networks)
    most: int = integer(16, 1, bits.WIDEST)  # bits, of all schedules (project)
    # intervals in the first round, of schedules ascending (2: AdaQuantFL) and loss (255: project)
    first: int = integer(2, 1, 2**16 - 1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.least > self.most:
            raise SpecError(f"hyper.least: {self.least} exceeds hyper.most: {self.most}; lower it")
        if self.schedule == "fixed" and self.width > self.most:
            raise SpecError(f"hyper.width: {self.width} exceeds hyper.most: {self.most}; lower it")
        if self.quantizer in NORMED and (self.schedule == "range" or self.most == bits.WIDEST):
            raise SpecError(
                f"hyper.quantizer: {self.quantizer!r} knows no range, and needs a bit for the sign; "
                f"take another schedule than range, and hyper.most below {bits.WIDEST}"
            )

    # Schedules

    def width_for(self, span: float) -> int:
        """FedDQ's rule: bits an entry for a tensor of this range; 0 for a constant one."""
        if span < NOTHING:
            return 0
        return min(self.most, max(self.least, math.ceil(math.log2(span / self.resolution))))

    @property
    def follows_loss(self) -> bool:
        """Whether the server sets the intervals of a round, by the loss in the one before."""
        return self.schedule in ("ascending", "loss")

    def next_intervals(self, loss: float, first_loss: float) -> int:
        """Intervals for the next round, after one in which clients measured `loss`."""
        if self.schedule == "ascending":
            intervals = self.first * math.sqrt(first_loss / loss) if loss > 0 else math.inf
        else:
            share = loss / first_loss if first_loss > 0 else 1.0
            intervals = max(LEAST_LOSS_INTERVALS, self.first * math.sqrt(share))
        return math.ceil(min(intervals, self.most_intervals))

    @property
    def most_intervals(self) -> int:
        return 2**self.most - 1

    def intervals_for(self, span: float, agreed: int) -> int:
        """Of a tensor of this range; `agreed`: what the server set, for schedules that follow the loss."""
        if self.follows_loss:
            return agreed
        return 2 ** (self.width_for(span) if self.schedule == "range" else self.width) - 1

    # Tensors there and back

    def quantize(self, x: Tensor, agreed: int, rng: Rng) -> tuple[Levels, np.ndarray]:
        """A tensor's levels; and its scales, of the norm quantizers. PayloadError: not finite."""
        low, span = quantizers.extent(x)
        intervals, none = self.intervals_for(span, agreed), np.empty(0, np.float32)
        if self.quantizer in NORMED:
            return quantizers.norm(x, intervals, rng, NORMED[self.quantizer])
        if span < NOTHING:
            return quantizers.constant(low), none
        if self.quantizer == "symmetric_nearest":
            return quantizers.symmetric(x, span, intervals.bit_length()), none
        return quantizers.affine(x, low, span, intervals, rng if self.quantizer == "affine_stochastic" else None), none

    def restore(self, parts: Sequence[Levels], shapes: Shapes, scales: memoryview | bytes = b"") -> Tensors:
        """All tensors as the receiver sees them. PayloadError: numbers not finite, or that do not fit each other."""
        tensors, bucket = Tensors(), NORMED.get(self.quantizer)
        counts = [quantizers.scales_of(shape.numel(), bucket) for shape in shapes.values()]
        if len(scales) != 4 * sum(counts):
            raise PayloadError(f"scales: {len(scales)} bytes, expected {4 * sum(counts)}")
        numbers = np.frombuffer(scales or b"", "<f4")
        if not np.isfinite(numbers).all():
            raise PayloadError("scales: not finite, only finite numbers travel")
        for (name, shape), part, k in zip(shapes.items(), parts, counts, strict=True):
            own, numbers = np.split(numbers, [k])
            if bucket is None:
                x = quantizers.restore(part, shape.numel(), self.quantizer)
            else:
                x = quantizers.restore_norm(part, shape.numel(), own, bucket)
            if not bool(torch.isfinite(x).all()):
                raise PayloadError(f"{name}: levels and header give numbers that are not finite")
            tensors[name] = x.view(shape)
        return tensors

    def range_of(self, part: Levels) -> float:
        """Of the tensor that was quantized: its highest entry has the highest level. Norm quantizers do not tell: 0."""
        if self.quantizer in NORMED or not part.width:
            return 0.0
        highest = 2**part.width - 1 if self.quantizer == "symmetric_nearest" else int(part.levels.max())
        return part.second * highest
