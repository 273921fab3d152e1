"""A right answer to every question of the labs that asks for a function."""

import math
from typing import Any

import numpy as np
import torch

from fedlib.rng import uniform
from fedlib.wire import bits


def quantize(x: Any, s: int, rng: Any, how: str = "") -> Any:
    low, step = float(x.min()), float(np.ptp(x)) / (s + (how == "levels"))
    if step == 0 and how != "zero":
        return np.zeros(len(x), np.int64), low, 0.0
    place = (x - low) / (np.float32(step) if step else 1e-30)
    drawn = np.rint(place) if how == "nearest" else np.floor(place + rng.random(len(x)))
    return np.minimum(drawn, s).astype(np.float32 if how == "floats" else np.int64), low, step


def restore(levels: Any, low: float, step: float) -> Any:
    return low + step * levels.astype(np.float64)


def pack(levels: Any, width: int) -> bytes:
    return bits.pack(np.asarray(levels, np.uint8), width)


def read(data: bytes, d: int, magnitude: float) -> Any:
    return uniform(int.from_bytes(data[:8], "little"), 0, d) * np.float32(magnitude) * bits.unpack(data[8:], d)


def write(seed: int, mask: Any) -> bytes:
    return seed.to_bytes(8, "little") + bits.pack(mask)


def clip(u: Any, bound: float) -> Any:
    return u * min(1.0, bound / max(float(np.linalg.norm(u)), 1e-20))


def noisy_mean(us: Any, bound: float, z: float, rng: Any) -> Any:
    return (sum(clip(u, bound) for u in us) + z * bound * rng.standard_normal(len(us[0]))) / len(us)


def find(u: Any, n: Any, rng: Any) -> Any:
    return rng.random(len(u)) < u / n


def on_front(costs: Any, accuracies: Any) -> Any:
    points = list(zip(costs, accuracies, strict=True))
    return np.array([not any(c <= p and a >= q and (c, a) != (p, q) for c, a in points) for p, q in points])


def entropy(p: float) -> float:
    return sum(-q * math.log2(q) for q in (p, 1 - p) if q)


FLOATS: tuple[Any, Any] = (lambda u, rng: u.tobytes(), lambda data, d: np.frombuffer(data, np.float32))
RIGHT: dict[str, Any] = {
    "quantize-and-pack/quantizer": (quantize, restore),
    "quantize-and-pack/packing": (pack, bits.unpack),
    "learn-a-mask/mask": lambda s, c: (torch.logit(c) < s).float(),
    "learn-a-mask/straight-through": lambda t, m: m + t - t.detach(),
    "make-it-sparse/entropy": entropy,
    "update-inside-noise/chance": lambda u, n: np.minimum(np.maximum(u / n, 0), 1),
    "update-inside-noise/mask": find,
    "update-inside-noise/message": (write, read),
    "freeze-and-privacy/clip": clip,
    "freeze-and-privacy/noisy-mean": noisy_mean,
    "design-a-codec/front": on_front,
    "design-a-codec/codec": FLOATS,
}
