"""What several methods share: named tensors as float32 bytes, and the weighted mean of a cohort as a running sum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedlib.task import State
from fedlib.wire import floats


def pack_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> np.ndarray:
    """The named tensors, in the order of `shapes`, as float32 bytes. PayloadError where one is not finite."""
    return floats.encode([tensors[name].detach().cpu().numpy() for name in shapes], list(shapes))


def unpack_tensors(data: memoryview, shapes: Mapping[str, torch.Size]) -> State:
    """The inverse, copied out of the message. PayloadError: wrong length, or a value that is not finite."""
    arrays = floats.decode(data, list(shapes.values()), list(shapes))
    return {name: torch.tensor(array) for name, array in zip(shapes, arrays, strict=True)}


class RunningMean:
    """Mean of named tensors, weighted by samples; summed in float64 in order of arrival, in one model's memory."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.total = 0

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        for name, total in self.sums.items():
            total.add_(tensors[name], alpha=weight)
        self.total += weight

    def value(self) -> State:
        return {name: (total / self.total).float() for name, total in self.sums.items()}
