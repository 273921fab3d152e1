"""Masks of a million entries through the entropy coder, beside plain bit packing: bytes and speed on one core.

    python bench/entropy.py     prints the table and writes bench/results/entropy.json

Targets, set before measuring: at most 1 % over the empirical entropy plus 32 bytes; 50 million entries/s to encode and
20 million/s to decode, as medians.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from report import save

from fedlib.wire import bits, entropy

N = 1_000_000
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5)
REPEATS = 15
MIN_ENCODE, MIN_DECODE = 50.0, 20.0  # million entries/s


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
    save("entropy", {"masks": rows, "n": N, "repeats": REPEATS}, ("numpy", "constriction"))


if __name__ == "__main__":
    main()
