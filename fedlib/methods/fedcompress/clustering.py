"""Weight clustering: a tensor's weights take the values of a few centroids.

    where centroids begin       -> `seeds`: k-means++ (Arthur, Vassilvitskii, SODA 2007), several candidates a step
    Lloyd's steps               -> `lloyd`
    the nearest centroid        -> `assign`
    training through clusters   -> `straight_through`
    a pull towards centroids    -> `pull`

In one dimension clusters are intervals. With the values sorted once, and the sums of their beginnings, the distortion
of any set of centroids takes a search for each boundary instead of a pass over all values.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedlib.core.plan import Shapes
from fedlib.core.task import Task
from fedlib.errors import PayloadError, SpecError
from fedlib.rng import Rng, words

STEPS = 20  # of Lloyd, where no training moves the centroids


def kernels(task: Task, most: int, linear: bool) -> Shapes:
    """Trained kernels over all channels and, if `linear`, matrices, of more than `most` weights. SpecError: none."""
    fitting = {}
    for name, shape in task.weights.items():
        layer = task.network.get_submodule(name.rpartition(".")[0])
        whole = isinstance(layer, nn.Conv2d) and layer.groups == 1
        if (whole or (linear and isinstance(layer, nn.Linear))) and shape.numel() > most:
            fitting[name] = shape
    if not fitting:
        raise SpecError(
            f"model: has no trained convolution of more than {most} weights; take one that has, or no clusters"
        )
    return fitting


@dataclass(frozen=True)
class Line:
    """Finite values in ascending order [n], and the sums of the first i of them and of their squares [n + 1]."""

    values: np.ndarray  # float32
    sums: np.ndarray  # float64; of values minus `middle`, which keeps what is subtracted small
    squares: np.ndarray
    middle: float

    @classmethod
    def of(cls, tensor: Tensor) -> Line:
        """PayloadError where a value is not finite; ValueError where there is none. -0.0 counts as 0.0."""
        values = np.sort(tensor.detach().cpu().numpy().ravel() + np.float32(0))
        if not values.size:
            raise ValueError("values: none, expected one or more")
        if not np.isfinite(values[[0, -1]]).all():  # infinities sort to the ends, NaN to the last place
            raise PayloadError("weights to cluster are not finite: local training diverged; lower the learning rate")
        middle = float(values[values.size // 2])
        sums, squares = np.zeros((2, values.size + 1))
        np.subtract(values, middle, out=sums[1:])
        np.square(sums[1:], out=squares[1:])
        np.cumsum(sums, out=sums)
        np.cumsum(squares, out=squares)
        return cls(values, sums, squares, middle)

    def bounds(self, centroids: np.ndarray) -> np.ndarray:
        """Where each cluster of ascending centroids begins, and where the last one ends: int64 [..., clusters + 1]."""
        found = np.zeros((*centroids.shape[:-1], centroids.shape[-1] + 1), np.int64)
        found[..., 1:-1] = np.searchsorted(self.values, midpoints(centroids), "right")
        found[..., -1] = self.values.size
        return found

    def distortions(self, centroids: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Of each cluster the sum of squared distances to its centroid, float64 [..., clusters]."""
        c = centroids.astype(np.float64) - self.middle
        ends = self.squares[bounds], self.sums[bounds]
        found: np.ndarray = np.diff(ends[0]) - 2 * c * np.diff(ends[1]) + c * c * np.diff(bounds)
        return np.maximum(found, 0)  # rounding

    def distinct(self, most: int) -> np.ndarray | None:
        """The distinct values, ascending, if there are at most `most`."""
        first = np.flatnonzero(self.values[1:] != self.values[:-1])
        return self.values[np.concatenate([[0], first + 1])] if first.size < most else None


def midpoints(centroids: np.ndarray) -> np.ndarray:
    """For each neighbouring pair of ascending centroids the last float32 that is not nearer to the upper one."""
    exact = (centroids[..., :-1].astype(np.float64) + centroids[..., 1:]) / 2
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def seeds(tensor: Tensor, clusters: int, rng: Rng) -> np.ndarray:
    """Values of the tensor, ascending float32 [clusters]; with fewer distinct ones all of them, the last repeated.

    k-means++: the first is drawn uniformly, each other with chance proportional to the squared distance from those
    before; of 3 + ln(clusters) draws that which leaves the least distortion stays, as in TensorFlow's operator.
    PayloadError where a value is not finite.
    """
    line = Line.of(tensor)
    if (few := line.distinct(clusters)) is not None:
        return np.concatenate([few, np.repeat(few[-1:], clusters - few.size)])
    tries = 3 + int(math.log(clusters))
    draws = iter(words(rng.seed(), 0, clusters * tries).astype(np.float64) * 2.0**-32)
    found, bounds, lost = _best(line, line.values[[[int(next(draws) * line.values.size)] for _ in range(tries)]])
    for _ in range(clusters - 1):
        far = np.cumsum(lost)
        drawn = np.array([_drawn(line, found, bounds, far, next(draws)) for _ in range(tries)])
        new = drawn[(drawn[:, None] != found).all(axis=1)]
        if not new.size:
            new = _farthest(line, found, bounds)
        candidates = np.empty((new.size, found.size + 1), np.float32)
        candidates[:, :-1], candidates[:, -1] = found, new
        candidates.sort(axis=1)
        found, bounds, lost = _best(line, candidates)
    return found


