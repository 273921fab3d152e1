"""Private training as a part of a method: its settings checked, clipped updates summed, noise, what the run has spent.

A client counts for a whole, whatever its samples. The server is trusted with the updates, each no longer than the
agreed bound, and adds the noise. The mechanisms are those of `fedlib.methods.fedpt.mechanisms`.

Epsilon is that of a server whose noise and cohorts are secret, and of the models that it sends. Here both follow from
the run's seed, so that a run can be repeated, and a record also tells who took part and how many updates were clipped.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, NoUpdate, Uploads
from fedlib.errors import PayloadError, SpecError, require_name, require_number
from fedlib.methods.fedpt import accounting, mechanisms
from fedlib.methods.fedpt.tree_sensitivity import queue_weight
from fedlib.rng import Rng

if TYPE_CHECKING:
    from fedlib.runs.spec import Spec

MECHANISMS = ("none", "dp_fedavg", "dp_ftrl")
ROUNDING = 1e-5  # by which a clipped norm may differ from the bound, as float32 is sent
log = logging.getLogger("fedlib")


def validate(hyper: Any) -> None:
    """SpecError: a setting out of range, missing, or not for private training."""
    require_name("hyper.mechanism", hyper.mechanism, MECHANISMS)
    if not hyper.private:
        for field in ("clip_norm", "noise_multiplier", "delta"):
            if value := getattr(hyper, field):
                raise SpecError(
                    f"hyper.{field}: {value!r} needs a mechanism; take dp_fedavg or dp_ftrl, or leave it out"
                )
        return
    require_number("hyper.clip_norm", hyper.clip_norm, 1e-9, 1e9)
    require_number("hyper.noise_multiplier", hyper.noise_multiplier, 0, 1e6)
    if not hyper.delta:
        raise SpecError("hyper.delta: not given, and an epsilon means nothing without it; take say clients ** -1.1")
    require_number("hyper.delta", hyper.delta, 1e-300, 1)
    if hyper.weighting != "clients":
        raise SpecError(f"hyper.weighting: {hyper.weighting!r} lets a client weigh more than others; take clients")
    if hyper.mechanism == "dp_ftrl" and hyper.optimizer != "sgd":
        raise SpecError(f"hyper.optimizer: dp_ftrl is an optimizer itself, not {hyper.optimizer!r}; take sgd")


def check(hyper: Any, spec: Spec) -> None:
    """SpecError where the accounting does not hold for the way in which clients are drawn."""
    if not hyper.private:
        return
    fitting = [sampler for mechanism, sampler in accounting.NEIGHBOURS if mechanism == hyper.mechanism]
    if spec.sampling not in fitting:
        raise SpecError(
            f"sampling: {spec.sampling!r} is not what the accounting of {hyper.mechanism} assumes; "
            f"allowed: {' '.join(fitting)}"
        )
    if hyper.delta >= 1 / spec.clients:
        raise SpecError(f"hyper.delta: {hyper.delta} must be below 1 / clients, which is {1 / spec.clients:.3g}")


def spent(hyper: Any, spec: Spec) -> float:
    """Epsilon of the whole run, infinite without noise. RunError: the package dp-accounting is missing."""
    turns: dict[str, Any] = {"clients": spec.clients, "cohort": spec.cohort}
    if hyper.mechanism == "dp_ftrl" and spec.rounds * spec.cohort <= spec.clients:
        turns["participations"] = 1
    elif hyper.mechanism == "dp_ftrl":
        turns["weight"] = queue_weight(spec.clients, spec.cohort, spec.rounds)
    turns |= {"noise_multiplier": hyper.noise_multiplier, "rounds": spec.rounds, "delta": hyper.delta}
    return accounting.epsilon(hyper.mechanism, spec.sampling, **turns)


def summary(hyper: Any, spec: Spec) -> dict[str, Any]:
    """{"privacy": ...} of a private run; its epsilon, rounded up to six places, is null without noise."""
    if not hyper.private:
        return {}
    epsilon = spent(hyper, spec)
    said: dict[str, Any] = {
        "mechanism": hyper.mechanism,
        "sampling": spec.sampling,
        "neighbours": accounting.NEIGHBOURS[hyper.mechanism, spec.sampling],
        "clip_norm": hyper.clip_norm,
        "noise_multiplier": hyper.noise_multiplier,
        "epsilon": math.ceil(1e6 * epsilon) / 1e6 if math.isfinite(epsilon) else None,
        "delta": hyper.delta,
    }
    return {"privacy": said}


def notes(state: State, hyper: Any, task: Task) -> dict[str, Any]:
    """In private training the share of the round's updates that were clipped."""
    if not hyper.private:
        return {}
    clipped, updates = state["clipped"].tolist()
    return {"clipped": clipped / updates if updates else 0.0}


