"""How long runs take that no record tells of: from a few local steps of each network, timed on this machine.

Left out is what a method does beside them, and its messages: with masks or noise it may be twice as long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch

from fedlib.core.task import Task
from fedlib.runs import build
from fedlib.runs.spec import Spec

TURNS = 3  # timed, after one that is not
EXAMPLES = 256  # of a forward pass


def measure(specs: Iterable[Spec]) -> Callable[[Spec], float]:
    """A function from such a run to its seconds on one core. Takes about a second for each network and batch size."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # as clients train
    try:
        for spec in {_key(spec): spec for spec in specs}.values():
            task = build.task(spec, torch.device("cpu"))
            found[_key(spec)] = len(task.train[1]), len(task.test[1]), *_time(task, spec.batch)
    finally:
        torch.set_num_threads(threads)

    def seconds(spec: Spec) -> float:
        train, test, step, example = found[_key(spec)]
        own = train * (1 - spec.held_out) / spec.clients
        steps = spec.rounds * spec.cohort * spec.epochs * math.ceil(own / spec.batch)
        return steps * step + math.ceil(spec.rounds / spec.evaluate_every) * test * example

    return seconds


def _key(spec: Spec) -> tuple[str, str, int, float]:
    return spec.data, spec.model, spec.batch, spec.validation


def _time(task: Task, batch: int) -> tuple[float, float]:
    """Seconds of a local step, and of a test example."""
    model = task.initial()
    trained = {name: model[name].requires_grad_() for name in task.parameters}
    samples, x = (task.train[0][:batch], task.train[1][:batch]), task.test[0][:EXAMPLES]

    def evaluate() -> None:
        with torch.no_grad():
            task.logits(model, x)

    task.network.train()
    step = _least(lambda: torch.autograd.grad(task.loss(model, samples), [*trained.values()], allow_unused=True))
    task.network.eval()
    return step, _least(evaluate) / len(x)


def _least(call: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + TURNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])
