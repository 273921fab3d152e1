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

    initial(hyper, task, rng) -> state                        server: before the first round; else the model's tensors
    models(state, hyper, task, rng) -> states                 what is evaluated, in the mean; else the state itself
    survey(trainable, frozen, shard, hyper, task) -> State    client: before its first step, what it finds in its data,
                                                              to stand among `frozen`
    stages(hyper, plan) -> list of plans                      client: local training in parts, each with an optimizer of
                                                              its own
    enter(stage, trainable, frozen, hyper, task, rng)         client: before each of these parts, in place
    assess(upload, held, hyper, task) -> bytes                client: its upload, with what it finds on samples held out
    notes(state, hyper, task) -> dict                         what the record says of a round beside the rest
    check(hyper, spec)                                        SpecError where a spec's other fields do not go with it
    summary(hyper, spec) -> dict                              what the record says of the whole run beside the rest
    other_bits(upload, hyper, task) -> dict                   further definitions of an upload's size, by name
    sent(upload, frozen, hyper, task) -> update               client: what the server will read as its update `u` [d],
                                                              for error feedback; methods without it cannot have that
    write_model(model, hyper, task) -> bytes                  server: any model in few bytes, with losses, for methods
    read_model(data, hyper, task) -> model                    that broadcast it; client: what the bytes say (Downlink)
    check_writer(hyper)                                       SpecError: settings with which it writes no model

`draws` gives tensors and floats only, and `objective` neither branches on them nor reads them out: engines stack them.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer
from fedlib.errors import SpecError, require_mapping, require_name
from fedlib.methods import fedavg, fedmrn
from fedlib.methods.baselines import drive, eden, fedsparsify, fedzip, signsgd, signvote, terngrad, topk
from fedlib.methods.fedcompress import method as fedcompress
from fedlib.methods.feddq import method as feddq
from fedlib.methods.fedpt import method as fedpt
from fedlib.methods.fedsparse import method as fedsparse
from fedlib.methods.model_codec import Downlink
from fedlib.rng import Rng

if TYPE_CHECKING:
    from fedlib.runs.spec import Spec

# Those that broadcast the model as it is, so that another method may write it.
PLAIN = {"drive", "eden", "fedavg", "feddq", "fedmrn", "signsgd", "signvote", "terngrad", "topk"}

METHODS: dict[str, ModuleType] = {
    "drive": drive,
    "eden": eden,
    "fedavg": fedavg,
    "fedcompress": fedcompress,
    "feddq": feddq,
    "fedmrn": fedmrn,
    "fedpm": fedsparse,
    "fedpt": fedpt,
    "fedsparsify": fedsparsify,
    "fedzip": fedzip,
    "signsgd": signsgd,
    "signvote": signvote,
    "terngrad": terngrad,
    "topk": topk,
}


def downlink(spec: Spec) -> Downlink | None:
    """What a spec says of it, if anything. SpecError: a method that cannot write a model, or cannot have it written."""
    if spec.downlink is None:
        return None
    require_mapping("downlink", spec.downlink, ("method", "hyper"))
    writers = [name for name, module in METHODS.items() if hasattr(module, "write_model")]
    require_name("downlink.method", spec.downlink.get("method"), writers)
    if spec.method not in PLAIN:
        raise SpecError(f"downlink: {spec.method} has a broadcast of its own; allowed with {', '.join(sorted(PLAIN))}")
    values = spec.downlink.get("hyper", {})
    found = Downlink(METHODS[spec.downlink["method"]], hyper(spec.downlink["method"], values, "downlink.hyper"))
    found.writer.check_writer(found.hyper)
    return found


def initial(spec: Spec, task: Task) -> State:
    """What the server has before the first round."""
    module, rng = METHODS[spec.method], Rng(spec.seed).child("server")
    found: State = _optional(module, "initial", hyper(spec.method, spec.hyper), task, rng) or task.initial()
    return found


def models(spec: Spec, task: Task, state: State, round: int) -> list[State]:
    """The models that a state stands for, as clients would read them: their mean accuracy is the round's."""
    module, rng = METHODS[spec.method], Rng(spec.seed).child("models", round)
    found: list[State] = _optional(module, "models", state, hyper(spec.method, spec.hyper), task, rng) or [state]
    return [task.downlink.received(model, task) for model in found] if task.downlink else found


def notes(spec: Spec, task: Task, state: State) -> dict[str, Any]:
    """{"notes": ...} for the record, or nothing."""
    found = _optional(METHODS[spec.method], "notes", state, hyper(spec.method, spec.hyper), task)
    return {"notes": found} if found else {}


def check(spec: Spec) -> None:
    _optional(METHODS[spec.method], "check", hyper(spec.method, spec.hyper), spec)


def summary(spec: Spec) -> dict[str, Any]:
    found: dict[str, Any] = _optional(METHODS[spec.method], "summary", hyper(spec.method, spec.hyper), spec) or {}
    return found


def survey(
    module: ModuleType, trainable: State, frozen: State, shard: tuple[Tensor, Tensor], hyper: Any, task: Task
) -> State:
    found: State = _optional(module, "survey", trainable, frozen, shard, hyper, task) or {}
    return found


def stages(module: ModuleType, hyper: Any, task: Task) -> tuple[Task, ...]:
    """The task of each part of local training, mostly one: they differ in their plan. The same objects every time."""
    found = task.stages.get(hyper, ())
    if not found or found[0] is not task:  # a copy of a task has the same cache
        plans = _optional(module, "stages", hyper, task.plan)
        parts = tuple(dataclasses.replace(task, plan=plan) for plan in plans) if plans else (task,)
        found = task.stages[hyper] = (task, *parts)
    return found[1:]


def enter(module: ModuleType, stage: int, trainable: State, frozen: State, hyper: Any, task: Task, rng: Rng) -> None:
    _optional(module, "enter", stage, trainable, frozen, hyper, task, rng)


def assess(module: ModuleType, upload: bytes, held: tuple[Tensor, Tensor], hyper: Any, task: Task) -> bytes:
    return _optional(module, "assess", upload, held, hyper, task) or upload


def other_bits(spec: Spec, task: Task, upload: Buffer) -> dict[str, float]:
    return _optional(METHODS[spec.method], "other_bits", upload, hyper(spec.method, spec.hyper), task) or {}


def _optional(module: ModuleType, name: str, *arguments: Any) -> Any:
    return getattr(module, name)(*arguments) if hasattr(module, name) else None


def hyper(method: str, values: dict[str, Any], where: str = "hyper") -> Any:
    """The method's Hyper from plain values; SpecError names an unknown field or a value out of range."""
    require_mapping(f"{where} of {method}", values, [f.name for f in dataclasses.fields(METHODS[method].Hyper)])
    return METHODS[method].Hyper(**values)
