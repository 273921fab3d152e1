"""Masks through the entropy coder, beside plain bit packing: bytes and speed on one core.

    python bench/entropy.py     prints the tables and writes bench/results/entropy.json

First masks of a million entries. Targets, set before measuring: at most 1 % over the empirical entropy plus 32 bytes;
50 million entries/s to encode and 20 million/s to decode, as medians.

Then binary masks of FedMRN, whose coder knows the magnitude |n| of the noise. Targets, set before measuring: at most
1 % over d H(m | |n|), the conditional entropy of the mask's law by numerical integration (64 bytes more where that is
below 2 KB); with 64 contexts 20 million entries/s to encode and 10 million/s to decode.
"""

import itertools
import math
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from report import save

from fedlib.rng import normal, uniform
from fedlib.wire import bits, entropy
from fedlib.wire.contexts import buckets

N = 1_000_000
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5)
REPEATS = 15
MIN_ENCODE, MIN_DECODE = 50.0, 20.0  # million entries/s

SIZES = (389_920, N)  # weights of CNN4 on grey images, and a million
NOISES = {"uniform": uniform, "gauss": normal}  # of magnitude 1
RHOS = (0.01, 0.03, 0.1, 0.3, 1.0)  # mean |u|
DRAWS = 3
CONTEXTS, MIN_ENCODE_CONTEXTS, MIN_DECODE_CONTEXTS = 64, 20.0, 10.0


def speed(call: Callable[[], object]) -> float:
    """Million entries/s, median of REPEATS calls after a first one that is not counted."""
    call()
    seconds = []
    for _ in range(REPEATS):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return round(N / median(seconds) / 1e6, 1)


def measure(density: float) -> dict[str, Any]:
    mask = np.random.default_rng(0).random(N) < density
    message, packed = entropy.encode(mask, 2), bits.pack(mask)
    if not np.array_equal(entropy.decode(message, N, 2), mask) or not np.array_equal(bits.unpack(packed, N), mask):
        raise SystemExit(f"density {density}: the mask did not come back")
    bound = entropy.entropy_bits(np.bincount(mask, minlength=2)) / 8
    row = {
        "density": density,
        "bound_bytes": round(bound, 1),
        "bytes": len(message),
        "codec": message[0],
        "over_bound_percent": round(100 * (len(message) / bound - 1), 3),
        "encode_million_per_s": speed(lambda: entropy.encode(mask, 2)),
        "decode_million_per_s": speed(lambda: entropy.decode(message, N, 2)),
        "packed_bytes": len(packed),
        "pack_million_per_s": speed(lambda: bits.pack(mask)),
        "unpack_million_per_s": speed(lambda: bits.unpack(packed, N)),
    }
    row["size_met"] = len(message) <= 1.01 * bound + 32
    row["speed_met"] = row["encode_million_per_s"] >= MIN_ENCODE and row["decode_million_per_s"] >= MIN_DECODE
    return row


def chance_of_one(law: str, rho: float, x: np.ndarray) -> np.ndarray:
    """P(m = 1 | |n| = x) = E min(|u|, x) / 2x for a symmetric u with mean |u| = rho."""
    if law == "constant":
        least = np.minimum(rho, x)
    elif law == "laplace":
        least = -rho * np.expm1(-x / rho)
    else:
        s = rho * math.sqrt(math.pi / 2)
        tail = np.array([math.erfc(v) for v in (x / (s * math.sqrt(2))).tolist()])
        least = x * tail - rho * np.expm1(-(x**2) / (2 * s**2))
    return least / (2 * x)


def drawn(law: str, rho: float, d: int, generator: np.random.Generator) -> np.ndarray:
    """u [d] of that law."""
    if law == "constant":
        return np.full(d, rho)
    return generator.laplace(0, rho, d) if law == "laplace" else generator.normal(0, rho * math.sqrt(math.pi / 2), d)


def mask_entropy(noise: str, law: str, rho: float, points: int = 100_000) -> float:
    """H(m | |n|) in bits an entry: midpoint rule over |n|."""
    top = 1.0 if noise == "uniform" else 7.0
    x = (np.arange(points) + 0.5) * (top / points)
    density = np.full(points, 1.0) if noise == "uniform" else math.sqrt(2 / math.pi) * np.exp(-(x**2) / 2)
    p = chance_of_one(law, rho, x)
    return float((density * -(p * np.log2(p) + (1 - p) * np.log2(1 - p))).sum() * top / points)


