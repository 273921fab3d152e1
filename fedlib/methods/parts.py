"""What several methods share: named tensors as float32 bytes, the model as a message, a cohort's weighted mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.task import State, Task, count
from fedlib.uploads import Buffer
from fedlib.wire import container, floats


def pack_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> np.ndarray:
    """The named tensors, in the order of `shapes`, as float32 bytes. PayloadError where one is not finite."""
    return floats.encode([tensors[name].detach().cpu().numpy() for name in shapes], list(shapes))


def unpack_tensors(data: memoryview, shapes: Mapping[str, torch.Size]) -> State:
    """The inverse, copied out of the message. PayloadError: wrong length, or a value that is not finite."""
    arrays = floats.decode(data, list(shapes.values()), list(shapes))
    return {name: torch.tensor(array) for name, array in zip(shapes, arrays, strict=True)}


def pack_model(kind: str, tensors: Mapping[str, Tensor], samples: int, hyper: Any, task: Task) -> bytes:
    """The whole model in full precision. `kind` is method and direction, e.g. "fedavg.up"."""
    method = kind.partition(".")[0]
    return container.pack(kind, task.fingerprint(method, hyper), samples, [pack_tensors(tensors, task.tensors)])


def unpack_model(message: Buffer, kind: str, hyper: Any, task: Task) -> tuple[State, int]:
    """The inverse: tensors and sample count. PayloadError for any other message."""
    fingerprint = task.fingerprint(kind.partition(".")[0], hyper)
    read = container.unpack(message, kind, fingerprint, [4 * count(task.tensors)])
    return unpack_tensors(read.sections[0], task.tensors), read.samples


class RunningMean:
    """Mean of named tensors weighted by samples, summed in float64 in order of arrival; memory of one model."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.total = 0

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        for name, total in self.sums.items():
            total.add_(tensors[name].double(), alpha=weight)  # mixed types would take three times as long
        self.total += weight

    def value(self) -> State:
        return {name: (total / self.total).float() for name, total in self.sums.items()}
