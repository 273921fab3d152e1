"""The federated loop. Read this first: everything else is a part that it calls.

message -> clients -> uploads -> server -> new state -> (evaluate) -> one line of the record
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fedlib.core.client import EVERYONE, Job, Reply, Upload
from fedlib.core.method import AnyMethod, ServerState, split_tensors
from fedlib.core.plan import all_finite, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, NoUpdate, Uploads
from fedlib.data import sets
from fedlib.engines.in_process import Engine
from fedlib.errors import Diverged, PayloadError
from fedlib.rng import Rng, binomial, sample
from fedlib.runs import build, machine, record
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.digest import code_of
from fedlib.runs.progress import Bar
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec
from fedlib.wire import container

log = logging.getLogger("fedlib")
Done = Callable[[Job, ServerState[Any]], None]
ATTEMPTS = 3  # a round without a single usable update is repeated with another cohort so many times


def run(
    spec: Spec, engine: Engine, *, root: Path | None = None, save_every: float = 5.0, done: Done | None = None
) -> Record:
    """Run a spec from its last checkpoint, or from the start, to its end.

    save_every: seconds between checkpoints (0: after each round); it changes no number. done: is given the last state.
    Diverged: a round without a usable update in three attempts.
    """
    job, checkpoint = build.job(spec, engine.device), Checkpoint(spec, root)
    empty: dict[str, Any] = {"rounds": [], "uplink_parts": {}, "seconds": 0.0, "devices": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if engine.device.type == "cpu" else threads)  # how many there are changes the last bits
    try:
        state, memories, log = checkpoint.load(job.method) or (initial(job), {}, empty)
        log["devices"] = machine.joined(log["devices"], engine.device)
        with Bar(spec, log["rounds"]) as progress:
            begin = saved = time.perf_counter()
            for number in range(len(log["rounds"]) + 1, spec.rounds + 1):
                state, entry = one_round(spec, job, engine, state, number, log["uplink_parts"], memories)
                now = time.perf_counter()
                log["seconds"] += now - begin
                entry["seconds"], begin = round(now - begin, 3), now
                log["rounds"].append(entry)
                if now - saved >= save_every and number < spec.rounds:
                    checkpoint.save(state, memories, log)
                    saved = now
                progress.show(entry)
    finally:
        torch.set_num_threads(threads)
    if done:
        done(job, state)
    return finished(spec, job, engine, log)


def initial(job: Job) -> ServerState[Any]:
    """What the server has before the first round."""
    return job.method.initial(Rng(job.seed).child("server"))


def broadcast(method: AnyMethod, state: ServerState[Any], number: int) -> bytes:
    """The message of a round to all its clients."""
    return container.address(method.broadcast(state), number, EVERYONE)


def one_round(
    spec: Spec,
    job: Job,
    engine: Engine,
    state: ServerState[Any],
    number: int,
    parts: dict[str, int],
    memories: dict[int, bytes] | None = None,
) -> tuple[ServerState[Any], dict[str, Any]]:
    """Broadcast, train, aggregate, evaluate: the new state and the round's line in the record. What clients keep from
    round to round, where the spec says that they do, are the `memories`, changed in place."""
    method = job.method
    uplink, downlink, paper_bits = 0, 0, 0.0
    other_bits: dict[str, float] = {}
    memories = {} if memories is None else memories
    refused: list[tuple[int, str]] = []

    def measure(upload: Buffer) -> None:
        nonlocal paper_bits
        bits = method.sizes(upload)
        paper_bits += bits.paper
        for name, value in bits.others.items():
            other_bits[name] = other_bits.get(name, 0.0) + value
        sizes = container.section_sizes(upload)
        for part, size in zip((*method.sections, "container"), (*sizes, len(upload) - sum(sizes)), strict=True):
            parts[part] = parts.get(part, 0) + size

    for attempt in range(ATTEMPTS):
        cohort = draw_cohort(spec, job.task, number, attempt)
        message = broadcast(method, state, number)
        downlink += len(message) * len(cohort)
        replies = engine.train(job, message, number, cohort, memories if spec.feedback or spec.persistent else None)
        uploads = Uploads(remembered(replies, memories), measure, job.task.count_samples, spec.robust, number)
        try:
            new = method.aggregate(state, uploads)
            break
        except NoUpdate:
            continue
        finally:
            uplink, refused = uplink + uploads.bytes, refused + uploads.refused
            if uploads.wasted:
                parts["refused"] = parts.get("refused", 0) + uploads.wasted
    else:
        raise Diverged(f"{spec.name}: round {number} got no usable update in {ATTEMPTS} attempts; last: {refused[-1:]}")
    fault = unusable(new, state, spec.most_change)
    if fault:
        log.warning("%s: round %d keeps the old model: %s (clients %s)", spec.name, number, fault, uploads.accepted)
    else:
        state = new
    due = number % spec.evaluate_every == 0 or number == spec.rounds
    judged: dict[str, float | None] = {**evaluate(job, engine, state, number)} if due else {}
    accuracy, loss = judged.pop("accuracy", None), judged.pop("loss", None)
    notes = method.notes(state)
    return state, {
        "round": number,
        "accuracy": accuracy,
        "loss": loss if loss is None or math.isfinite(loss) else str(loss),  # JSON has no other way to say inf or nan
        "uplink_bytes": uplink,
        "downlink_bytes": downlink,
        "paper_bits": paper_bits,
        "clients": uploads.accepted,
        "refused": refused,
        **({"kept": fault} if fault else {}),
        **({"metrics": judged} if judged else {}),
        **({"other_bits": other_bits} if other_bits else {}),
        **({"notes": notes} if notes else {}),
    }


def unusable(new: ServerState[Any], old: ServerState[Any], most: float) -> str:
    """Why the server does not go on with a state: not finite, or a model that moved too far; empty where it does.

    most: how long the change of the model may be, as a multiple of the old model's norm; 0: as long as it is.
    """
    tensors = dict(new.model)
    split_tensors(new.own, tensors, "own/")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            return f"{name} is not finite"
    if most:
        moved, before = (
            math.sqrt(sum(float(part.double().square().sum()) for part in parts))
            for parts in ((new.model[name] - old.model[name] for name in old.model), old.model.values())
        )
        if moved > most * before:
            return f"the change has norm {moved:.3g}, the model {before:.3g}, and most_change is {most:g}"
    return ""


def evaluate(job: Job, engine: Engine, state: ServerState[Any], number: int) -> dict[str, float]:
    """What the objective names, on the test set, in the mean over the models that a state stands for (mostly one).

    Where another method writes the broadcast, what clients would read is evaluated: nobody but the server has more.
    """
    method = job.method
    models = method.models(state, Rng(job.seed).child("models", number))
    if method.writer:
        models = [method.writer.received(model) for model in models]
    found = [engine.evaluate(job, model) for model in models]
    return {
        name: sum(column) / len(found)
        for name, column in zip(job.task.objective.names, zip(*found, strict=True), strict=True)
    }


def remembered(
    replies: Iterable[tuple[int, Upload]], memories: dict[int, bytes]
) -> Iterator[tuple[int, Buffer | PayloadError]]:
    """The uploads alone: a client's memory stays with the client."""
    for client, reply in replies:
        if isinstance(reply, Reply):
            reply, memories[client] = reply
        yield client, reply


