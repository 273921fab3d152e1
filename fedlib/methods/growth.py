"""How many clusters: a score of the representation that needs no label, and the server's rule that follows it.

The score is the effective rank (Roy, Vetterli, EUSIPCO 2007) of embeddings with rows of unit length. A client sends
its rows, or the sum of their outer products where that is shorter: both give the same score.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlib.errors import PayloadError, SpecError


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


_HEAD = struct.Struct("<II")  # samples, and how many of them were right; then embeddings


def report_bytes(samples: int, d: int) -> int:
    """Length of a client's report: embeddings as rows, or as the upper triangle of Z'Z, in float32."""
    return _HEAD.size + 4 * min(samples * d, d * (d + 1) // 2)


def pack_report(z: Tensor, right: int) -> bytes:
    """What a client says of its samples held out: how many there are and are right, and their embeddings [n, d]."""
    n, d = z.shape
    rows = report_bytes(n, d) == _HEAD.size + 4 * n * d
    sent = unit_rows(z) if rows else gram(z)[triangle(d)]
    return _HEAD.pack(n, right) + sent.numpy().astype("<f4").tobytes()


def read_report(report: memoryview, d: int) -> dict[str, Tensor]:
    """held [], right [] and gram [d, d], float64. PayloadError where they do not go together."""
    if len(report) < _HEAD.size:
        raise PayloadError(f"report: {len(report)} bytes, expected {_HEAD.size} or more")
    held, right = _HEAD.unpack_from(report)
    expected = report_bytes(held, d)
    if right > held or len(report) != expected:
        raise PayloadError(
            f"report: {right} of {held} right in {len(report)} bytes, expected at most {held} in {expected}"
        )
    read = torch.from_numpy(np.frombuffer(report, "<f4", offset=_HEAD.size).astype(np.float64))
    if not bool(torch.isfinite(read).all()):
        raise PayloadError("report: embeddings are not finite, only finite numbers travel")
    if len(read) == held * d:
        products = gram(read.view(held, d))
    else:
        products = torch.zeros(d, d, dtype=torch.float64)
        products[triangle(d)] = read
        products = products + products.triu(1).T
    return {"held": torch.tensor(float(held)), "right": torch.tensor(float(right)), "gram": products}


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
