"""Draws of `fedlib.rng.Stream` made on a CUDA device: Philox4x64-10 in Triton, bit for bit numpy's.

Imported where a CUDA device draws, and nowhere else: Triton comes with torch's builds for CUDA alone. Its interpreter
(TRITON_INTERPRET=1) runs the same kernel on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # counters a program; each gives eight draws
MIDDLE = 1 << 63  # above: negative as the signed integers that Triton is handed
TRIED_SEEDS = (0, 0x0123456789ABCDEF, MIDDLE, 2 * MIDDLE - 1)
TRIED_COUNTS = (1, 7, 1024, 8 * BLOCK + 5)

# Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011: multipliers, and what keys grow by
M0, M1 = tl.constexpr(0xD2E7470EE14C6C93), tl.constexpr(0xCA5A826395121157)
W0, W1 = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBB67AE8584CAA73B)


def _fill(out, count, seed, stream, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x0 = (block + 1).to(tl.uint64)  # numpy counts up before it draws
    zero = x0 ^ x0
    x1, x2, x3 = zero, zero, zero
    # Widened with their sign first, so that a seed with its highest bit set keeps all its bits.
    k0, k1 = zero + seed.to(tl.int64).to(tl.uint64), zero + stream.to(tl.int64).to(tl.uint64)
    m0, m1 = zero + M0, zero + M1
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(m0, x0), tl.umulhi(m1, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, m1 * x2, high0 ^ x3 ^ k1, m0 * x0
        k0, k1 = k0 + W0, k1 + W1
    first = block * 8
    for place in tl.static_range(4):
        word = x0 if place == 0 else (x1 if place == 1 else (x2 if place == 2 else x3))
        low, high = (word >> 8) & 0xFFFFFF, word >> 40
        at = first + 2 * place
        # Below 2^24 a float32 holds every integer, and its product with a power of two: nothing is rounded.
        tl.store(out + at, low.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, mask=at < count)
        tl.store(out + at + 1, high.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, mask=at + 1 < count)


# Without specialising on values: a stream's number is another one at every draw, and would be compiled anew.
_kernel = triton.jit(_fill, do_not_specialize=["count", "seed", "stream"])


def uniform(seed: int, stream: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 on the multiples of 2^-24 in [0, 1): the upper 24 bits of each of `rng.words`."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    if count := math.prod(shape):
        with torch.cuda.device_of(out):
            grid = (-(-count // (8 * BLOCK)),)
            _kernel[grid](out, count, _signed(seed), _signed(stream), BLOCK=BLOCK, enable_fp_fusion=False)
    return out


def check(device: torch.device, expected: Callable[[int, int, tuple[int, ...], torch.device], Tensor]) -> None:
    """Compare some draws with others made of the same arguments. RuntimeError: where one bit differs."""
    for seed in TRIED_SEEDS:
        for stream, count in enumerate(TRIED_COUNTS):
            asked = seed, stream, (count,), device
            if not torch.equal(uniform(*asked), expected(*asked)):
                raise RuntimeError(f"its draws of seed {seed:#x}, stream {stream}, differ from numpy's")


def _signed(number: int) -> int:
    """The same 64 bits as a signed integer."""
    return (number + MIDDLE) % (2 * MIDDLE) - MIDDLE