def initial(trained: State, hyper: Any, task: Task, rng: Rng) -> State:
    """What the server keeps beside the trained tensors. RunError: noise without the package that tells its epsilon.

    Two runs must not share their noise, or their difference would show the updates. Here they do not where they differ
    in seed, method, network, plan, cohort, samples or partition; they do where only the way to draw cohorts differs.
    """
    if not hyper.private:
        return {}
    if hyper.noise_multiplier:
        accounting.package()
    labels = hashlib.blake2b(task.train[1].cpu().numpy().tobytes()).hexdigest()
    samples = (labels, task.partition.hash, repr(task.held_out))
    rng = rng.child(task.fingerprint("noise", hyper).hex(), repr(task.plan), task.cohort, *samples)
    kept = vars(mechanisms.ftrl_start(mechanisms.flatten(trained))) if hyper.mechanism == "dp_ftrl" else {}
    noise = rng.child("noise").seed().to_bytes(8, "little")
    state = {"noise": torch.frombuffer(bytearray(noise), dtype=torch.uint8)}
    return state | {"clipped": torch.zeros(2, dtype=torch.int64)} | kept


def gather(
    state: State, uploads: Uploads, decode: Callable[[Buffer], tuple[State, int]], hyper: Any, size: int
) -> tuple[State, Tensor]:
    """The sum of all updates, flat; a longer one than agreed is refused. Nobody may come: then it is zero."""
    total, clipped = torch.zeros(size, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)

    def bounded(upload: Buffer) -> tuple[State, int]:
        change, samples = decode(upload)
        change, norm = mechanisms.clip(change, hyper.clip_norm)
        if norm > hyper.clip_norm * (1 + ROUNDING):
            raise PayloadError(f"update is longer than the agreed bound {hyper.clip_norm}")
        clipped.add_(torch.tensor([norm > hyper.clip_norm * (1 - ROUNDING), 1]))
        return change, samples

    try:
        for change, _ in uploads.read(bounded):
            total += mechanisms.flatten(change)
    except NoUpdate:
        log.info("a round without any update: it consists of noise")
    return state | {"clipped": clipped}, total


def mean(state: State, total: Tensor, hyper: Any, cohort: int, shapes: Mapping[str, torch.Size]) -> State:
    """DP-FedAvg's mean over the expected cohort, with this round's noise."""
    rng = _noise(state).child("round", int(state["rounds"]))
    noisy = mechanisms.private_mean(
        total, rng, noise_multiplier=hyper.noise_multiplier, bound=hyper.clip_norm, cohort=cohort
    )
    return mechanisms.unflatten(noisy.float(), shapes)


def ftrl(state: State, total: Tensor, hyper: Any, cohort: int, shapes: Mapping[str, torch.Size]) -> State:
    """The state after a round of DP-FTRL-M, one tree for the whole run."""
    rounds = int(state["rounds"]) + 1
    std = hyper.noise_multiplier * hyper.clip_norm / cohort
    noise = mechanisms.tree_noise(_noise(state).child("tree"), rounds, len(total), std)
    kept = mechanisms.Ftrl(state["start"], state["total"], state["velocity"])
    kept, point = mechanisms.ftrl_step(kept, -total / cohort, noise, lr=hyper.server_lr, momentum=hyper.momentum)
    return state | vars(kept) | mechanisms.unflatten(point, shapes) | {"rounds": state["rounds"] + 1}


def _noise(state: State) -> Rng:
    return Rng(int.from_bytes(state["noise"].numpy().tobytes(), "little"))
