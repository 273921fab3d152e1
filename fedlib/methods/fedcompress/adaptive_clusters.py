"""How many clusters: a score of the representation that needs no label, and the server's rule that follows it.

The score is the effective rank (Roy, Vetterli, EUSIPCO 2007) of embeddings with rows of unit length. A client sends no
row of its matrix Z, but R of Z = QR: R'R = Z'Z, and the sum of these over clients is that of all rows together.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedlib.core.plan import Samples, Shapes
from fedlib.core.settings import integer, number
from fedlib.core.task import Task
from fedlib.errors import PayloadError, SpecError
from fedlib.wire import codebook

NUMBER = 2  # bytes of the number of clusters in a broadcast
CHUNK = 500  # samples that are looked at together


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


def head(task: Task) -> nn.Linear:
    """The last layer of the task's network. SpecError where embeddings do not enter it."""
    layer = list(task.network.children())[-1]
    if not isinstance(layer, nn.Linear):
        raise SpecError("model: does not end in a linear layer, whose inputs are the embeddings that are scored")
    return layer


@torch.no_grad()
def see(task: Task, model: Mapping[str, Tensor], samples: Samples) -> tuple[int, Tensor]:
    """Number of samples that a model gets right, and their embeddings, which are what enters its last layer [n, d], on
    the CPU; in evaluation mode."""
    task.network.eval()
    layer = head(task)
    there = {name: model[name].to(task.device) for name in task.tensors}
    right, entered = 0, [torch.empty(0, layer.in_features)]
    with layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].cpu())):
        for x, y in zip(*(part.split(CHUNK) for part in samples), strict=True):
            if len(x):
                right += int((task.logits(there, x).argmax(1) == y).sum())
    return right, torch.cat(entered)


_HEAD = struct.Struct("<II")  # samples, and how many of them were right; then embeddings


def report_bytes(samples: int, d: int) -> int:
    """Length of a client's report: what is not zero in R, in float32."""
    rows, _ = triangle(samples, d)
    return _HEAD.size + 4 * len(rows)


def longest_report(task: Task) -> int:
    """Bytes that no client's report exceeds."""
    return report_bytes(len(task.train[0]), head(task).in_features)


def pack_report(z: Tensor, right: int) -> bytes:
    """What a client says of its samples held out: how many there are and are right, and their embeddings [n, d]."""
    n, d = z.shape
    r: Tensor = torch.linalg.qr(unit_rows(z.double()), mode="r").R if n else z
    return _HEAD.pack(n, right) + r[triangle(n, d)].numpy().astype("<f4").tobytes()


def report_shapes(task: Task) -> Shapes:
    """Of what `read_report` gives."""
    d = head(task).in_features
    return {"held": torch.Size([]), "right": torch.Size([]), "gram": torch.Size([d, d])}


def report(task: Task, model: Mapping[str, Tensor], held_out: Samples) -> bytes:
    """What a client says of its samples held out, under the model as it is sent."""
    right, z = see(task, model, held_out)
    return pack_report(z, right)


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

    def pack_number(self, clusters: int) -> bytes:
        return clusters.to_bytes(NUMBER, "little")

    def read_number(self, packed: memoryview) -> int:
        """The inverse. PayloadError where the settings do not allow as many clusters."""
        number = int.from_bytes(packed, "little")
        if len(packed) != NUMBER or not self.least <= number <= self.most:
            raise PayloadError(f"clusters: {number} in {len(packed)} bytes, expected {self.least} to {self.most} in 2")
        return number

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
