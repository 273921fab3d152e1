"""Initial weights from a seed and the tensor's name alone, so that a client makes any single tensor again.

A tensor that is frozen is never sent: its law is part of the model. Values do not depend on the order of the modules,
on other tensors, on the device or on the version of a library (`rng.normal`, `rng.uniform`). Variances, with fan_in and
fan_out the weights that an output and an input channel have:

- he: 2 / fan_in, normal, cut at two standard deviations of the uncut law (Keras' HeNormal);
- glorot: 2 / (fan_in + fan_out), uniform (Keras' default);
- torch: 1 / (3 fan_in), uniform (PyTorch's default).

Whatever the law, the weights of a layer `head` are normal with deviation 0.01 and those of a layer `embedding` uniform
in [-0.05, 0.05), biases are 0 and scales of norms 1, as in the code of `google-research/federated`.

Only `normal_weights`, for networks that are trained whole, draws by the tensors' order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedlib.errors import require_name
from fedlib.rng import MASK64, Rng, normal, uniform

# Keras divides by the deviation of the standard normal law cut at -2 and 2, so that the variance is the law's after it.
CUT = 0.87962566103423978

Network = TypeVar("Network", bound=nn.Module)
Builder = Callable[[int, int, int, Rng], nn.Sequential]
"""From channels, side, classes and the root of the random draws to a network, initial weights included."""
Values = Callable[[int, Sequence[int]], np.ndarray]  # from the tensor's own seed and its shape, float32 [entries]


def initialise(network: Network, law: str, root: Rng) -> Network:
    """Every parameter by `law` and the seed of `root`, in place. SpecError: unknown law."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(values(number(root), name, p.shape, law))
    return network


def number(root: Rng) -> int:
    """The 64-bit seed s that stands for the initial weights; all that a client need be told of frozen ones."""
    return root.child("initial weights").seed()


def values(seed: int, name: str, shape: Sequence[int], law: str) -> Tensor:
    """float32 tensor `name` of the given shape, on the CPU. SpecError: unknown law."""
    require_name("law", law, LAWS)
    if len(shape) == 1:
        return torch.zeros(shape[0]) if name.endswith("bias") else torch.ones(shape[0])
    draw = OWN.get(name, LAWS[law])
    return torch.from_numpy(draw(seed_of(seed, name), shape)).reshape(tuple(shape))


def seed_of(seed: int, name: str) -> int:
    """The tensor's own seed: first 8 bytes, little-endian, of SHA-256 of s as 8 little-endian bytes and the name."""
    content = (seed & MASK64).to_bytes(8, "little") + name.encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def _he(seed: int, shape: Sequence[int]) -> np.ndarray:
    z = normal(seed, 0, math.prod(shape))
    stream = 0
    while (outside := np.flatnonzero(np.abs(z) > 2)).size:  # drawn again, until inside
        stream += 1
        z[outside] = normal(seed, stream, outside.size)
    return z * np.float32(math.sqrt(2 / math.prod(shape[1:])) / CUT)


def _uniform(seed: int, shape: Sequence[int], reach: float) -> np.ndarray:
    return uniform(seed, 0, math.prod(shape)) * np.float32(reach)


LAWS: dict[str, Values] = {
    "glorot": lambda seed, shape: _uniform(seed, shape, math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))),
    "he": _he,
    "torch": lambda seed, shape: _uniform(seed, shape, math.sqrt(1 / math.prod(shape[1:]))),
}
OWN: dict[str, Values] = {
    "embedding.weight": lambda seed, shape: _uniform(seed, shape, 0.05),
    "head.weight": lambda seed, shape: normal(seed, 0, math.prod(shape)) * np.float32(0.01),
}


def normal_weights(network: nn.Sequential, deviation: float | None, root: Rng) -> nn.Sequential:
    """Weights of convolutions and linear layers normal around 0, biases 0; BatchNorm keeps scale 1 and shift 0.

    deviation: None is sqrt(2 / fan_in), which keeps the variance through layers with ReLU (He et al., ICCV 2015).
    """
    seed = number(root)
    with torch.no_grad():
        for index, (label, p) in enumerate(network.named_parameters()):
            if p.ndim > 1:
                own = math.sqrt(2 / p[0].numel()) if deviation is None else deviation
                p.copy_(torch.from_numpy(normal(seed, index, p.numel()).reshape(p.shape) * own))
            elif label.endswith("bias"):
                p.zero_()
    return network
