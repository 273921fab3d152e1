"""What several methods share: named tensors as float32 bytes, the model as a message, a cohort's weighted mean."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.task import State, Task, count
from fedlib.uploads import Buffer
from fedlib.wire import container, floats

Shapes = Mapping[str, torch.Size]
NO_MORE: Shapes = {}


def pack_tensors(tensors: Mapping[str, Tensor], shapes: Shapes) -> np.ndarray:
    """The named tensors, in the order of `shapes`, as float32 bytes. PayloadError where one is not finite."""
    return floats.encode([tensors[name].detach().cpu().numpy() for name in shapes], list(shapes))


def unpack_tensors(data: memoryview, shapes: Shapes) -> State:
    """The inverse, copied out of the message. PayloadError: wrong length, or a value that is not finite."""
    arrays = floats.decode(data, list(shapes.values()), list(shapes))
    return {name: torch.tensor(array) for name, array in zip(shapes, arrays, strict=True)}


def pack_model(
    kind: str, tensors: Mapping[str, Tensor], samples: int, hyper: Any, task: Task, more: Shapes = NO_MORE
) -> bytes:
    """The whole model in full precision, and more tensors. `kind` is method and direction, e.g. "fedavg.up".

    On its way down, where another method writes it, the model is as precise as that leaves it.
    """
    sections: list[Any] = [pack_tensors(tensors, {**task.tensors, **more})]
    if task.downlink and kind.endswith(".down"):
        sections = [
            task.downlink.write_model({name: tensors[name] for name in task.tensors}, task),
            pack_tensors(tensors, more),
        ]
    return container.pack(kind, task.fingerprint(kind.partition(".")[0], hyper), samples, sections)


def unpack_model(message: Buffer, kind: str, hyper: Any, task: Task, more: Shapes = NO_MORE) -> tuple[State, int]:
    """The inverse: tensors and sample count. PayloadError for any other message."""
    fingerprint = task.fingerprint(kind.partition(".")[0], hyper)
    if task.downlink and kind.endswith(".down"):
        limits = [64 + 4 * count(task.tensors), 4 * count(more)]
        read = container.unpack(message, kind, fingerprint, limits)
        return task.downlink.read_model(read.sections[0], task) | unpack_tensors(read.sections[1], more), read.samples
    shapes = {**task.tensors, **more}
    arguments = (kind, fingerprint, tuple(shapes.items()))
    if kind.endswith(".down") and isinstance(message, bytes):
        arrays, samples = _checked_broadcast(message, *arguments)
    else:
        arrays, samples = _checked(message, *arguments)
    return {name: torch.tensor(array) for name, array in zip(shapes, arrays, strict=True)}, samples


def _checked(
    message: Buffer, kind: str, fingerprint: bytes, shapes: tuple[tuple[str, torch.Size], ...]
) -> tuple[list[np.ndarray], int]:
    names, sizes = [name for name, _ in shapes], [shape for _, shape in shapes]
    read = container.unpack(message, kind, fingerprint, [4 * sum(size.numel() for size in sizes)])
    return floats.decode(read.sections[0], sizes, names), read.samples


# All clients of a process read the same broadcast, one after the other: it is checked once.
_checked_broadcast = functools.lru_cache(maxsize=1)(_checked)


def positive(x: Tensor) -> Tensor:
    """1 where x > 0 and 0 elsewhere, as floats: on a CPU many times faster than comparisons and torch.where."""
    return torch.sign(torch.relu(x))


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

    def value(self) -> State:
        return {name: (total / self.total).float() for name, total in self.sums.items()}
