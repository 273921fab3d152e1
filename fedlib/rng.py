"""Every random draw of a run, derived by name from one integer.

What travels as a seed (noise, weights) and what is drawn in training (batch order, masks, rounding) are the same bytes
on every device, platform and library version: they are made of the words of the counter-based generator Philox4x64-10
(Salmon et al., SC 2011) by nothing but sorting and IEEE additions, multiplications, divisions and square roots.
Known-answer tests fix them. Partitions, and the noise of private training, are numpy's.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("fedlib")
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Rng:
    """A place in the tree of names, e.g. `Rng(7).child("client", round, client)`; siblings are independent."""

    base: int
    path: tuple[str | int, ...] = ()

    def child(self, *names: str | int) -> Rng:
        return Rng(self.base, self.path + names)

    def seed(self) -> int:
        """64-bit seed of this place: a hash, so that neighbouring rounds and clients share nothing."""
        text = repr(tuple(name if isinstance(name, str) else int(name) for name in (self.base, *self.path))).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def stream(self, device: torch.device | str = "cpu") -> Stream:
        """Draws of this place, one after the other."""
        return Stream(self.seed(), torch.device(device))

    def torch(self) -> torch.Generator:
        """torch's own generator, on the CPU and by the lower 32 bits of the seed: for checks, not for runs."""
        return torch.Generator().manual_seed(self.seed())


class Stream:
    """Draws in training: the k-th is made of the words of stream k, so that it does not depend on the others' sizes."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device, self.count = seed, device, 0

    def uniform(self, *shape: int) -> Tensor:
        """float32 on the multiples of 2^-24 in [0, 1), on the device."""
        draw = _on_gpu(self.device) if self.device.type == "cuda" else _on_cpu
        return draw(self.seed, self._next(), shape, self.device)

    def permutation(self, count: int) -> Tensor:
        """The integers below `count`, in the order of so many words of 64 bits; on the CPU."""
        drawn = words(self.seed, self._next(), 2 * count).view("<u8")
        return torch.from_numpy(np.argsort(drawn, kind="stable"))

    def _next(self) -> int:
        self.count += 1
        return self.count - 1


def _on_cpu(seed: int, stream: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    drawn = (words(seed, stream, math.prod(shape)) >> 8).astype(np.float32)
    return torch.from_numpy(drawn).mul_(2**-24).view(shape).to(device)


@functools.cache
def _on_gpu(device: torch.device) -> Callable[[int, int, tuple[int, ...], torch.device], Tensor]:
    """What makes the same draws on this GPU; after one warning the CPU's way, where it cannot be had or differs."""
    try:
        from fedlib import philox_kernel

        philox_kernel.check(device, _on_cpu)
    except Exception as error:  # a compiler fails in many ways, and the CPU draws the same numbers
        log.warning("%s: draws are made on the CPU: %s: %s", device, type(error).__name__, error)
        return _on_cpu
    return philox_kernel.uniform


def words(seed: int, stream: int, count: int) -> np.ndarray:
    """`count` travelling uint32 words of stream `stream` (a layer's index, say) under a 64-bit seed."""
    philox = np.random.Philox(key=np.array([seed & MASK64, stream], dtype=np.uint64))
    return philox.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]


def uniform(seed: int, stream: int, count: int) -> np.ndarray:
    """Travelling float32 draws, uniform on the multiples of 2^-23 in [-1, 1)."""
    return (words(seed, stream, count) >> 8).astype(np.float32) * np.float32(2**-23) - np.float32(1)


def signs(seed: int, stream: int, count: int) -> np.ndarray:
    """Travelling float32 draws, -1 or +1 with probability 1/2 each; one bit of the stream an entry."""
    bits = np.unpackbits(words(seed, stream, -(-count // 32)).view(np.uint8), count=count, bitorder="little")
    return bits.astype(np.float32) * np.float32(2) - np.float32(1)


def normal(seed: int, stream: int, count: int) -> np.ndarray:
    """Travelling float32 draws from the standard normal law, by inversion (Wichura 1988, algorithm AS 241, PPND7)."""
    drawn = words(seed, stream, count)
    blocks = [_invert(drawn[start : start + _BLOCK]) for start in range(0, count, _BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


def _invert(drawn: np.ndarray) -> np.ndarray:
    """The normal law's quantiles of uint32 words, float32."""
    p = (drawn.astype(np.float64) + 0.5) * 2.0**-32
    q = p - 0.5
    r = 0.180625 - q * q
    z = q * _horner(r, _A) / _horner(r, _B)
    tail = np.flatnonzero(np.abs(q) > 0.425)
    r = np.sqrt(-_log(np.minimum(p[tail], 1 - p[tail]))) - 1.6
    z[tail] = np.copysign(_horner(r, _C) / _horner(r, _D), q[tail])
    return z.astype(np.float32)


def sample(rng: Rng, population: int, count: int) -> list[int]:
    """`count` distinct integers below `population`, uniform without replacement (Floyd; memory O(count))."""
    words64 = np.random.Philox(key=np.array([rng.seed(), 0], dtype=np.uint64)).random_raw(count)
    chosen: dict[int, None] = {}
    for word, top in zip(words64.tolist(), range(population - count, population), strict=True):
        draw = (word * (top + 1)) >> 64
        chosen[top if draw in chosen else draw] = None
    return list(chosen)


def binomial(rng: Rng, trials: int, chance: float) -> int:
    """How many of `trials` independent draws, each with this chance, succeed."""
    generator = np.random.Generator(np.random.Philox(key=np.array([rng.seed(), 0], dtype=np.uint64)))
    return int(generator.binomial(trials, chance))


def _horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    # One numpy operation a step: no fused multiply-add, whose result would depend on the processor.
    y = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def _log(x: np.ndarray) -> np.ndarray:
    # A mathematical library's logarithm may differ in the last bit; this series uses exact IEEE steps only.
    mantissa, exponent = np.frexp(x)
    s = (mantissa - 0.75) / (mantissa + 0.75)
    series = _horner(s * s, tuple(1 / k for k in range(1, 24, 2)))
    return exponent * 0.6931471805599453 + (2 * s * series - 0.2876820724517809)


_BLOCK = 2**14  # entries whose float64 steps stay in the processor's cache
_A = (3.3871327179, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1)
_B = (1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1)
_C = (1.4234372777, 2.7568153900, 1.3067284816, 1.7023821103e-1)
_D = (1.0, 7.3700164250e-1, 1.2021132975e-1)
