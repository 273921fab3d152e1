"""The randomised Hadamard rotation R = H D / sqrt(n) of a vector that is padded with zeros to n, a power of two.

H [n, n] is Sylvester's Hadamard matrix, D a diagonal of random signs under a travelling 64-bit seed. R is orthonormal,
H = H' and H H = n I, so the inverse is D H / sqrt(n).

What travels is the seed, signs and a scale. A client's `rotate` multiplies matrices, whose sums a library may order as
it likes: between machines the last bits may differ, and with them the sign of an entry that is almost zero. `unrotate`
of entries -1 and +1 adds up integers, which float32 does without rounding as long as no sum exceeds 2^24: in any
order, the multiplication by the scale is the only rounding, and a message decodes to the same bytes on every machine.
Up to n = 2^24 no sum can exceed it; beyond, the signs of a rotated vector give sums of some sqrt(n). All this unless
torch is told to multiply float32 matrices in a lower precision, which by itself it does not.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fedlib.rng import signs

RADIX = 8  # more saves passes over memory and costs arithmetic; bench/rotation.py compares


def padded(d: int) -> int:
    """n: the smallest power of two that is not below d >= 1."""
    return 1 << (d - 1).bit_length()


def transform(x: Tensor) -> Tensor:
    """H x for x [n], not normalised, by ceil(log n / log RADIX) products with a small matrix."""
    n = remaining = len(x)
    if n & (n - 1) or not n:
        raise ValueError(f"vector of {n} entries, expected a power of two")
    while remaining > 1:
        m = min(RADIX, remaining)
        x = (_hadamard(m, x.dtype, x.device) @ x.view(-1, m).T).view(-1)  # the last m-fold digit comes first now
        remaining //= m
    return x


def rotate(u: Tensor, seed: int) -> Tensor:
    """R u [n] for u [d], on u's device."""
    n = padded(len(u))
    mixed = torch.nn.functional.pad(u * _diagonal(seed, u), (0, n - len(u)))
    return transform(mixed) * (1 / math.sqrt(n))


def unrotate(y: Tensor, seed: int, d: int, scale: float = 1.0) -> Tensor:
    """scale R^-1 y [n], cut to the first d entries."""
    cut = transform(y)[:d]
    return (cut * _diagonal(seed, cut)).mul_(scale / math.sqrt(len(y)))


def _diagonal(seed: int, like: Tensor) -> Tensor:
    return torch.from_numpy(signs(seed, 0, len(like))).to(like)


@functools.lru_cache
def _hadamard(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester: H_2m = [[H_m, H_m], [H_m, -H_m]]."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < m:
        h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=dtype, device=device), h)
    return h
