"""A bare training step of CNN4, outside of fedlib: what the card itself gives, by layout, precision and lanes.

A lane is a step captured for itself, with its own weights and stream. Several are replayed side by side: if two give
nearly twice one's images a second, a step leaves most of the card idle.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from card_rows import Rows, settled
from torch.nn import functional

from fedlib.models.registry import build
from fedlib.rng import Rng

BATCH = 64
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = ("ieee", "tf32", "bf16")
Step = Callable[[], None]


def precision(name: str) -> None:
    """For convolutions and matrix products from now on. bf16 is no more than a measurement: no run trains in it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"


def plain(device: torch.device, layout: torch.memory_format, narrow: bool) -> Step:
    """Forward, backward and SGD on one batch of made-up images."""
    network = build("cnn4", 1, 28, 10, Rng(0)).to(device).to(memory_format=layout)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked = None
    x = Rng(0).stream(device).uniform(BATCH, 1, 28, 28).contiguous(memory_format=layout)
    y = torch.arange(BATCH, device=device) % 10
    parameters: list[torch.Tensor] = list(network.parameters())

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow, cache_enabled=False):
            loss = functional.cross_entropy(network(x), y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-0.01)

    return step


def kernels(device: torch.device, step: Step) -> int:
    """How many kernels a step starts; on a CPU, how many of torch's own operations."""
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
        settled(device)
    return sum(1 for event in profile.events() if event.device_type.name == device.type.upper())


def captured(step: Step) -> tuple[Step, torch.cuda.Stream]:
    """The step as a graph, and the stream that it is to be replayed on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, stream


def lanes(device: torch.device, make: Callable[[], Step], count: int, steps: int) -> float:
    """Images a second of so many captured steps side by side; on a CPU, of the plain step."""
    if device.type == "cpu":
        run: list[tuple[Step, Any]] = [(make(), None)]
    else:
        run = [captured(make()) for _ in range(count)]

    def turn() -> None:
        for replay, stream in run:
            if stream is None:
                replay()
            else:
                with torch.cuda.stream(stream):
                    replay()

    turn()
    begin = settled(device)
    for _ in range(steps):
        turn()
    return steps * len(run) * BATCH / (settled(device) - begin)


def cases(device: torch.device) -> Iterator[tuple[str, str, bool, int]]:
    if device.type == "cpu":
        yield from (("channels_last", name, False, 1) for name in ("ieee", "bf16"))
        return
    yield from (
        (layout, name, tuned, 1) for tuned, layout, name in itertools.product((False, True), LAYOUTS, PRECISIONS)
    )
    yield from (("channels_last", name, False, count) for name, count in itertools.product(("ieee", "tf32"), (2, 4, 8)))


def measure(rows: Rows, device: torch.device) -> None:
    for layout, name, tuned, count in cases(device):
        label = f"bare step, {layout}, {name}, cudnn.benchmark {'on' if tuned else 'off'}, lanes {count}"
        with rows.attempt(label):
            precision(name)
            torch.backends.cudnn.benchmark = tuned

            def make(layout: str = layout, name: str = name) -> Step:
                return plain(device, LAYOUTS[layout], name == "bf16")

            begin = settled(device)
            launched = kernels(device, make()) if count == 1 else None
            speed = lanes(device, make, count, 5 if device.type == "cpu" else 300)
            rows.add(label, images_per_s=round(speed), kernels=launched, seconds=round(settled(device) - begin, 2))
    precision("ieee")
    torch.backends.cudnn.benchmark = False
