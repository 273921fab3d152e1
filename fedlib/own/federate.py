"""Federate a network of your own on data of your own: `federate` for one run, `compare` for several side by side.

    import fedlib
    run = fedlib.federate(network, (x, y), (test_x, test_y), method="fedmrn", clients=20, rounds=30, lr=0.1)
    run.accuracy, run.uplink_bytes, run.table, run.model

What runs is the loop of the book (`fedlib.runs.rounds`), and what comes back is its record.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from fedlib.core.client import Job
from fedlib.core.method import ServerState
from fedlib.data import given as given_data
from fedlib.data import sets
from fedlib.data.objective import Measure
from fedlib.data.partition import KINDS
from fedlib.engines import select
from fedlib.engines.in_process import Engine
from fedlib.errors import DataError, SpecError, require_name
from fedlib.models import given as given_network
from fedlib.models.registry import MODELS
from fedlib.own.results import Comparison, Run
from fedlib.own.trial import draws
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.carried import Carried
from fedlib.runs.record import write
from fedlib.runs.spec import Spec

# What a call may set beside its named arguments: fields of Spec under their own names.
MORE = (
    *("persistent", "feedback", "frozen", "robust", "most_change", "downlink", "precision"),
    *("held_out", "validation", "sampling", "attackers", "attack"),
)


def federate(
    network: nn.Module | Callable[[], nn.Module] | str,
    train: Any,
    test: Any = None,
    *,
    method: str = "fedavg",
    settings: Mapping[str, Any] | None = None,
    clients: int | None = None,
    cohort: int | None = None,
    partition: str | Mapping[str, Any] | Sequence[Any] = "iid",
    owners: Any = None,
    rounds: int = 20,
    epochs: int = 1,
    batch_size: int = 32,
    lr: float = 0.1,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    loss: Measure | None = None,
    metrics: Mapping[str, Measure] | None = None,
    evaluate_every: int = 1,
    seed: int = 0,
    label: str | None = None,
    engine: str = "auto",
    device: str = "auto",
    folder: str | Path | None = None,
    **more: Any,
) -> Run:
    """Train a network by a method of the book, and count every byte that is sent.

    network: a module, which is copied and keeps its initial values; a function that makes one, whose initial values
    come from the seed; or the name of a network of the book. train, test: pairs (x, y) of arrays or tensors, or data
    sets of torch; or, as `train` alone, the name of a data set of the book. x float or integer [n, ...]; y integer
    labels [n] from 0, [n, length] of sequences, or with a loss of your own any numbers.
    method, settings: one of `fedlib.methods.registry.METHODS`, and values for its own fields.
    clients: 10, or as many as `partition` or `owners` name. cohort: clients a round, all by default.
    partition: "iid"; or a kind with its parameters, such as {"kind": "dirichlet", "beta": 0.3}; or for each client the
    places of its samples in `train`. owners: whose each training sample is.
    loss, metrics: functions of (output, y) that give the mean over a batch. folder: where record and model are kept, so
    that the same call goes on from where it was stopped, or trains nothing; without one nothing is kept.
    more: other fields of a run (`held_out`, `feedback`, `robust`, `downlink`, ...).
    SpecError, DataError: what cannot be run, in one sentence, before training starts. RunError: training diverged.

    >>> from sklearn.datasets import load_digits
    >>> x, y = load_digits(return_X_y=True)
    >>> network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    >>> x = x.astype("float32") / 16
    >>> run = federate(network, (x[:1500], y[:1500]), (x[1500:], y[1500:]), rounds=3, lr=0.3, engine="process")
    >>> run.uplink_bytes == 3 * 10 * (4 * (64 * 32 + 32 + 32 * 10 + 10) + 44)
    True
    """
    for name in more:
        if name not in MORE:
            known = [*inspect.signature(federate).parameters][:-1]
            raise SpecError(f"{name}: unknown argument; allowed: {', '.join((*known, *MORE))}")
    if engine in ("ranks", "flower"):
        raise SpecError(f"engine: {engine} is for python -m fedlib run; use process or pool")
    with contextlib.ExitStack() as stack:
        data, model, kind, count = _registered(stack, network, train, test, loss, metrics or {}, partition, owners)
        if clients is not None and count is not None and clients != count:
            raise SpecError(f"clients: {clients}, but partition or owners name {count}; leave clients out")
        clients = count if count is not None else 10 if clients is None else clients
        called = _file_name(label or method)
        spec = Spec(
            paper="own", profile="lab", group="own", split=kind["kind"], label=called,
            name=f"{called}-{kind['kind']}-seed{seed}",
            method=method, hyper=dict(settings or {}), data=data, model=model, partition=kind, clients=clients,
            cohort=clients if cohort is None else cohort, rounds=rounds, epochs=epochs, batch=batch_size, lr=lr,
            optimizer=optimizer, momentum=momentum, evaluate_every=evaluate_every, seed=seed, **more,
        )  # fmt: skip
        root = Path(folder) if folder else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedlib-")))
        on = select.device(device)
        drawing = draws(spec)
        opened = "process" if drawing and (engine == "auto" and on.type == "cuda") else engine
        if drawing and opened in ("stacked", "graphed"):
            raise SpecError(f"engine: {engine} cannot repeat what this network draws by itself; use process or pool")
        with select.open_engine(opened, device) as opened_engine:
            return _run(spec, opened_engine, root)


def compare(
    network: nn.Module | Callable[[], nn.Module] | str,
    train: Any,
    test: Any = None,
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int] = (0,),
    **common: Any,
) -> Comparison:
    """The same task by several methods, over the same rounds and seeds.

    methods: names; or for each label the arguments of `federate` that are its own, such as
    {"FedAvg": {"method": "fedavg", "lr": 0.1}, "FedMRN": {"method": "fedmrn", "lr": 0.3}}. common: those of all
    that say nothing else.
    """
    if isinstance(methods, str) or not methods or not all(isinstance(name, str) for name in methods):
        raise SpecError(f"methods: {methods!r:.60}; give names in a list, or for each label its own arguments")
    own = methods if isinstance(methods, Mapping) else {name: {"method": name} for name in methods}
    for label, arguments in own.items():
        if not isinstance(arguments, Mapping):
            raise SpecError(f'methods: {label!r} has {arguments!r:.40}; give arguments, such as {{"method": "fedavg"}}')
        for name in ("label", "seed", "network", "train", "test"):
            if name in arguments or name in common:
                raise SpecError(f"{name}: the same for all in a comparison; labels stand in methods, seeds in seeds")
    if not seeds:
        raise SpecError("seeds: none; give at least one, such as seeds=(0,)")
    runs = {
        label: [federate(network, train, test, label=label, seed=seed, **{**common, **arguments}) for seed in seeds]
        for label, arguments in own.items()
    }
    return Comparison(runs)


def _registered(
    stack: contextlib.ExitStack,
    network: Any,
    train: Any,
    test: Any,
    loss: Measure | None,
    metrics: Mapping[str, Measure],
    partition: Any,
    owners: Any,
) -> tuple[str, str, dict[str, Any], int | None]:
    """Names of data and network in their tables, the partition as a spec has it, and how many clients it says."""
    kind, shards, count = _kind(partition)
    if owners is not None and (shards is not None or kind["kind"] != "iid"):
        raise SpecError("owners: given with a partition; give one of them")
    if isinstance(train, str):
        for what, given in (("test", test), ("loss", loss), ("metrics", metrics or None)):
            if given is not None:
                raise SpecError(
                    f"{what}: given beside the data set {train!r}, which has its own; give arrays, or leave it"
                )
        entry = sets.find(train)
    else:
        held = given_data.dataset(train, test, loss, metrics, owners, shards)
        entry = given_data.entry(held, given_network.code_of([*filter(None, [loss]), *metrics.values()]))
        if held.owners is not None:
            kind, count = {"kind": "natural", "seed": 0}, len(np.unique(held.owners))
    if isinstance(network, str):
        require_name("network", network, MODELS)
        name, builder = network, MODELS[network]
    else:
        builder = given_network.given(network)
        name = f"own-{builder.code}".rstrip(given_network.UNKNOWN)
    if not isinstance(train, str) or not isinstance(network, str):
        stack.enter_context(Carried(entry, name, builder))
    return entry.name, name, kind, count


def _file_name(label: str) -> str:
    """The label with a dash for what no file name should hold, and then a digest, so that two labels stay two."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._")[:60]
    return plain if plain == label else f"{plain or 'run'}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def _kind(partition: Any) -> tuple[dict[str, Any], Sequence[Any] | None, int | None]:
    if isinstance(partition, str):
        require_name("partition", partition, KINDS)
        return {"kind": partition, "seed": 0}, None, None
    if isinstance(partition, Mapping):
        if "kind" not in partition:
            raise SpecError(f'partition: {dict(partition)!r:.60} has no "kind"; one of {", ".join(sorted(KINDS))}')
        return {"seed": 0, **partition}, None, None
    if isinstance(partition, np.ndarray):
        partition = list(partition)
    if not isinstance(partition, Sequence):
        raise SpecError(f"partition: {partition!r:.60}; give a kind, or for each client the places of its samples")
    return {"kind": "given", "seed": 0}, partition, len(partition)


def _run(spec: Spec, engine: Engine, root: Path) -> Run:
    kept = root / "models" / f"{spec.name}.safetensors"

    def done(job: Job, state: ServerState[Any]) -> None:
        """Before the record is: what has a record has its model."""
        found = job.method.models(state, Rng(job.seed).child("models", job.rounds))[0]
        write(kept, safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in found.items()}))

    made = rounds.load_or_run(spec, engine, root=root, again=not kept.exists(), done=done)
    network = build.task(spec, torch.device("cpu")).network
    own = network.state_dict(keep_vars=True)
    try:
        held = safetensors.torch.load(kept.read_bytes())
        with torch.no_grad():
            for name, tensor in held.items():
                own[name].copy_(tensor)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise DataError(f"{kept}: is not the model of this run ({error}); remove it, and train again") from error
    return Run(made, network.eval())
