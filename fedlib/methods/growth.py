"""How many clusters: a score of the representation that needs no label, and the server's rule that follows it.

The score is the effective rank (Roy, Vetterli, EUSIPCO 2007) of embeddings with rows of unit length. A client sends
its rows, or the sum of their outer products where that is shorter: both give the same score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlib.errors import SpecError


def unit_rows(z: Tensor) -> Tensor:
    """Rows of [n, d] divided by their length; a row of zeros stays."""
    return z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)


def gram(z: Tensor) -> Tensor:
    """Z'Z of the rows [n, d] at unit length, float64 [d, d]. Those of several clients add up to that of all rows."""
    rows = unit_rows(z.double())
    return rows.T @ rows


def triangle(d: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the upper triangle of a [d, d] matrix: what tells of a symmetric one."""
    rows, columns = torch.triu_indices(d, d)
    return rows, columns


def effective_rank(products: Tensor) -> float:
    """exp of the entropy of the singular values' shares, from Z'Z [d, d]; 0 where there are no rows.

    From 1, all rows alike up to length and sign, to d, no direction preferred. Eigenvalues that rounding to float32 may
    have made count as 0.
    """
    eigenvalues = torch.linalg.eigvalsh(products.double())
    top = float(eigenvalues[-1])
    if top <= 0:
        return 0.0
    singular = eigenvalues.clamp(min=0).sqrt()
    p = singular / singular.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


@dataclass(frozen=True)
class Rule:
    """When to take more clusters. Units: rounds for window, patience and first; accuracy for limit."""

    least: int = 8
    most: int = 30
    step: int = 1
    window: int = 3
    patience: int = 4
    first: int = 3
    limit: float = 0.01
    by_accuracy: bool = True  # as the code; else the score alone decides

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise SpecError(f"hyper.least: {self.least} exceeds hyper.most: {self.most}; start with fewer clusters")

    def threshold(self, clusters: int) -> float:
        """Gain of accuracy in a round up to which it counts as stalled."""
        return self.limit if clusters == self.least else self.limit / (2 * (clusters - self.least))

    def following(self, accuracies: Sequence[float], scores: Sequence[float], clusters: Sequence[int]) -> int:
        """Clusters of the next round, from the history of all rounds so far, the last included."""
        now, rounds = clusters[-1], len(clusters)
        spent = next((i for i, earlier in enumerate(reversed(clusters)) if earlier != now), rounds)
        if now >= self.most or spent < self.patience or rounds < max(self.first, 2):
            return now
        threshold = self.threshold(now)
        stalled = self._gain(scores) <= 10 * threshold
        if self.by_accuracy:
            stalled = stalled and self._gain(accuracies) <= threshold
        return min(now + self.step, self.most) if stalled else now

    def _gain(self, history: Sequence[float]) -> float:
        """Of the mean over the window, since the round before."""
        now, before = history[-self.window :], history[:-1][-self.window :]
        return sum(now) / len(now) - sum(before) / len(before)
