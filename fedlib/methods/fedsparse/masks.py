"""Networks of fixed random weights of which a mask is kept: the weights, what travels, and what papers call its size.

All parameters of the network are masked, biases included, in one vector [n] in the network's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError, SpecError
from fedlib.rng import signs
from fedlib.wire import container, entropy, floats

SCALES = {"kaiming": math.sqrt(2), "fedpm": math.e, "critical": 2.0}  # of the fixed weights, times 1 / sqrt(fan_in)
LEVELS = 2**16  # different probabilities that a broadcast by levels can hold


def shapes_of(task: Task) -> dict[str, torch.Size]:
    """All parameters in the network's order, weights before bias: the order of a mask's bits."""
    if task.statistics:
        raise SpecError(
            "model: fedpm masks networks without BatchNorm, whose statistics depend on the mask; use another"
        )
    return task.parameters


def fixed_weights(seed: int, scale: str, task: Task) -> Tensor:
    """w [n] on the CPU: +c or -c with equal chance, one c and one stream of the seed a tensor; the same everywhere."""
    parts, fan_in = [], 1
    for stream, (name, shape) in enumerate(shapes_of(task).items()):
        if name in task.weights:  # a bias has the constant of its layer
            fan_in = shape[1:].numel()
        parts.append(signs(seed, stream, shape.numel()) * np.float32(SCALES[scale] / math.sqrt(fan_in)))
    return torch.from_numpy(np.concatenate(parts))


def layers(flat: Tensor, task: Task) -> State:
    """A vector [n] as the network's tensors by name (views)."""
    shapes = shapes_of(task)
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def coded_theta(theta: Tensor, levels: bool) -> list[bytes | np.ndarray]:
    """Probabilities [n] as float32; or by levels where that is shorter: the values that occur, then who has which."""
    plain = floats.encode([theta.numpy()], ["theta"])
    if levels:
        values, index = np.unique(theta.numpy(), return_inverse=True)
        if len(values) < LEVELS:
            coded = entropy.encode(index.astype(np.int32), len(values))
            if len(coded) + values.nbytes < plain.nbytes:
                return [values.astype("<f4").tobytes(), coded]
    return [plain]


def read_theta(sections: Sequence[memoryview], n: int) -> Tensor:
    """The inverse [n]. PayloadError: another length, or no probabilities."""
    count = n if len(sections) == 1 else len(sections[0]) // 4
    if not count:
        raise PayloadError("theta: no values, expected one or more")
    (values,) = floats.decode(sections[0], [(count,)], ["theta"])
    if not ((values >= 0) & (values <= 1)).all():
        raise PayloadError(f"theta: from {values.min()} to {values.max()}, expected probabilities")
    return torch.from_numpy(values[entropy.decode(sections[1], n, count)] if len(sections) > 1 else values.copy())


def read_seed(section: memoryview) -> int:
    if len(section) != 8:
        raise PayloadError(f"seed of {len(section)} bytes where 8 were expected")
    return int.from_bytes(section, "little")


def packed_mask(mask: np.ndarray, known: np.ndarray | None) -> list[bytes]:
    """The number of ones in four bytes, and the entropy-coded bits."""
    return [int(mask.sum()).to_bytes(4, "little"), entropy.encode(mask, 2, known)]


def unpacked_mask(sections: Sequence[memoryview], n: int, known: np.ndarray | None) -> np.ndarray:
    """The inverse [n], int32. PayloadError."""
    ones, coded = sections
    mask = entropy.decode(coded, n, 2, known)
    if len(ones) != 4 or int.from_bytes(ones, "little") != mask.sum():
        raise PayloadError(f"ones: the message states {int.from_bytes(ones, 'little')}, the mask has {mask.sum()}")
    return mask


def binary_entropy(p: Tensor) -> Tensor:
    """H(p) in bits, 0 at 0 and 1."""
    least = torch.finfo(p.dtype).tiny  # at 0 and 1 the gradient must not be 0 / 0
    return -(p * p.clamp(least).log() + (1 - p) * (1 - p).clamp(least).log()) / math.log(2)


def bits_a_parameter(share: float) -> float:
    """H(share), by FedPM's definition."""
    return float(binary_entropy(torch.tensor(share, dtype=torch.float64)))


def ones_in(upload: Buffer) -> int:
    start = len(upload) - 4 - sum(container.section_sizes(upload))
    return int.from_bytes(upload[start : start + 4], "little")
