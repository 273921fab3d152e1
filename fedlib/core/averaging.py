"""The mean of a cohort's tensors, weighted by samples."""

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
