"""How many bits a quantized update takes, and when: the settings of `fedlib.methods.feddq.method`, and its rules.

    range       FedDQ: ceil(log2(range of the tensor / resolution)) bits -> `width`
    fixed       the same width always, as in FedPAQ (Reisizadeh et al., AISTATS 2020)
    ascending   AdaQuantFL (Jhunjhunwala et al., ICASSP 2021): s_0 sqrt(f_0 / f) intervals -> `next_intervals`
    loss        our mirror image of it, s_0 sqrt(f / f_0): the formula of the paper's first version is unknown

f is the training loss that clients measure on the model they receive, f_0 that of the first round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlib.errors import SpecError, require_name, require_number
from fedlib.methods.feddq import quantizers
from fedlib.wire import bits

LEAST_LOSS_INTERVALS = 3  # of the loss-based schedule


@dataclass(frozen=True)
class Hyper:
    """Defaults are FedDQ's on Fashion-MNIST, except that rounding is stochastic and that biases are sent."""

    schedule: str = "range"  # or "fixed", "ascending", "loss"
    quantizer: str = "affine_stochastic"  # or "affine_nearest", "symmetric_nearest", "norm", "buckets"
    resolution: float = 0.005  # of schedule range: the step stays near it; unit of a parameter (code)
    width: int = 4  # of schedule fixed: bits an entry; a norm quantizer takes one more, for the sign
    least: int = 2  # bits, of schedule range (code: for one of three networks)
    most: int = 16  # bits, of all schedules (project)
    first: int = 2  # intervals in the first round, of schedules ascending (2: AdaQuantFL) and loss (255: project)
    biases: str = "sent"  # or "kept": as two of the three scripts, all but the weights stays as it was (code)
    coding: str = "packed"  # or "entropy"
    downlink: float = 0.0  # the same rule for the broadcast model, nearest: its resolution; 0 sends float32 (project)
    report: bool = False  # clients send the loss of what they received, whether the schedule needs it or not

    def __post_init__(self) -> None:
        require_name("hyper.schedule", self.schedule, ("range", "fixed", "ascending", "loss"))
        require_name("hyper.quantizer", self.quantizer, quantizers.AFFINE + quantizers.NORMED)
        require_name("hyper.biases", self.biases, ("sent", "kept"))
        require_name("hyper.coding", self.coding, ("packed", "entropy"))
        for field, lowest in (("least", 1), ("most", 1), ("width", 1), ("first", 1)):
            highest = 2**16 - 1 if field == "first" else bits.WIDEST
            require_number(f"hyper.{field}", getattr(self, field), lowest, highest, integer=True)
        require_number("hyper.resolution", self.resolution, 1e-12, 1e12)
        require_number("hyper.downlink", self.downlink, 0, 1e12)
        if self.downlink:
            require_number("hyper.downlink", self.downlink, 1e-12, 1e12)
        if self.least > self.most:
            raise SpecError(f"hyper.least: {self.least} exceeds hyper.most: {self.most}; lower it")
        if self.schedule == "fixed" and self.width > self.most:
            raise SpecError(f"hyper.width: {self.width} exceeds hyper.most: {self.most}; lower it")
        if self.quantizer in quantizers.NORMED and (self.schedule == "range" or self.most == bits.WIDEST):
            raise SpecError(
                f"hyper.quantizer: {self.quantizer!r} knows no range, and needs a bit for the sign; "
                f"take another schedule than range, and hyper.most below {bits.WIDEST}"
            )
        if not isinstance(self.report, bool):
            raise SpecError(f"hyper.report: {self.report!r} must be true or false")

    @property
    def reports(self) -> bool:
        return self.report or self.schedule in ("ascending", "loss")


def width(span: float, hyper: Hyper) -> int:
    """FedDQ's rule: bits an entry for a tensor of this range; 0 for a constant one."""
    if span < quantizers.NOTHING:
        return 0
    return min(hyper.most, max(hyper.least, math.ceil(math.log2(span / hyper.resolution))))


def next_intervals(loss: float, first_loss: float, hyper: Hyper) -> int:
    """Intervals for the next round, after one in which clients measured `loss`."""
    if hyper.schedule == "ascending":
        found = hyper.first * math.sqrt(first_loss / loss) if loss > 0 else math.inf
    else:
        share = loss / first_loss if first_loss > 0 else 1.0
        found = max(LEAST_LOSS_INTERVALS, hyper.first * math.sqrt(share))
    return bounded(found, hyper)


def bounded(intervals: float, hyper: Hyper) -> int:
    most = 2**hyper.most - 1
    return most if intervals >= most else math.ceil(intervals)
