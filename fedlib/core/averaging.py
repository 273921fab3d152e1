"""The mean of a cohort's tensors, weighted by samples; and what may stand in its place where some clients lie.

    clipped   the same mean of changes, none longer than the median one: norm clipping (Sun, Kairouz, Suresh, McMahan,
              "Can You Really Backdoor Federated Learning?", 2019), by a threshold that needs no setting
    median    of each entry by itself (Yin, Chen, Kannan, Bartlett, ICML 2018)
    trimmed   the mean of each entry without its largest and smallest tenth, at least one of each (the same)

The last two count clients alike: how many samples a client has is its own word.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlib.core.plan import Shapes, Tensors

BLOCK = 2**15  # entries; 256 KiB in float64


class RunningMean:
    """Mean of named tensors weighted by samples, summed in float64 in order of arrival; memory of one model."""

    def __init__(self, shapes: Shapes) -> None:
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.scratch = torch.empty(BLOCK, dtype=torch.float64)
        self.total = 0

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        for name, total in self.sums.items():
            # Widened block by block, in memory that stays in the cache: this is the server's main work.
            for part, more in zip(total.view(-1).split(BLOCK), tensors[name].reshape(-1).split(BLOCK), strict=True):
                part.add_(self.scratch[: len(part)].copy_(more), alpha=weight)
        self.total += weight

    def value(self) -> Tensors:
        return {name: (total / self.total).float() for name, total in self.sums.items()}


RULES = ("clipped", "median", "trimmed")
TRIMMED = 0.1  # share of clients that is left out at each end


class RobustMean:
    """As `RunningMean`, by another rule; memory of one model for each client."""

    def __init__(self, rule: str, shapes: Shapes, center: Mapping[str, Tensor]) -> None:
        """center: from where changes are counted, by name; zeros for what is not there."""
        self.rule, self.shapes, self.total = rule, shapes, 0
        self.center = {name: center.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
        self.rows: list[tuple[Tensors, int]] = []

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        self.rows.append(({name: tensors[name].float() - center for name, center in self.center.items()}, weight))
        self.total += weight

    def value(self) -> Tensors:
        changes = self._clipped() if self.rule == "clipped" else self._by_rank()
        return {name: center + changes[name] for name, center in self.center.items()}

    def _clipped(self) -> Tensors:
        squares = [sum(float(d.double().square().sum()) for d in row.values()) for row, _ in self.rows]
        norms = torch.tensor(squares).sqrt()
        factors = (norms.quantile(0.5) / norms.clamp(min=1e-30)).clamp(max=1)
        mean = RunningMean(self.shapes)
        for (row, weight), factor in zip(self.rows, factors.tolist(), strict=True):
            mean.add({name: d * factor for name, d in row.items()}, weight)
        return mean.value()

    def _by_rank(self) -> Tensors:
        n = len(self.rows)
        out = (n - 1) // 2 if self.rule == "median" else min(max(1, int(TRIMMED * n)), (n - 1) // 2)
        ranked = {name: torch.stack([row[name] for row, _ in self.rows]).sort(0).values for name in self.shapes}
        return {name: entries[out : n - out].double().mean(0).float() for name, entries in ranked.items()}
