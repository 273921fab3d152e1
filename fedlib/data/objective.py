"""What a network is trained for, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedlib.data.text import NO_LABEL

Measure = Callable[[Tensor, Tensor], Tensor]  # of (output, y): a scalar, the mean over the batch's samples


@dataclass(frozen=True)
class Objective:
    """Classification by cross-entropy, unless a loss is given."""

    loss: Measure | None = None
    metrics: Mapping[str, Measure] = field(default_factory=dict)
    classes: bool = True  # whether y holds labels, so that there is an accuracy

    @property
    def names(self) -> tuple[str, ...]:
        """Of what `judge` gives, in its order."""
        return (*(("accuracy",) if self.classes else ()), "loss", *self.metrics)

    def train(self, output: Tensor, y: Tensor) -> Tensor:
        """What a local step minimises: the mean over a batch."""
        return self.loss(output, y) if self.loss else cross_entropy(output, y, "mean")

    def count(self, y: Tensor) -> int:
        """Labels, or samples of what has none."""
        return int((y != NO_LABEL).sum()) if self.classes else len(y)

    def total(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss summed over what `count` counts."""
        return self.count(y) * self.loss(output, y) if self.loss else cross_entropy(output, y, "sum")

    def judge(self, output: Tensor, y: Tensor) -> tuple[list[float], int]:
        """Sums over a batch of the test set, and the count that they are to be divided by."""
        count = self.count(y)
        right: list[float] = [int((output.argmax(-1) == y).sum())] if self.classes else []
        more = (count * float(metric(output, y)) for metric in self.metrics.values())
        return [*right, float(self.total(output, y)), *more], count


CLASSIFICATION = Objective()


def cross_entropy(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Of logits [n, classes] with labels [n]; of sequences [n, length, classes] with [n, length], where NO_LABEL does
    not count."""
    if logits.ndim == 2:
        return nn.functional.cross_entropy(logits, y, reduction=reduction)
    return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction=reduction, ignore_index=NO_LABEL)
