"""What clusters cost a client: FedCompress beside the same without clusters, and the parts of the difference.

    python bench/clustered_training.py     prints the table and writes bench/results/clustered_training.json

Target, set before measuring: a client of FedCompress, one ordinary and one clustered epoch, takes at most 1.25 times as
long as one that trains two ordinary epochs. CPU seconds of one thread from the broadcast's bytes to the upload's, in
turns, on random samples shaped like those of the named data sets. The parts are timed by themselves, in percent of the
client without clusters: first centroids; once straight through all kernels and back in every step; the upload, with
the report on samples held out.
"""

import functools
from collections.abc import Callable, Mapping
from statistics import median
from time import process_time
from typing import Any

import torch
from report import save

from fedlib.core.method import AnyMethod
from fedlib.data import sets
from fedlib.data.images import Arrays
from fedlib.engines.in_process import InProcess
from fedlib.methods.fedcompress import clustering
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec

CLUSTERS, TURNS, TARGET = 16, 7, 1.25  # turns after one that does not count
CLIENTS = (  # network, data set whose shape the samples have, that shape, samples (a tenth held out), batch
    ("resnet20-quick", "fashion-mnist", (1, 28, 28), 300, 32),
    ("resnet20-quick", "fashion-mnist", (1, 28, 28), 300, 64),
    ("mobilenet-short", "spoken-digits", (1, 98, 40), 300, 32),
    ("pooled4", "digits", (1, 8, 8), 150, 32),
)


def turns(calls: Mapping[str, Callable[[], object]], number: int) -> dict[str, list[float]]:
    """CPU seconds of each call in each turn, the first turn left out; who comes first changes from turn to turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(number + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            begin = process_time()
            calls[name]()
            seconds[name].append(process_time() - begin)
    return {name: measured[1:] for name, measured in seconds.items()}


def read(shape: tuple[int, ...], samples: int, _: object) -> Arrays:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(samples, *shape, generator=draw).numpy(), torch.randint(10, (samples,), generator=draw).numpy()
    return x, y, x[:10], y[:10]


def spec(model: str, shape: tuple[int, ...], samples: int, batch: int, variant: str, epochs: int) -> Spec:
    name = f"bench {shape} {samples}"
    reader = functools.partial(read, shape, samples)
    sets.ENTRIES[name] = sets.Entry(name, reader, tuple("0123456789"), (0.0,), (1.0,), scale=1.0)
    labels = dict(paper="bench", profile="smoke", name="clustered", group="clustered", label=variant, split="iid")
    settings = dict(clients=1, cohort=1, rounds=1, evaluate_every=1, seed=0, held_out=0.1, optimizer="adam", lr=1e-3)
    hyper = {"variant": variant, "clustered_epochs": 1, "self_compression": False, "least": CLUSTERS, "augment": "none"}
    fields: dict[str, Any] = labels | settings
    return Spec(
        **fields, data=name, model=model, batch=batch, epochs=epochs, method="fedcompress", hyper=hyper,
        partition={"kind": "iid", "seed": 0},
    )  # fmt: skip


def client(network: str, data: str, shape: tuple[int, ...], samples: int, batch: int) -> dict[str, Any]:
    calls, parts, steps = {}, {}, 0
    for variant, epochs in (("code", 1), ("none", 2)):
        run = spec(network, shape, samples, batch, variant, epochs)
        job = build.job(run, torch.device("cpu"))
        message = rounds.broadcast(job.method, rounds.initial(job), 1)
        calls[variant] = functools.partial(InProcess(torch.device("cpu")).client, job, message, 1, 0)
        if not isinstance(calls[variant](), bytes):
            raise SystemExit(f"{network}: {variant} sends nothing")
        if variant == "code":
            parts, steps = pieces(job.method, message), job.task.plan.steps(len(job.task.indices(0)))
    seconds = turns(calls, TURNS)
    ratios = [c / n for c, n in zip(seconds["code"], seconds["none"], strict=True)]
    whole = 1000 * median(seconds["none"])
    row = {"network": network, "data": data, "batch": batch, "samples": samples, "steps": steps, "ms": round(whole, 1)}
    shares = {"seeds": parts["seeds"], "through": steps * parts["through"], "sending": parts["sending"]}
    row |= {"ratio": round(median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios]}
    return row | {"percent": {name: round(100_000 * s / whole, 1) for name, s in shares.items()}}


def pieces(method: AnyMethod, message: bytes) -> dict[str, float]:
    """CPU seconds: first centroids; straight through all kernels once, there and back; the upload with its report."""
    local = method.begin(message, method.task.shard(0), Rng(0))
    for phase in method.phases():
        if phase.prepare:
            phase.prepare(local, Rng(0))
    trainable = local.trainable
    centroids = clustering.centroids(trainable)
    inputs = [t for name, mu in centroids.items() for t in (trainable[name], mu)]

    def through() -> None:
        shown = [clustering.straight_through(trainable[name], mu) for name, mu in centroids.items()]
        torch.autograd.grad(shown, inputs, [s.detach() for s in shown])

    calls = {
        "seeds": lambda: clustering.first_centroids(trainable, centroids, CLUSTERS, Rng(9)),
        "through": through,
        "sending": lambda: method.upload(local, method.task.held(0), Rng(0)),
    }
    return {name: median(s) for name, s in turns(calls, 15).items()}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for case in CLIENTS:
        rows.append(client(*case))
        print(rows[-1], flush=True)
    missed = [f"{row['network']} on {row['data']}, batch {row['batch']}" for row in rows if row["ratio"] > TARGET]
    print("target met" if not missed else "\n".join(["target MISSED", *missed]))
    content = {"clusters": CLUSTERS, "turns": TURNS, "target": TARGET, "missed": missed, "clients": rows}
    save("clustered_training", content)


if __name__ == "__main__":
    main()
