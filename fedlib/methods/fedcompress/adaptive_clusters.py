"""How many clusters: a score of the representation that needs no label, and the server's rule that follows it.

The score is the effective rank (Roy, Vetterli, EUSIPCO 2007) of embeddings with rows of unit length. A client sends no
row of its matrix Z, but R of Z = QR: R'R = Z'Z, and the sum of these over clients is that of all rows together.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlib.core.settings import check_settings, integer, number
from fedlib.errors import PayloadError, SpecError
from fedlib.wire import codebook


def unit_rows(z: Tensor) -> Tensor:
    """Rows of [n, d] divided by their length; a row of zeros stays."""
    return z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)


def gram(z: Tensor) -> Tensor:
    """Z'Z of the rows [n, d] at unit length, float64 [d, d]. Those of several clients add up to that of all rows."""
    rows = unit_rows(z.double())
    return rows.T @ rows


def triangle(samples: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is not zero in R of a number of rows of d entries."""
    rows, columns = torch.triu_indices(min(samples, d), d)
    return rows, columns


def effective_rank(products: Tensor) -> float:
    """exp of the entropy of the singular values' shares, from Z'Z [d, d]; 0 where there are no rows.

    From 1, all rows alike up to length and sign, to d, no direction preferred. What rounding makes of an eigenvalue 0
    counts as 0.
    """
    eigenvalues = torch.linalg.eigvalsh(products.double())
    top = float(eigenvalues[-1])
    if top <= 0:
        return 0.0
    singular = torch.where(eigenvalues > 1e-13 * len(eigenvalues) * top, eigenvalues, 0.0).sqrt()
    p = singular / singular.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


_HEAD = struct.Struct("<II")  # samples, and how many of them were right; then embeddings


def report_bytes(samples: int, d: int) -> int:
    """Length of a client's report: what is not zero in R, in float32."""
    k = min(samples, d)
    return _HEAD.size + 4 * (k * d - k * (k - 1) // 2)


def pack_report(z: Tensor, right: int) -> bytes:
    """What a client says of its samples held out: how many there are and are right, and their embeddings [n, d]."""
    n, d = z.shape
    r: Tensor = torch.linalg.qr(unit_rows(z.double()), mode="r").R if n else z
    return _HEAD.pack(n, right) + r[triangle(n, d)].numpy().astype("<f4").tobytes()


def read_report(report: memoryview, d: int) -> dict[str, Tensor]:
    """held [] and right [], int64, and gram [d, d], float64. PayloadError where they do not go together."""
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
    r = torch.zeros(min(held, d), d, dtype=torch.float64)
    r[triangle(held, d)] = read
    if float(r.square().sum()) > held * (1 + 1e-5):  # no row is longer than 1
        raise PayloadError(f"report: embeddings of squared length {float(r.square().sum()):g}, expected at most {held}")
    return {"held": torch.tensor(held), "right": torch.tensor(right), "gram": r.T @ r}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When to take more clusters, with the defaults of FedCompress's code."""

    least: int = integer(8, 2, codebook.MOST)  # clusters of a tensor, at first
    most: int = integer(30, 2, codebook.MOST)
    step: int = integer(1, 1, 10**6)
    window: int = integer(3, 1, 10**6)  # rounds
    patience: int = integer(4, 1, 10**6)  # rounds
    first: int = integer(3, 1, 10**6)  # round of the first decision
    limit: float = number(0.01, 0, 1)  # accuracy

    def __post_init__(self) -> None:
        check_settings(self)
        if self.least > self.most:
            raise SpecError(f"hyper.least: {self.least} exceeds hyper.most: {self.most}; start with fewer clusters")

    def threshold(self, clusters: int) -> float:
        """Gain of accuracy in a round up to which it counts as stalled."""
        return self.limit if clusters == self.least else self.limit / (2 * (clusters - self.least))

    def following(
        self, accuracies: Sequence[float], scores: Sequence[float], clusters: Sequence[int], by_accuracy: bool = True
    ) -> int:
        """Clusters of the next round, from the history of all rounds so far, the last included.

        by_accuracy: accuracy and score must both have stalled, as in the code; else the score alone decides.
        """
        now, rounds = clusters[-1], len(clusters)
        spent = next((i for i, earlier in enumerate(reversed(clusters)) if earlier != now), rounds)
        if now >= self.most or spent < self.patience or rounds < max(self.first, 2):
            return now
        threshold = self.threshold(now)
        stalled = self._gain(scores) <= 10 * threshold
        if by_accuracy:
            stalled = stalled and self._gain(accuracies) <= threshold
        return min(now + self.step, self.most) if stalled else now

    def _gain(self, history: Sequence[float]) -> float:
        """Of the mean over the window, since the round before."""
        now, before = history[-self.window :], history[:-1][-self.window :]
        return sum(now) / len(now) - sum(before) / len(before)
