"""Quantizers of one tensor x [n]: x becomes integers of a width, and two numbers that say what these stand for.

    affine      level k stands for low + k step, step = range / intervals; stochastic or nearest rounding
    symmetric   nearest, around zero: level k stands for (k - 2^(width - 1)) step with the same step, so that entries
                beyond about half a range saturate. This is what two of FedDQ's three scripts do
    norm        QSGD's (Alistarh, Grubic, Li, Tomioka, Vojnovic, NeurIPS 2017, section 3.1): a sign, and |x_i| in steps
                of scale / intervals, rounded stochastically; the scale is the norm of x
    buckets     the same for every 512 entries, with their largest magnitude as scale (their section 5)

FedDQ's scripts: `lqu-001/FedDQ`, 8946cc1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlib.errors import PayloadError
from fedlib.rng import Rng, Stream
from fedlib.wire.levels import Levels

AFFINE = ("affine_stochastic", "affine_nearest", "symmetric_nearest")
BUCKET = 512  # entries
NORMED = {"norm": 0, "buckets": BUCKET}  # entries that share a scale; 0: all of a tensor
NOTHING = 1e-30  # a range below is none
_BLOCK = 2**16  # entries at a time: they stay in the cache
LARGEST = torch.finfo(torch.float32).max
DIVERGED = "update is not finite: local training diverged; lower the learning rate"


def extent(x: Tensor) -> tuple[float, float]:
    """Lowest entry and range of a tensor, exact as float64; 0 of none. PayloadError: not finite as float32."""
    if not x.numel():
        return 0.0, 0.0
    low, high = (float(bound) for bound in torch.aminmax(x))
    if not high - low <= LARGEST:
        raise PayloadError(DIVERGED)
    return low, high - low


def constant(value: float) -> Levels:
    """A tensor of one value takes no bits."""
    return Levels(0, value, 0.0, np.empty(0, np.uint8))


def affine(x: Tensor, low: float, span: float, intervals: int, rng: Rng | None, centre: int = 0) -> Levels:
    """x in [low, low + span], in `intervals` steps. rng: rounds stochastically; None: to the nearest, plus `centre`."""
    step = float(np.float32(span / intervals))
    if not step > 0:
        return constant(low)
    width = intervals.bit_length()
    return Levels(width, low, step, _round(x, low, step, intervals, width, rng, centre))


def symmetric(x: Tensor, span: float, width: int) -> Levels:
    """In steps of span / (2^width - 1), whichever schedule set the width."""
    return affine(x, 0.0, span, 2**width - 1, None, centre=2 ** (width - 1))


def restore(part: Levels, n: int, quantizer: str) -> Tensor:
    """x as the receiver sees it [n]: of `affine` and `symmetric`. PayloadError for a step that is not positive."""
    if not part.width:
        return torch.full((n,), part.first)
    if not part.second > 0:
        raise PayloadError(f"header: step {part.second}, expected one above 0")
    if quantizer == "symmetric_nearest":
        return _floats(part.levels).sub_(1 << (part.width - 1)).mul_(part.second)
    return _floats(part.levels).mul_(part.second).add_(part.first)


def norm(x: Tensor, intervals: int, rng: Rng, bucket: int) -> tuple[Levels, np.ndarray]:
    """Levels, the lowest bit of each the sign, and the scales as float32, one for each `bucket` entries (0: for all).

    bucket: scaled by the largest magnitude of the bucket; with 0 by the norm.
    """
    low, span = extent(x)
    if low == 0 and span == 0:
        return constant(0.0), np.zeros(scales_of(x.numel(), bucket), np.float32)
    rows = _rows(x, bucket)
    scales = rows.abs().amax(1) if bucket else rows.double().norm(dim=1).float()
    if not bool(torch.isfinite(scales).all()):
        raise PayloadError(DIVERGED)
    share = rows.abs().div_(scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).mul_(intervals).flatten()
    magnitudes = share.add_(rng.stream(x.device).uniform(*share.shape)).floor_().clamp_(max=intervals)
    signed = magnitudes.mul_(2).add_(rows.flatten() < 0)[: x.numel()]
    width = intervals.bit_length() + 1
    return Levels(width, float(intervals), 0.0, _integers(signed, width)), scales.cpu().numpy()


def restore_norm(part: Levels, n: int, scales: np.ndarray, bucket: int) -> Tensor:
    """The inverse, as the receiver sees it [n]. PayloadError: intervals that do not fit the width or the levels."""
    if not part.width:
        return torch.zeros(n)
    if not (part.first.is_integer() and part.first >= 1 and int(part.first).bit_length() == part.width - 1):
        raise PayloadError(f"header: {part.first} intervals of width {part.width}, one bit of which is the sign")
    if n and part.levels.max() >> 1 > part.first:
        raise PayloadError(f"levels: {part.levels.max() >> 1}, expected at most {part.first:.0f}")
    if (scales < 0).any():
        raise PayloadError(f"scales: {scales.min()}, expected none below 0")
    levels = _floats(part.levels)
    magnitudes = levels.mul(0.5).floor_()
    signs = levels.sub_(magnitudes, alpha=2).mul_(-2).add_(1)
    rows = _rows(magnitudes.mul_(signs), bucket)
    return rows.mul_(torch.from_numpy(scales.astype(np.float32) / np.float32(part.first)).unsqueeze(1)).flatten()[:n]


def scales_of(n: int, bucket: int | None) -> int:
    """Number of scales of a tensor; None: of quantizers without."""
    return 0 if bucket is None else -(-n // bucket) if bucket else 1


def _rows(x: Tensor, bucket: int) -> Tensor:
    flat = x.flatten()
    if not bucket:
        return flat.unsqueeze(0)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % bucket)).view(-1, bucket)


def _round(x: Tensor, low: float, step: float, most: int, width: int, rng: Rng | None, centre: int) -> np.ndarray:
    """(x - low) / step as integers from 0 to `most`; the centre is added to what was rounded.

    Block by block on a CPU, within its cache; on a GPU all at once, so that it is waited for once.
    """
    flat, draws = x.detach().flatten(), rng.stream(x.device) if rng else None
    levels = np.empty(flat.numel(), np.uint8 if width <= 8 else np.uint16)
    size = _BLOCK if x.is_cpu else max(1, x.numel())
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        y = (block - low).div_(step)
        if draws is None:
            y.round_().add_(centre)
        else:  # the integer below y + a number from [0, 1) is y in the mean
            y.add_(_chances(draws, len(y))).floor_()
        levels[start : start + size] = _integers(y.clamp_(0, most), width)
    return levels


def _chances(draws: Stream, count: int) -> Tensor:
    """Uniform on [0, 1), each block from a stream of its own, whatever is rounded at once."""
    return torch.cat([draws.uniform(min(_BLOCK, count - start)) for start in range(0, count, _BLOCK)])


def _integers(whole: Tensor, width: int) -> np.ndarray:
    numbers: np.ndarray = whole.cpu().numpy()
    return numbers.astype(np.int32).astype(np.uint8 if width <= 8 else np.uint16)


def _floats(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels.astype(np.float32))