def draw_cohort(spec: Spec, task: Task, number: int, attempt: int = 0) -> list[int]:
    """Clients of a round by the spec's sampling. Largest first: it keeps a pool busy."""
    rng, count = Rng(spec.seed).child("cohort", number, attempt), spec.cohort
    if spec.sampling == "spaced":  # a place in the queue for each client, whatever the round
        order, turn = Rng(spec.seed).child("queue").stream().permutation(spec.clients).tolist(), (number - 1) * count
        drawn = [order[(turn + place) % spec.clients] for place in range(count)]
    else:
        if spec.sampling == "poisson":
            count = binomial(rng.child("size"), spec.clients, spec.cohort / spec.clients)
        drawn = sample(rng, spec.clients, count)
    return sorted(drawn, key=lambda client: (-len(task.indices(client)), client))


def finished(spec: Spec, job: Job, engine: Engine, log: dict[str, Any]) -> Record:
    last, rounds, task = log["rounds"][-1], log["rounds"], job.task
    return {
        "format": record.FORMAT,
        "spec": spec.as_dict(),
        "code": code_of(spec),
        "data": sets.digest(spec.data),
        "partition": task.partition.hash,
        "parameters": {
            "weights": count(task.weights),
            "others": count(task.vectors | task.statistics),
            "frozen": count(task.frozen),
        },
        "final": {
            "accuracy": last["accuracy"],
            "loss": last["loss"],
            "uploads": sum(len(entry["clients"]) for entry in rounds),
            "refused": sum(len(entry["refused"]) for entry in rounds),
            "uplink_bytes": sum(entry["uplink_bytes"] for entry in rounds),
            "downlink_bytes": sum(entry["downlink_bytes"] for entry in rounds),
            "paper_bits": sum(entry["paper_bits"] for entry in rounds),
            "uplink_parts": log["uplink_parts"],
            **job.method.summary(spec.settings),
        },
        "made": machine.made(log["devices"], engine.name, log["seconds"]),
        "rounds": rounds,
    }


def load_or_run(
    spec: Spec, engine: Engine, *, root: Path | None = None, again: bool = False, done: Done | None = None
) -> Record:
    """The record of a spec if it is fresh (and not asked for again); otherwise train, and save the new record."""
    found = record.load(spec, root)
    if found and not again and not record.stale(found, spec):
        return found
    result = run(spec, engine, root=root, done=done)
    record.save(result, root)
    Checkpoint(spec, root).remove()
    return result
