"""What freezing saves: bytes, counted work, time and memory of local training under each policy of FedPT.

    python bench/partial.py [--device cuda]     prints the rows and writes bench/results/partial.json

With --device cuda it is partial_cuda.json. Targets, those of the method's specification: messages of 4 bytes a trained
entry and at most 64 more; under every policy less time and less memory than full training; times in the order of the
counted work, where that differs by more than 5 % of full training. Random samples; one row a network and policy:

    trained, parameters    entries of the tensors that are trained, and of all
    bytes_down, bytes_up   lengths of the messages of `FedPT.broadcast` and `FedPT.upload`
    macs, macs_ratio       multiply-accumulates of training on one example (`fedlib.models.macs`), and over those of
                           "none"
    step_ms, step_ratio    time of a step of `fedlib.core.client.train` with plain SGD, median over turns; and over that
                           of "none" in the same turn, median. CPU time of one thread; on a GPU wall-clock time.
    step_ratios            that ratio in each turn
    state_bytes            sgd, momentum, adam: the formula 4 (d + d_y (1 + k)) for d parameters, d_y of them trained, a
                           gradient and k = 0, 1, 2 tensors of the optimizer for each of these
    peak_bytes             the same three: most bytes in tensors at any moment of local training (`peak_memory`), the
                           client's samples left out. On a GPU torch.cuda.max_memory_allocated.
    held_bytes             of these, what is there before the first step, without the optimizer's: the network's own
                           weights, frozen and trained part, and the trained part as it came (to form the update)
    activation_bytes       what the forward pass leaves behind for the backward pass of one batch
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from peak_memory import Meter
from report import save
from torch import Tensor

from fedlib.core import client as client_side
from fedlib.core.client import Member
from fedlib.core.method import Phase
from fedlib.core.plan import Plan, count
from fedlib.core.task import Task
from fedlib.data.partition import Partition
from fedlib.engines import select
from fedlib.methods.fedpt.method import FedPT
from fedlib.models import macs
from fedlib.models.freezing import frozen_names
from fedlib.models.registry import build
from fedlib.rng import Rng

TURNS = 15  # after one that does not count
STEPS = 3  # of local training a turn
CONTAINER = 64  # bytes a message may have beyond its entries
RESOLUTION = 0.05  # of full training, set after a first trial: smaller differences of work are lost in the noise
OPTIMIZERS: dict[str, dict[str, Any]] = {"sgd": {}, "momentum": {"momentum": 0.9}, "adam": {"optimizer": "adam"}}


class Case(NamedTuple):
    channels: int
    side: int  # of images in pixels; of texts their tokens
    classes: int
    batch: int
    policies: tuple[str, ...]  # the first is full training


CASES = {
    "emnist": Case(1, 28, 62, 20, ("none", "emnist/dense1", "emnist/conv", "emnist/all_but_head")),
    "resnet18-gn": Case(3, 24, 10, 20, ("none", "cifar/s4", "cifar/s34", "cifar/s234", "cifar/s1234")),
    "transformer": Case(1, 80, 65, 10, ("none", "so/ffn", "so/att", "so/blocks")),
}


def samples(network: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """One client's, random, in the layout in which tasks hold them."""
    case, generator = CASES[network], torch.Generator().manual_seed(1)
    n = STEPS * case.batch
    if network == "transformer":
        tokens = torch.randint(case.classes, (n, case.side + 1), generator=generator)
        x, y = tokens[:, None, :-1, None].float(), tokens[:, 1:].contiguous()
    else:
        x = torch.randn(n, case.channels, case.side, case.side, generator=generator)
        y = torch.randint(case.classes, (n,), generator=generator)
    return x.to(device, memory_format=torch.channels_last), y.to(device)


def task_of(network: str, device: torch.device) -> Task:
    case, none = CASES[network], (torch.zeros(0), torch.zeros(0))
    module = build(network, case.channels, case.side, case.classes, Rng(0)).to(device)
    parameters = {name: p.shape for name, p in module.named_parameters()}
    return Task(
        network=module,
        weights={name: shape for name, shape in parameters.items() if len(shape) > 1},
        vectors={name: shape for name, shape in parameters.items() if len(shape) == 1},
        statistics={},
        plan=Plan(epochs=1, batch=case.batch, lr=0.01),
        train=none,
        test=none,
        partition=Partition.of([np.arange(0)]),
        device=device,
    )


class Client:
    """Local training under a policy, with the library's own functions."""

    def __init__(self, task: Task, policy: str, shard: tuple[Tensor, Tensor]) -> None:
        self.method, self.shard = FedPT(policy=policy).bind(task), shard
        self.state = self.method.initial(Rng(0))
        self.message = self.method.broadcast(self.state)

    def begin(self) -> Member:
        rng = Rng(0)
        return Member(0, rng, self.shard, self.method.begin(self.message, self.shard, rng), None)

    def train(self, member: Member, **plan: Any) -> None:
        phase = Phase(dataclasses.replace(self.method.task.plan, **plan))
        client_side.enter(member, 0, phase)
        client_side.train(self.method, phase, [member])

    def held(self, member: Member) -> list[Tensor]:
        made, _ = self.method.frozen_part(self.state.own.seed)
        parts = (member.local.trainable, member.local.frozen, made)
        return [*self.method.task.network.parameters(), *(tensor for part in parts for tensor in part.values())]


