"""A network and arrays of one's own beside the same as named entries: `fedlib.federate` both ways, in turns.

    python bench/own.py     prints the rows and writes bench/results/own.json

Aim: at most 3 % more time a round. The named network is built as the book builds it; the own one is that module, handed
over, and so are the images. One row a network and method:

    ms            a round by name, evaluation included: mean over a run's rounds, median over turns
    ratio         own over named of the same turn, median; ratios: that of each turn
    call_ratio    the same of the whole call: checks, digests and the trained module as well
    peak_bytes    most bytes in tensors during a call by name (`peak_memory`); peak_ratio: own over it
"""

import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peak_memory import Meter
from report import save

import fedlib
from fedlib.data import sets
from fedlib.models.registry import MODELS
from fedlib.rng import Rng

TURNS = 7  # after one that does not count
ROUNDS, EPOCHS, CLIENTS = 6, 1, 5
NETWORKS = ("mlp", "pooled4")
METHODS = ("fedavg", "fedmrn")


def calls(model: str, method: str) -> dict[str, Callable[..., fedlib.Run]]:
    held = sets.read(sets.find("digits"), Path("data"))
    module = MODELS[model](1, 8, 10, Rng(0))
    common: dict[str, Any] = dict(
        method=method,
        clients=CLIENTS,
        rounds=ROUNDS,
        epochs=EPOCHS,
        batch_size=10,
        lr=0.01,
        engine="process",
        device="cpu",
    )
    own = (held.train_x, held.train_y), (held.test_x, held.test_y)
    return {
        "named": functools.partial(fedlib.federate, model, "digits", **common),
        "own": functools.partial(fedlib.federate, module, *own, **common),
    }


def measure(model: str, method: str) -> dict[str, Any]:
    both = calls(model, method)
    rounds: dict[str, list[float]] = {name: [] for name in both}
    whole: dict[str, list[float]] = {name: [] for name in both}
    accuracies = set()
    for turn in range(TURNS + 1):
        for name, call in both.items():
            begin = time.perf_counter()
            run = call()
            seconds = time.perf_counter() - begin
            accuracies.add(run.accuracy)
            if turn:
                whole[name].append(seconds)
                rounds[name].append(sum(entry["seconds"] for entry in run.rounds) / ROUNDS)
    if len(accuracies) > 1:
        raise SystemExit(f"{model}, {method}: own and named differ, {accuracies}")
    peaks = {}
    for name, call in both.items():
        with Meter() as meter:
            call(rounds=1, epochs=1)  # every operation is watched, which takes long
        peaks[name] = meter.peak
    ratios = [round(own / named, 3) for own, named in zip(rounds["own"], rounds["named"], strict=True)]
    return {
        "network": model,
        "method": method,
        "ms": round(1e3 * median(rounds["named"]), 1),
        "ratio": median(ratios),
        "ratios": ratios,
        "call_ratio": round(median(own / named for own, named in zip(whole["own"], whole["named"], strict=True)), 3),
        "peak_bytes": peaks["named"],
        "peak_ratio": round(peaks["own"] / peaks["named"], 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for model, method in itertools.product(NETWORKS, METHODS):
        rows.append(measure(model, method))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    save("own", {"turns": TURNS, "rounds": ROUNDS, "clients": CLIENTS, "rows": rows})


if __name__ == "__main__":
    main()
