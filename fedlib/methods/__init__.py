"""The methods by name.

Each is a module with a frozen dataclass `Hyper`, `SECTIONS` (the names of an upload's parts) and these functions:

    broadcast(state, hyper, task) -> bytes                    server: the downlink message
    start(message, hyper, task, rng) -> (trainable, frozen)   client: tensors on the task's device
    draws(progress, hyper, task, generator) -> draws          client: the randomness of a local step, progress in (0, 1]
    objective(trainable, frozen, batch, draws, hyper, task) -> loss
    finish(trainable, frozen, samples, hyper, task, rng) -> bytes   client: the upload
    server(state, uploads, hyper, task) -> state              server: uses nothing but the uploads' bytes
    paper_bits(upload, hyper, task) -> bits                   size of an upload as the paper's own definition counts it

and, where the plain thing is not enough, one or more of these:

    initial(hyper, task) -> state                             server: before the first round; else the model's tensors
    model(state, hyper, task, rng) -> state                   what is evaluated; else the state itself
    sent(upload, frozen, hyper, task) -> update               client: what the server will read as its update `u` [d],
                                                              for error feedback; methods without it cannot have that

`draws` gives tensors and floats only, and `objective` neither branches on them nor reads them out: engines stack them.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedlib.errors import require_mapping
from fedlib.methods import drive, eden, fedavg, fedmrn, fedsparsify, signsgd, terngrad, topk
from fedlib.rng import Rng
from fedlib.task import State, Task

if TYPE_CHECKING:
    from fedlib.spec import Spec

METHODS: dict[str, ModuleType] = {
    "drive": drive,
    "eden": eden,
    "fedavg": fedavg,
    "fedmrn": fedmrn,
    "fedsparsify": fedsparsify,
    "signsgd": signsgd,
    "terngrad": terngrad,
    "topk": topk,
}


def initial(spec: Spec, task: Task) -> State:
    module = METHODS[spec.method]
    state: State = (
        module.initial(hyper(spec.method, spec.hyper), task) if hasattr(module, "initial") else task.initial()
    )
    return state


def model(spec: Spec, task: Task, state: State, round: int) -> State:
    """The model that a state stands for, to be evaluated."""
    module = METHODS[spec.method]
    if not hasattr(module, "model"):
        return state
    found: State = module.model(state, hyper(spec.method, spec.hyper), task, Rng(spec.seed).child("model", round))
    return found


def hyper(method: str, values: dict[str, Any]) -> Any:
    """The method's Hyper from plain values; SpecError names an unknown field or a value out of range."""
    require_mapping(f"hyper of {method}", values, [f.name for f in dataclasses.fields(METHODS[method].Hyper)])
    return METHODS[method].Hyper(**values)
