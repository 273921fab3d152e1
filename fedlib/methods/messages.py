"""What several methods share: named tensors as float32 bytes, and the model as a message."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.core.plan import Shapes, State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer
from fedlib.wire import container, floats

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
