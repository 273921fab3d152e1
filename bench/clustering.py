"""Weight clustering: centroids of many weights, and their indexes as bytes.

    python bench/clustering.py     prints the tables and writes bench/results/clustering.json

Targets, set before measuring: ten million weights in 16 clusters, centroids and assignment, with five of Lloyd's steps
and without, in less than a second on two cores; coded indexes at most 1 % and 64 bytes over their empirical entropy.
Beside the first stands what anyone would write, k-means++ by passes over all weights, and scikit-learn's; in turns.
"""

import math
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from report import save
from sklearn.cluster import KMeans
from torch import Tensor

from fedlib.methods.fedcompress import clustering
from fedlib.rng import Rng
from fedlib.wire import codebook, entropy

N, CLUSTERS, STEPS, TURNS = 10_000_000, 16, 5, 5  # after a turn that does not count
SMALL = 1_000_000  # weights for scikit-learn, whose time is scaled by N / SMALL
TARGET = 1.0  # seconds
SIZES, NUMBERS = (432, 9216, 36_864, 1_000_000), (4, 8, 16, 30, 256)


def normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def ours(x: Tensor, steps: int) -> Tensor:
    mu = clustering.seeds(x, CLUSTERS, Rng(9))
    if steps:
        mu = clustering.lloyd(clustering.Line.of(x), mu, steps)
    return clustering.clustered(x, torch.from_numpy(mu))


def by_passes(x: Tensor) -> Tensor:
    """The same algorithm as anyone would write it: every candidate costs a pass over all weights."""
    generator, tries = torch.Generator().manual_seed(9), 2 + int(math.log(CLUSTERS))
    mu = x[torch.randint(len(x), (1,), generator=generator)]
    away = (x - mu).square_()
    for _ in range(CLUSTERS - 1):
        total = away.cumsum(0, dtype=torch.float64)
        at = torch.searchsorted(total, torch.rand(tries, dtype=torch.float64, generator=generator) * total[-1])
        shorter = [torch.minimum(away, (x - x[i]).square_()) for i in at]
        best = min(range(tries), key=lambda k: float(shorter[k].sum()))
        mu, away = torch.cat([mu, x[at[best]][None]]), shorter[best]
    return torch.cat([mu[(part[:, None] - mu).abs().argmin(1)] for part in x.split(2**16)])


def library(x: Tensor) -> None:
    KMeans(CLUSTERS, n_init=1, max_iter=STEPS, tol=0, random_state=9).fit(x.numpy()[:, None])


def many() -> dict[str, Any]:
    x, small = normal(N), normal(SMALL)
    results = {"ours": lambda: ours(x, 0), "ours, Lloyd": lambda: ours(x, STEPS), "by passes": lambda: by_passes(x)}
    calls: dict[str, Callable[[], object]] = {**results, "scikit-learn": lambda: library(small)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            begin = perf_counter()
            calls[name]()
            seconds[name].append((perf_counter() - begin) * (N / SMALL if name == "scikit-learn" else 1))
    found: dict[str, Any] = {}
    for name, own in seconds.items():
        ratio = median(mine / plain for mine, plain in zip(own[1:], seconds["ours"][1:], strict=True))
        found[name] = {"seconds": round(median(own[1:]), 3), "ratio": round(ratio, 1)}
    for name, call in results.items():
        found[name]["distortion"] = round(float((call() - x).square().mean()), 5)
    return found


def coded(n: int, number: int) -> dict[str, Any]:
    x = normal(n)
    values = clustering.clustered(x, torch.from_numpy(clustering.seeds(x, number, Rng(9)))).numpy()
    bound = entropy.entropy_bits(np.unique(values, return_counts=True)[1]) / 8
    size = len(codebook.encode([values])[1])
    fixed = codebook.fixed_bits([number], [n]) // 8 - 4 * number
    row = {"weights": n, "clusters": number, "bound": round(bound, 1), "bytes": size, "fixed": fixed}
    return row | {"met": size <= 1.01 * bound + 64}


def main() -> None:
    found = many()
    for name, row in found.items():
        print(f"{name:12}", row, flush=True)
    sizes = [coded(n, number) for n in SIZES for number in NUMBERS]
    for row in sizes:
        print(row)
    missed = [name for name in ("ours", "ours, Lloyd") if found[name]["seconds"] >= TARGET]
    missed += [f"{row['weights']:,} weights in {row['clusters']} clusters" for row in sizes if not row["met"]]
    print("targets met" if not missed else "\n".join(["targets MISSED", *missed]))
    settings = {"weights": N, "clusters": CLUSTERS, "steps": STEPS, "turns": TURNS, "target": TARGET, "missed": missed}
    save("clustering", settings | {"many": found, "coded": sizes}, ("torch", "numpy", "scikit-learn", "constriction"))


if __name__ == "__main__":
    main()
