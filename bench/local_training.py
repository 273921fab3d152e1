"""Local training of fedlib against a bare torch loop: the same steps on the same batches, one thread, in turns.

    python bench/local_training.py

CPU seconds of the process, since wall-clock time measures the machine's other work too. The target is a ratio of at
most 1.05 for FedAvg, on the networks of FedMRN; FedMRN's own arithmetic is shown beside it. On FedPM's networks the
target is a ratio of at most 1.6 to FedAvg for training masks, Adam included.
"""

import statistics
import time
from typing import Any

import torch
from report import save
from torch import nn

from fedlib.core import client
from fedlib.data import sets
from fedlib.data.images import Arrays
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec

REPEATS = 12
FEDAVG: tuple[str, str, dict] = ("fedavg", "fedavg", {})


def read(_: object) -> Arrays:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(1200, 1, 28, 28, generator=draw).numpy(), torch.randint(10, (1200,), generator=draw).numpy()
    return x, y, x[:10], y[:10]


sets.ENTRIES["bench"] = sets.Entry("bench", read, tuple("0123456789"), (0.0,), (1.0,), scale=1.0)


def spec(method: str, hyper: dict, model: str, **changes: Any) -> Spec:
    labels = dict(paper="bench", profile="smoke", name="local", group="local", label=method, split="iid")
    settings = dict(clients=2, cohort=1, rounds=1, epochs=1, batch=64, lr=0.01, evaluate_every=1, seed=0)
    fields: dict[str, Any] = labels | settings | changes
    return Spec(
        **fields, data="bench", model=model, method=method, hyper=hyper, partition={"kind": "iid", "seed": 0},
        optimizer="adam" if method == "fedpm" else "sgd",
    )  # fmt: skip


def bare(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int, lr: float) -> None:
    """What anyone would write for one client; the batches that fedlib draws under the same name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    for index in Rng(0).child("order").stream().permutation(len(x)).split(batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    table = {}
    noise = [("fedmrn binary", "fedmrn", {}), ("fedmrn signed", "fedmrn", {"mask": "signed"})]
    masks = [("fedpm", "fedpm", {"lam": 0.0}), ("fedpm, penalty", "fedpm", {"lam": 1.0})]
    for model, others in (
        ("cnn4", noise),
        ("cnn8", noise),
        ("conv4-narrow", masks),
        ("conv4", masks),
        ("mlp256", masks),
    ):
        jobs = {name: build.job(spec(method, hyper, model), cpu) for name, method, hyper in [FEDAVG, *others]}
        messages = {name: job.method.broadcast(rounds.initial(job)) for name, job in jobs.items()}
        seconds: dict[str, list[float]] = {"bare loop": []} | {name: [] for name in jobs}
        task = jobs["fedavg"].task
        x, y = task.shard(0)
        for turn in range(REPEATS + 1):
            for name in list(seconds)[:: 1 if turn % 2 else -1]:  # who comes first has the colder cache
                if name == "bare loop":
                    begin = time.process_time()
                    bare(task.network, x, y, 64, 0.01)
                else:
                    method = jobs[name].method
                    local, (phase,) = method.begin(messages[name], (x, y), Rng(0)), method.phases()
                    member = client.Member(0, Rng(0), (x, y), local, memory=None)
                    begin = time.process_time()
                    client.enter(member, 0, phase)
                    client.train(method, phase, [member])
                seconds[name].append(time.process_time() - begin)
        steps = -(-len(x) // 64)
        for name, measured in seconds.items():
            ratios = [m / b for m, b in zip(measured[1:], seconds["bare loop"][1:], strict=True)]
            row = {"ms_per_step": 1000 * statistics.median(measured[1:]) / steps, "ratio": statistics.median(ratios)}
            table[f"{model}, {name}"] = {key: round(value, 3) for key, value in row.items()}
            print(
                f"{model}  {name:14} {row['ms_per_step']:7.1f} ms a step of 64 images   {row['ratio']:.3f} x bare loop"
            )
    save("local_training", {"models": table})


if __name__ == "__main__":
    main()