def measure_given_noise(noise: str, law: str, rho: float, d: int) -> dict[str, Any]:
    """Mean sizes of a few masks, and their excess over the entropy.

    Chance alone moves a size by about 1 %. So the excess is taken over the ideal code length of the same masks, the sum
    of -log2 P(m | |n|), whose expectation is the entropy.
    """
    sizes, alone, ideal, ones = [], [], [], []
    for seed in range(DRAWS):
        n, generator = NOISES[noise](seed, 0, d), np.random.default_rng(seed)
        mask = generator.random(d) < drawn(law, rho, d, generator) / np.where(n == 0, np.float32(1e-8), n)
        known = buckets(np.abs(n), 4.0)
        message = entropy.encode(mask, 2, known)
        if not np.array_equal(entropy.decode(message, d, 2, known), mask):
            raise SystemExit(f"{noise}, {law}, rho {rho}, d {d}: the mask did not come back")
        p = chance_of_one(law, rho, np.maximum(np.abs(n), 1e-8).astype(np.float64))
        ideal.append(-np.log2(np.where(mask, p, 1 - p)).sum() / 8)
        sizes.append(len(message))
        alone.append(len(entropy.encode(mask, 2)))
        ones.append(mask.mean())
    bound, excess = mask_entropy(noise, law, rho) * d / 8, float(np.mean(sizes) - np.mean(ideal))
    return {
        "noise": noise,
        "law": law,
        "rho": rho,
        "d": d,
        "density": round(float(np.mean(ones)), 5),
        "entropy_bytes": round(bound, 1),
        "ideal_bytes": round(float(np.mean(ideal)), 1),
        "bytes": round(float(np.mean(sizes)), 1),
        "over_entropy_percent": round(100 * excess / bound, 3),
        "alone_bytes": round(float(np.mean(alone)), 1),
        "packed_bytes": (d + 7) // 8,
        "size_met": excess <= 0.01 * bound + (64 if bound < 2048 else 0),
    }


def measure_contexts() -> dict[str, Any]:
    """Speeds with CONTEXTS equally frequent contexts in random order, the slowest to sort."""
    x = np.abs(uniform(0, 0, N))
    known = np.minimum(x * CONTEXTS, CONTEXTS - 1).astype(np.uint8)
    mask = np.random.default_rng(0).random(N) < chance_of_one("constant", 0.1, np.maximum(x, 1e-8))
    message = entropy.encode(mask, 2, known)
    row: dict[str, Any] = {
        "contexts": CONTEXTS,
        "encode_million_per_s": speed(lambda: entropy.encode(mask, 2, known)),
        "decode_million_per_s": speed(lambda: entropy.decode(message, N, 2, known)),
        "buckets_million_per_s": speed(lambda: buckets(x, 4.0)),
    }
    met = row["encode_million_per_s"] >= MIN_ENCODE_CONTEXTS and row["decode_million_per_s"] >= MIN_DECODE_CONTEXTS
    return row | {"speed_met": met}


def main() -> None:
    print("density     bound     bytes   over  encode  decode |  packed    pack  unpack   (bytes; million entries/s)")
    rows = []
    for density in DENSITIES:
        row = measure(density)
        rows.append(row)
        print(
            f"{density:7} {row['bound_bytes']:9.0f} {row['bytes']:9} {row['over_bound_percent']:5.2f}% "
            f"{row['encode_million_per_s']:7.0f} {row['decode_million_per_s']:7.0f} | {row['packed_bytes']:7} "
            f"{row['pack_million_per_s']:7.0f} {row['unpack_million_per_s']:7.0f}   "
            + ("ok" if row["size_met"] and row["speed_met"] else "TARGET MISSED")
        )
    print("\nnoise    law         rho         d  density | H(m||n|)     bytes   over |   alone   packed   (bytes)")
    given_noise = []
    for noise, law, rho, d in itertools.product(NOISES, ("constant", "laplace", "normal"), RHOS, SIZES):
        row = measure_given_noise(noise, law, rho, d)
        given_noise.append(row)
        print(
            f"{noise:8} {law:8} {rho:6} {d:9} {row['density']:8.4f} | {row['entropy_bytes']:8.0f} {row['bytes']:9.0f} "
            f"{row['over_entropy_percent']:5.2f}% | {row['alone_bytes']:7.0f} {row['packed_bytes']:8}   "
            + ("ok" if row["size_met"] else "TARGET MISSED")
        )
    speeds = measure_contexts()
    print("\n" + ", ".join(f"{name} {value}" for name, value in speeds.items()))
    measured = {"masks": rows, "masks_given_noise": given_noise, "contexts": speeds, "n": N, "repeats": REPEATS}
    save("entropy", measured, ("numpy", "constriction"))


if __name__ == "__main__":
    main()
