"""Seconds per round of each engine, in turns, on the device that is there; on a CPU with small images and few clients.

    python bench/engines.py [--device cpu]      (with PYTHONPATH=. where fedlib is not installed)

Synthetic images, dealt out evenly and unevenly: uneven shards end in batches of different lengths. One round without
evaluation, after two that do not count. Results of a CPU and of a GPU stand side by side in bench/results/engines.json.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from report import save

from fedlib.data import sets
from fedlib.data.images import Arrays
from fedlib.engines import select
from fedlib.runs import build, rounds
from fedlib.runs.machine import processor
from fedlib.runs.spec import Spec

WARM_UP, REPEATS = 2, 3
METHODS = ("fedavg", "fedmrn")
SPLITS = {"iid": {"kind": "iid", "seed": 0}, "dirichlet": {"kind": "dirichlet", "beta": 0.3, "seed": 0}}
# channels and side of the images, by network; samples a client, batch, cohort
SCALES = {
    "cuda": ({"mlp": (1, 28), "cnn2": (3, 32), "cnn4": (3, 32), "cnn8": (3, 32)}, 500, 64, 10),
    "cpu": ({"mlp": (1, 8), "cnn2": (1, 16), "cnn4": (1, 16), "cnn8": (1, 16)}, 64, 16, 4),
}
CLIENTS = 20


def read(channels: int, side: int, samples: int, _: object) -> Arrays:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(samples, channels, side, side, generator=draw).numpy()
    y = torch.randint(10, (samples,), generator=draw).numpy()
    return x, y, x[:10], y[:10]


def name_of(channels: int, side: int, samples: int) -> str:
    return f"bench {samples} x {channels} x {side} x {side}"


for _images, _samples, *_ in SCALES.values():  # here, so that the workers of a pool know them too
    for _shape in _images.values():
        _name = name_of(*_shape, CLIENTS * _samples)
        _read = functools.partial(read, *_shape, CLIENTS * _samples)
        _constants = ((0.0,) * _shape[0], (1.0,) * _shape[0])
        sets.ENTRIES[_name] = sets.Entry(_name, _read, tuple("0123456789"), *_constants, scale=1.0)


def spec(method: str, model: str, split: str, kind: str) -> Spec:
    images, samples, batch, cohort = SCALES[kind]
    labels = dict(paper="bench", profile="smoke", name="engines", group="engines", label=method, split=split)
    settings = dict(clients=CLIENTS, cohort=cohort, rounds=1000, epochs=1, batch=batch, lr=0.01, seed=0)
    return Spec(
        **labels, **settings, evaluate_every=1000, data=name_of(*images[model], CLIENTS * samples), model=model,
        method=method, hyper={}, partition=SPLITS[split],
    )  # fmt: skip


def measure(run: Spec, opened: dict[str, select.Engine]) -> dict[str, float]:
    """Median seconds of a round, by engine. Every engine trains the same rounds from the same states."""
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    job = build.job(run, next(iter(opened.values())).device)
    states = {name: rounds.initial(job) for name in opened}
    for number in range(1, WARM_UP + REPEATS + 1):
        for name, engine in opened.items():
            begin = time.perf_counter()
            states[name], _ = rounds.one_round(run, job, engine, states[name], number, {})
            seconds[name].append(time.perf_counter() - begin)
    return {name: round(statistics.median(measured[WARM_UP:]), 4) for name, measured in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    device = select.device(parser.parse_args().device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    names = ["process", "graphed", "stacked"] + (["pool"] if device.type == "cpu" else [])
    images, samples, batch, cohort = SCALES[device.type]
    print(f"{where}: {cohort} clients a round, {samples} images each on average, batches of {batch}")
    if device.type == "cpu":
        torch.set_num_threads(1)
    table = {}
    opened = {name: select.open_engine(name, str(device)) for name in names}
    try:
        for model in images:
            for method in METHODS:
                for split in SPLITS:
                    row = measure(spec(method, model, split, device.type), opened)
                    table[f"{model}, {method}, {split}"] = row
                    shown = "".join(f"  {n} {s:7.3f} s ({row['process'] / s:4.1f}x)" for n, s in row.items())
                    print(f"{model:5} {method:7} {split:10}{shown}", flush=True)
    finally:
        for engine in opened.values():
            engine.close()
    target = Path(__file__).parent / "results" / "engines.json"
    kept = json.loads(target.read_text(encoding="utf-8"))["devices"] if target.exists() else {}
    scale = {"clients a round": cohort, "images a client": samples, "batch": batch, "images": images}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    mine = {"device": where, "scale": scale, "versions": versions, "seconds a round": table}
    save("engines", {"devices": kept | {device.type: mine}})


if __name__ == "__main__":
    main()
