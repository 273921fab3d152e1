"""Networks of fixed random weights of which a mask is kept: the weights, what travels, and what papers call its size.

All parameters of the network are masked, biases included, in one vector [n] in the network's order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlib.core.plan import Shapes, Tensors
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError
from fedlib.methods.messages import positive
from fedlib.rng import signs
from fedlib.wire import container, entropy, floats

SCALES = {"kaiming": math.sqrt(2), "fedpm": math.e, "critical": 2.0}  # of the fixed weights, times 1 / sqrt(fan_in)
LEVELS = 2**16  # different probabilities that a broadcast by levels can hold


def fixed_weights(seed: int, scale: str, shapes: Shapes) -> Tensor:
    """w [n] on the CPU: +c or -c with equal chance, one c and one stream of the seed a tensor; the same everywhere."""
    parts, fan_in = [], 1
    for stream, shape in enumerate(shapes.values()):
        if len(shape) > 1:  # a bias has the constant of its layer
            fan_in = shape[1:].numel()
        parts.append(signs(seed, stream, shape.numel()) * np.float32(SCALES[scale] / math.sqrt(fan_in)))
    return torch.from_numpy(np.concatenate(parts))


@functools.lru_cache(maxsize=2)  # of one run: at the server and on its clients' device
def kept_weights(seed: int, scale: str, shapes: tuple[tuple[str, torch.Size], ...], device: str) -> Tensor:
    """The same on a device, for all clients and rounds: nobody may change them."""
    return fixed_weights(seed, scale, dict(shapes)).to(device)


def layers(flat: Tensor, shapes: Shapes) -> Tensors:
    """A vector [n] as the network's tensors by name (views)."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def largest(theta: Tensor, share: float) -> Tensor:
    """The mask [n], ones and zeros, of this share of one tensor's entries, one at least; of equal ones the first."""
    kept = max(1, int(share * len(theta)))
    least = torch.kthvalue(theta, len(theta) - kept + 1).values
    above, tied = positive(theta - least), (theta == least).to(theta.dtype)
    first = tied.cumsum(0, dtype=torch.int64) <= kept - above.sum().long()
    return above + tied * first


def pack_theta(theta: Tensor, levels: bool) -> list[bytes | np.ndarray]:
    """Probabilities [n] as float32; or by levels where that is shorter: the values that occur, then who has which."""
    plain = floats.encode([theta.numpy()], ["theta"])
    if levels:
        values, index = np.unique(theta.numpy(), return_inverse=True)
        if len(values) < LEVELS:
            coded = entropy.encode(index.astype(np.int32), len(values))
            if len(coded) + values.nbytes < plain.nbytes:
                return [values.astype("<f4").tobytes(), coded]
    return [plain]


def unpack_theta(sections: Sequence[memoryview], n: int) -> Tensor:
    """The inverse [n]. PayloadError: another length, or no probabilities."""
    count = n if len(sections) == 1 else len(sections[0]) // 4
    if not count:
        raise PayloadError("theta: no values, expected one or more")
    (values,) = floats.decode(sections[0], [(count,)], ["theta"])
    if not ((values >= 0) & (values <= 1)).all():
        raise PayloadError(f"theta: from {values.min()} to {values.max()}, expected probabilities")
    return torch.from_numpy(values[entropy.decode(sections[1], n, count)] if len(sections) > 1 else values.copy())


def pack_mask(mask: np.ndarray, contexts: np.ndarray | None) -> list[bytes]:
    """The number of ones in four bytes, and the entropy-coded bits."""
    return [int(mask.sum()).to_bytes(4, "little"), entropy.encode(mask, 2, contexts)]


def unpack_mask(sections: Sequence[memoryview], n: int, contexts: np.ndarray | None) -> Tensor:
    """The inverse [n], float32. PayloadError."""
    ones, coded = sections
    mask = entropy.decode(coded, n, 2, contexts)
    if len(ones) != 4 or int.from_bytes(ones, "little") != mask.sum():
        raise PayloadError(f"ones: the message states {int.from_bytes(ones, 'little')}, the mask has {mask.sum()}")
    return torch.from_numpy(mask).float()


def binary_entropy(p: Tensor) -> Tensor:
    """H(p) in bits, 0 at 0 and 1."""
    least = torch.finfo(p.dtype).tiny  # at 0 and 1 the gradient must not be 0 / 0
    return -(p * p.clamp(least).log() + (1 - p) * (1 - p).clamp(least).log()) / math.log(2)


def bits_a_parameter(share: float) -> float:
    """H(share), by FedPM's definition."""
    return float(binary_entropy(torch.tensor(share, dtype=torch.float64)))


def count_ones(upload: Buffer) -> int:
    """The ones of an upload's mask, as it states them."""
    start = len(upload) - 4 - sum(container.section_sizes(upload))
    return int.from_bytes(upload[start : start + 4], "little")
