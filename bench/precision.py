"""Products in bfloat16 beside float32: images a second of local steps, and the accuracy that each method ends with.

    python bench/precision.py            all of it
    python bench/precision.py --speed    the first alone

Targets: faster on every convolutional network; the mean accuracy of no method differs by more than its seeds spread.
Accuracies are those of the comparison's runs (experiments/compare.yaml, profile lab, group main), trained here in both.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import save
from torch import nn
from tqdm import tqdm

from fedlib.core.task import PRECISIONS
from fedlib.engines import freed_memory
from fedlib.models import registry
from fedlib.rng import Rng
from fedlib.runs import build, grid
from fedlib.runs.experiments import specs

NETWORKS = {  # batch size, channels and side of their papers
    "cnn4": (64, 1, 28),
    "cnn8": (64, 3, 32),
    "conv4": (128, 1, 28),
    "conv6": (128, 3, 32),
    "vanilla": (64, 1, 28),
    "resnet20": (128, 3, 32),
    "mlp256": (128, 1, 28),
}
TURNS, SECONDS = 5, 0.5  # each turn of each precision takes about so long


def step_of(name: str, precision: str, batch: int, channels: int, side: int) -> Callable[[], None]:
    network = registry.build(name, channels, side, 10, Rng(0)).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    y, parameters = torch.randint(0, 10, (batch,)), list(network.parameters())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != PRECISIONS[0], cache_enabled=False):
            logits = network(x).float()
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, y), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-0.01)

    return step


def measure_speed() -> dict[str, Any]:
    """Images a second on one core, median of turns of both; and their ratio."""
    found = {}
    for name, (batch, *shape) in tqdm(NETWORKS.items(), unit="network", disable=None):
        steps = {precision: step_of(name, precision, batch, *shape) for precision in PRECISIONS}
        rates: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for turn in range(1 + TURNS):
            for precision, step in steps.items():
                count, begin = 0, time.perf_counter()
                while (seconds := time.perf_counter() - begin) < SECONDS or not count:
                    step()
                    count += 1
                if turn:  # the first is a warm-up
                    rates[precision].append(count * batch / seconds)
        ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
        found[name] = {precision: round(statistics.median(rate)) for precision, rate in rates.items()}
        found[name]["ratio"] = round(statistics.median(ratios), 2)
        print(name, found[name], flush=True)
    return found


def measure_accuracy() -> dict[str, Any]:
    """Percent after the last quarter of the rounds, by method and precision, a value a seed."""
    planned = specs("compare", "lab", "main_*")
    runs = [dataclasses.replace(spec, precision=precision) for precision in PRECISIONS for spec in planned]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            own = [spec for spec in runs if spec.precision == precision]
            made = grid.run_all(own, 2, root=Path(folder) / precision)
            for spec, record in zip(own, tqdm(made, total=len(own), desc=precision, disable=None), strict=True):
                if isinstance(record, Exception):
                    raise record
                late = [entry["accuracy"] for entry in record["rounds"] if entry["accuracy"] is not None]
                value = 100 * statistics.mean(late[-(len(late) // 4) :])
                found.setdefault(spec.label, {}).setdefault(precision, []).append(round(value, 2))
    for label, values in found.items():
        print(label, values)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--speed", action="store_true", help="images a second alone, which are printed and not kept")
    given = options.parse_args()
    if not build.has_bfloat16():
        raise SystemExit("this processor has no bfloat16")
    torch.set_num_threads(1)
    freed_memory.keep()
    speed = measure_speed()
    if not given.speed:
        save("precision", {"speed": speed, "accuracy": measure_accuracy()})


if __name__ == "__main__":
    main()
