"""A client's round under each method of the comparison: time and memory beside FedAvg's.

    python bench/compare.py     prints the rows and writes bench/results/compare.json

The runs are those of experiments/compare.yaml, group main at profile lab: same network, client and epochs, and what
tuning found. One row a method:

    ms            CPU time of one thread from the bytes received to the bytes sent, median over turns
    time_ratio    over FedAvg's of the same turn, median; time_ratios: that of each turn
    peak_bytes    most bytes in tensors at any moment (`peak_memory`), the client's images left out
    memory_ratio  over FedAvg's
"""

import functools
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import torch
from peak_memory import Meter
from report import save

from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError
from fedlib.runs import build, experiments, rounds, spec

TURNS = 9  # after one that does not count
CLIENT = 0


def client(run: spec.Spec) -> tuple[Callable[[], Any], int]:
    """A client's round as a call, and its training samples."""
    engine = InProcess(torch.device("cpu"))
    job = build.job(run, engine.device)
    message = rounds.broadcast(job.method, rounds.initial(job), 1)
    call = functools.partial(engine.client, job, message, 1, CLIENT, b"" if run.feedback else None)
    if isinstance(refusal := call(), PayloadError):
        raise SystemExit(f"{run.label}: sends nothing: {refusal}")
    return call, len(job.task.indices(CLIENT))


def peak(call: Callable[[], Any]) -> int:
    with Meter() as meter:
        call()
    return meter.peak


def main() -> None:
    torch.set_num_threads(1)
    runs = experiments.specs("compare", "lab", "main_*_dirichlet-0.3_seed0")
    calls, samples = {}, {}
    for run in runs:
        calls[run.label], samples[run.label] = client(run)
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for turn in range(TURNS + 1):
        for label, call in calls.items():
            begin = process_time()
            call()
            if turn:
                seconds[label].append(process_time() - begin)
    peaks = {label: peak(call) for label, call in calls.items()}
    rows = []
    for label, own in seconds.items():
        ratios = [mine / plain for mine, plain in zip(own, seconds["fedavg"], strict=True)]
        rows.append(
            {
                "method": label,
                "ms": round(1000 * median(own), 2),
                "time_ratio": round(median(ratios), 3),
                "time_ratios": [round(ratio, 3) for ratio in ratios],
                "peak_bytes": peaks[label],
                "memory_ratio": round(peaks[label] / peaks["fedavg"], 3),
            }
        )
        print(rows[-1], flush=True)
    save("compare", {"rows": rows, "turns": TURNS, "samples": samples["fedavg"]})


if __name__ == "__main__":
    main()