def sizes(client: Client) -> dict[str, Any]:
    """The counted part of a row."""
    method, shapes = client.method, client.method.task.parameters
    trained, parameters = count(method.trained), count(shapes)
    upload = method.upload(client.begin().local, client.shard, Rng(0))
    messages = {"bytes_down": len(client.message), "bytes_up": len(upload)}
    if not all(0 <= size - 4 * trained <= CONTAINER for size in messages.values()):
        raise SystemExit(f"{method.policy}: {messages} for {trained} trained entries")
    products = macs.count(method.task.network, client.shard[0], frozen_names(method.policy, shapes))
    state = {name: 4 * (parameters + trained * (1 + k)) for k, name in enumerate(OPTIMIZERS)}
    counted = {"trained": trained, "parameters": parameters, "macs": macs.total(products).total, "state_bytes": state}
    return messages | counted


def memory(client: Client) -> dict[str, Any]:
    """The measured bytes of a row."""
    member = client.begin()
    x, y = (part[: client.method.task.plan.batch] for part in client.shard)
    with Meter(client.held(member)) as meter:
        held = meter.now
        loss = client.method.loss(member.local.trainable, member.local.frozen, (x, y), None)
        activations = meter.now - held
    del loss, meter, member
    peaks = {name: peak(client, plan) for name, plan in OPTIMIZERS.items()}
    return {"held_bytes": held, "activation_bytes": activations, "peak_bytes": peaks}


def peak(client: Client, plan: dict[str, Any]) -> int:
    member = client.begin()
    if client.method.task.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        client.train(member, **plan)
        return torch.cuda.max_memory_allocated()
    with Meter(client.held(member)) as meter:
        client.train(member, **plan)
    return meter.peak


def times(clients: list[Client], clock: Callable[[], float]) -> list[dict[str, float]]:
    """The times of a row, for each client; the first is what the others are compared with."""
    seconds: list[list[float]] = [[] for _ in clients]
    for turn in range(TURNS + 1):
        for client, measured in list(zip(clients, seconds, strict=True))[:: 1 if turn % 2 else -1]:
            member = client.begin()
            begin = clock()
            client.train(member)
            measured.append(clock() - begin)
    rows = []
    for measured in seconds:
        ratios = [round(own / full, 3) for own, full in zip(measured[1:], seconds[0][1:], strict=True)]
        row = {"step_ms": round(1000 * median(measured[1:]) / STEPS, 2)}
        rows.append(row | {"step_ratio": round(median(ratios), 3), "step_ratios": ratios})
    return rows


def synchronized() -> float:
    torch.cuda.synchronize()
    return perf_counter()


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Targets that a network's rows do not meet; the first is full training."""
    found = []
    full = rows[0]
    for row in rows[1:]:
        if row["step_ratio"] >= 1:
            found.append(f"{row['policy']}: no less time")
        larger = [name for name, size in row["peak_bytes"].items() if size >= full["peak_bytes"][name]]
        found += [f"{row['policy']}: no less memory with {name}" for name in larger]
    for less, more in itertools.permutations(rows, 2):
        if less["macs_ratio"] < more["macs_ratio"] - RESOLUTION and less["step_ratio"] >= more["step_ratio"]:
            found.append(f"{less['policy']}: less work than {more['policy']}, but no less time")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = select.device(parser.parse_args().device)
    torch.set_num_threads(1)
    clock = process_time if device.type == "cpu" else synchronized
    rows: list[dict[str, Any]] = []
    misses: list[str] = []
    for network, case in CASES.items():
        task, shard = task_of(network, device), samples(network, device)
        clients = [Client(task, policy, shard) for policy in case.policies]
        counted = [sizes(client) for client in clients]
        own = []
        for client, row, timed in zip(clients, counted, times(clients, clock), strict=True):
            labels = {"network": network, "policy": client.method.policy, "batch": case.batch}
            ratio = {"macs_ratio": round(row["macs"] / counted[0]["macs"], 4)}
            own.append(labels | row | ratio | timed | memory(client))
            print(own[-1], flush=True)
        rows += own
        misses += missed(own)
    print("targets met" if not misses else "\n".join(["targets MISSED", *misses]))
    content = {"turns": TURNS, "steps": STEPS, "resolution": RESOLUTION, "missed": misses, "rows": rows}
    if device.type == "cuda":
        content["gpu"] = torch.cuda.get_device_name()
    save("partial" if device.type == "cpu" else "partial_cuda", content)


if __name__ == "__main__":
    main()