def _best(line: Line, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rows of centroids that which leaves the least distortion, with its bounds and each cluster's distortion."""
    bounds = line.bounds(candidates)
    left = line.distortions(candidates, bounds)
    best = int(left.sum(axis=1).argmin())
    return candidates[best], bounds[best], left[best]


def _drawn(line: Line, centroids: np.ndarray, bounds: np.ndarray, far: np.ndarray, u: float) -> np.float32:
    """The value at the share u of the summed squared distances; `far` [clusters] sums them over whole clusters."""
    cluster = min(int(np.searchsorted(far, u * far[-1], "right")), far.size - 1)
    rest = u * far[-1] - (far[cluster - 1] if cluster else 0.0)
    start, end, c = int(bounds[cluster]), int(bounds[cluster + 1]), float(centroids[cluster]) - line.middle
    s, q = line.sums.data, line.squares.data  # plain floats come out of these, faster than numpy's
    first_s, first_q = s[start], q[start]

    def up_to(i: int) -> float:
        return q[i + 1] - first_q - 2 * c * (s[i + 1] - first_s) + c * c * (i + 1 - start)

    at = bisect.bisect_right(range(start, end), rest, key=up_to)
    value: np.float32 = line.values[min(start + at, end - 1)]
    return value


def _farthest(line: Line, centroids: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The value farthest from its centroid: of each cluster one of its ends; [1]."""
    ends = line.values[np.stack([bounds[:-1], bounds[1:] - 1]).clip(0, line.values.size - 1)]
    away = np.where(np.diff(bounds) > 0, np.abs(ends - centroids), 0)
    return ends.ravel()[[int(away.argmax())]]


def lloyd(line: Line, centroids: np.ndarray, steps: int) -> np.ndarray:
    """Each centroid moves to the mean of its members, `steps` times; without members it stays. Ascending float32."""
    for _ in range(steps):
        bounds = line.bounds(centroids)
        members = np.diff(bounds)
        means = np.diff(line.sums[bounds]) / np.maximum(members, 1) + line.middle
        centroids = np.where(members > 0, means, centroids).astype(np.float32)
    return centroids


def distortion(line: Line, centroids: np.ndarray) -> float:
    """Mean squared distance to the nearest of ascending centroids."""
    return float(line.distortions(centroids, line.bounds(centroids)).sum()) / line.values.size


def assign(weights: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of ascending centroids [clusters] for each weight; in a tie the lower. int64."""
    exact = centroids.double()
    return torch.bucketize(weights.double(), (exact[:-1] + exact[1:]) / 2)


def nearest(weights: Tensor, centroids: Tensor) -> Tensor:
    """Each weight's nearest centroid [as weights], with a gradient for the centroids alone."""
    ascending, _ = centroids.sort()
    index = assign(weights.detach(), ascending.detach())
    if weights.is_cpu:
        return ascending.gather(0, index.flatten()).view_as(weights)
    return picked(ascending, index)


def picked(ascending: Tensor, index: Tensor) -> Tensor:
    """What gather gives [as index], but with a gradient summed in a fixed order: on a GPU gather's is not, and slow."""
    chosen = index.unsqueeze(-1) == torch.arange(ascending.shape[-1], device=index.device)
    return torch.where(chosen, ascending, 0.0).sum(-1)


def straight_through(weights: Tensor, centroids: Tensor) -> Tensor:
    """Each weight's nearest centroid [as weights]; its gradient goes to the weight, and summed to the centroid."""
    return nearest(weights, centroids) + (weights - weights.detach())


def pull(weights: Tensor, centroids: Tensor) -> Tensor:
    """Sum of the squared distances between weights and their nearest centroids."""
    return (weights - nearest(weights, centroids)).square().sum()


@torch.no_grad()
def clustered(weights: Tensor, centroids: Tensor) -> Tensor:
    """The weights replaced by their nearest centroids, for good. PayloadError where either is not finite."""
    if not bool(torch.isfinite(weights).all() and torch.isfinite(centroids).all()):
        raise PayloadError("weights to cluster are not finite: local training diverged; lower the learning rate")
    return nearest(weights, centroids) + 0.0  # of -0.0 and 0.0 only one travels


def rounded(weights: Tensor, number: int, rng: Rng) -> Tensor:
    """The weights in `number` clusters, which STEPS of Lloyd have found."""
    found = lloyd(Line.of(weights), seeds(weights, number, rng), STEPS)
    return clustered(weights, torch.from_numpy(found).to(weights.device))


# Centroids stand among what a client trains, under names of their own


def centroids(trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the tensors whose centroids they are."""
    return {key.removeprefix(_PREFIX): tensor for key, tensor in trainable.items() if key.startswith(_PREFIX)}


def first_centroids(trainable: Mapping[str, Tensor], names: Iterable[str], number: int, rng: Rng) -> dict[str, Tensor]:
    """`seeds` of the named tensors, on their device, to be trained."""
    found = {name: torch.from_numpy(seeds(trainable[name], number, rng)) for name in names}
    return {_PREFIX + name: mu.to(trainable[name].device).requires_grad_() for name, mu in found.items()}


_PREFIX = "centroids of "
