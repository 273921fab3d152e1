"""FedDQ's messages there and back: stochastic rounding and packing, unpacking and restoring, and coding the levels.

    python bench/quantize.py     prints the tables and writes bench/results/quantize.json

Targets, set before measuring: 80 million entries/s at 4 bits in each direction on two cores, as medians, of which one
thread is used, as clients do; entropy-coded levels at most 1 % + 64 bytes over their empirical entropy. A copy of the
same float32 entries stands beside it, taken in turns, since no quantizer can beat that.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from report import save

from fedlib.methods.feddq import quantizers
from fedlib.rng import Rng
from fedlib.wire import bits, entropy, levels

N = 2**24  # entries: 64 MiB, more than a cache holds
WIDTHS = (2, 4, 8, 12)
REPEATS = 9
TARGET = 80.0  # million entries/s
LAYER = 524_288  # weights of the first linear layer of FedDQ's network


def speeds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Million entries/s of each, median; taken in turns."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = perf_counter()
            call()
            seconds[name].append(perf_counter() - start)
    return {name: round(N / median(times) / 1e6, 1) for name, times in seconds.items()}


def update(n: int) -> torch.Tensor:
    """Entries with the tails that updates have: normal ones, of which a few are larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator).mul_(0.003)
    return x.mul_(torch.rand(n, generator=generator).mul_(2).add_(0.1))


def there_and_back(width: int) -> dict[str, Any]:
    x = update(N)
    low, span = quantizers.extent(x)
    copy = torch.empty_like(x)

    def there() -> tuple[bytes, bytes]:
        found = quantizers.affine(x, low, span, 2**width - 1, Rng(1))
        return levels.headers([found]), levels.pack([found], False)

    head, body = there()

    def back() -> torch.Tensor:
        (found,) = levels.unpack(memoryview(head), memoryview(body), [N], False)
        return quantizers.restore(found, N, "affine_stochastic")

    if len(body) != bits.size(N, width) or float((back() - x).abs().max()) > 1.001 * span / (2**width - 1):
        raise SystemExit(f"width {width}: the update did not come back")
    return {"width": width} | speeds({"there": there, "back": back, "copy": lambda: copy.copy_(x)})


def coded(width: int) -> dict[str, Any]:
    x = update(LAYER)
    low, span = quantizers.extent(x)
    found = quantizers.affine(x, low, span, 2**width - 1, Rng(1))
    bound = entropy.entropy_bits(np.bincount(found.levels)) / 8
    size = len(levels.pack([found], True))
    return {"width": width, "packed": bits.size(LAYER, width), "bound": round(bound, 1), "bytes": size}


def main() -> None:
    torch.set_num_threads(1)
    rows = [there_and_back(width) for width in WIDTHS]
    for row in rows:
        print(row)
    sizes = [coded(width) for width in WIDTHS]
    for row in sizes:
        row["allowed"] = round(1.01 * row["bound"] + 64, 1)
        print(row)
    (at_four,) = (row for row in rows if row["width"] == 4)
    met = min(at_four["there"], at_four["back"]) >= TARGET and all(row["bytes"] <= row["allowed"] for row in sizes)
    print("targets", "met" if met else "MISSED")
    content = {"entries": N, "layer": LAYER, "target": TARGET, "speed": rows, "coded": sizes}
    save("quantize", content, ("torch", "numpy", "constriction"))


if __name__ == "__main__":
    main()
