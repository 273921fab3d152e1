"""The contender `fedlib`: the benchmark's work through our own federated loop, messages and records included.

    python bench/pfl/fedlib_work.py --processes 2 --rounds 5

Its clients shuffle their images, and cohorts come from its own generator: its loss is near the others', not equal.
The images are always in the channels-last layout.
"""

import time

import torch
import work

from fedlib.data import sets
from fedlib.data.images import Arrays
from fedlib.engines import select
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec


def read(_: object) -> Arrays:
    images, labels = (torch.cat(parts).numpy() for parts in zip(*work.clients(False), strict=True))
    return images, labels, images[:500], labels[:500]


# Read again by each worker process, which imports this file.
sets.ENTRIES["pfl-work"] = sets.Entry("pfl-work", read, tuple("0123456789"), (0.0,) * 3, (1.0,) * 3, scale=1.0)


def main() -> None:
    chosen = work.options(__doc__)
    settings = dict(data="pfl-work", model="cnn2", partition={"kind": "iid", "seed": 0}, clients=work.CLIENTS)
    settings |= dict(
        cohort=work.COHORT, epochs=1, batch=work.BATCH, lr=work.LEARNING_RATE, seed=0, method="fedavg", hyper={}
    )
    labels = dict(paper="bench", profile="smoke", name="pfl", group="pfl", label="fedavg", split="iid")
    count = work.WARM_UP + chosen.rounds
    spec = Spec(**settings, **labels, rounds=count + 1, evaluate_every=count + 1)
    with select.open_engine("pool" if chosen.processes > 1 else "process", "cpu", chosen.processes) as engine:
        job = build.job(spec, engine.device)
        state, task = rounds.initial(job), job.task
        data = [(task.train[0][i : i + 50], task.train[1][i : i + 50]) for i in range(0, 1000, 50)]

        def loss() -> float:
            return work.loss_of(lambda x: task.logits(state.model, x), data)

        losses, ends = [loss()], [time.perf_counter()]
        for number in range(1, count + 1):
            state, _ = rounds.one_round(spec, job, engine, state, number, {})
            ends.append(time.perf_counter())
        work.report("fedlib", chosen, ends, [*losses, loss()], {})


if __name__ == "__main__":
    main()
