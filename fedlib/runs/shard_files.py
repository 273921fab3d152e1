"""The samples of some clients in files, for a node that holds nothing else: no other client's data, no test set.

A file holds the samples as they are trained on, their places in the whole data set, and what a client has to know of
the rest: its shape, its digest, and the partition's hash. Uploads are then those of a machine with all data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedlib.core.client import Job
from fedlib.core.task import Task
from fedlib.data import sets
from fedlib.data.partition import Partition
from fedlib.errors import DataError, RunError
from fedlib.models import registry as models
from fedlib.models.freezing import frozen_names
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.runs.record import write
from fedlib.runs.spec import Spec

ENDING = ".safetensors"


def name_of(spec: Spec) -> str:
    """Of the files of a run's data and partition: all runs that share these share files."""
    what = [spec.data, spec.validation, spec.clients, spec.partition]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def save(spec: Spec, clients: Collection[int], folder: Path) -> Path:
    """Write what a node with these clients needs for a run, and for all with its data and partition."""
    task = build.task(spec, torch.device("cpu"))
    if beyond := sorted(client for client in clients if client >= spec.clients):
        raise RunError(f"clients: {beyond} are not among the {spec.clients} of {spec.name}, which count from 0")
    tensors = dict[str, Tensor]()
    for client in sorted(clients):
        places = task.partition.indices(client)
        index = torch.from_numpy(places)
        samples = {"places": index, "x": task.train[0][index], "y": task.train[1][index]}
        tensors |= {f"{client}/{part}": tensor.contiguous() for part, tensor in samples.items()}
    told = {
        "data": sets.digest(spec.data),
        "partition": task.partition.hash,
        "samples": len(task.train[1]),
        "shape": list(task.train[0].shape[1:]),
        "classes": len(sets.ENTRIES[spec.data].classes),
    }
    target = folder / name_of(spec) / f"{min(clients)}-{max(clients)}{ENDING}"
    write(target, safetensors.torch.save(tensors, {"told": json.dumps(told)}))
    return target


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a folder, as far as a node owns their clients."""

    folder: Path
    clients: frozenset[int]

    def describe(self, spec: Spec) -> str:
        """The digest of the data that the files were made from. DataError: they are not here."""
        return str(self._read(spec)[0]["data"])

    def job_of(self, key: str, device: torch.device) -> Job:
        """As `build.job_of`, of a task that knows no other samples."""
        spec = Spec.from_dict(json.loads(key))
        agreed = self.task(spec, device)
        writer = spec.writer.bind(agreed) if spec.writer else None
        method = spec.chosen.bind(agreed, writer)
        return Job(method, spec.seed, spec.rounds, key, self.job_of, spec.attackers, spec.attack)

    def task(self, spec: Spec, device: torch.device) -> Task:
        told, own = self._read(spec)
        shape: list[int] = told["shape"]
        channels, side, *_ = [*shape, 1, 1]
        network = models.build(spec.model, channels, side, told["classes"], Rng(spec.seed)).to(device)
        frozen = frozen_names(spec.frozen, {name: p.shape for name, p in network.named_parameters()}, "frozen")
        places = {client: part["places"].numpy() for client, part in own.items()}
        x, y = (
            _Rows(torch.cat([part[name] for part in own.values()]).to(device), list(places.values()), told["samples"])
            for name in ("x", "y")
        )
        return Task.of(
            network,
            frozen | {name for name, p in network.named_parameters() if not p.requires_grad},
            plan=spec.plan,
            train=(cast(Tensor, x), cast(Tensor, y)),
            test=(torch.empty(0, *shape), torch.empty(0, dtype=torch.int64)),
            partition=Partition(spec.clients, places.__getitem__, told["partition"]),
            device=device,
            cohort=spec.cohort,
            held_out=spec.held_out,
            precision=spec.precision,
        )

    def _read(self, spec: Spec) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
        """What files tell of the whole, and each own client's samples."""
        told: dict[str, Any] = {}
        own: dict[int, dict[str, Tensor]] = {client: {} for client in self.clients}
        for file in sorted((self.folder / name_of(spec)).glob(f"*{ENDING}")):
            try:
                content = file.read_bytes()
                tensors = safetensors.torch.load(content)
                size = int.from_bytes(content[:8], "little")
                told = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["told"])
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise DataError(f"{file} cannot be read ({type(error).__name__}); have it made anew") from error
            for name, tensor in tensors.items():
                client, _, part = name.partition("/")
                if int(client) in own:
                    own[int(client)][part] = tensor
        if absent := sorted(client for client, parts in own.items() if not parts):
            raise DataError(f"{self.folder}: no samples of clients {absent} for {spec.data}, {spec.partition}")
        return told, own


class _Rows:
    """Stands for a tensor with a row a sample, of which it holds some: it is asked for none but these."""

    def __init__(self, rows: Tensor, places: list[np.ndarray], count: int) -> None:
        layout = torch.channels_last if rows.ndim == 4 else torch.preserve_format  # as in `build`: it decides last bits
        self.rows, self.count, self.shape = rows.to(memory_format=layout), count, (count, *rows.shape[1:])
        self.where = torch.full((count,), -1, dtype=torch.int64, device=rows.device)
        self.where[torch.from_numpy(np.concatenate(places))] = torch.arange(len(rows), device=rows.device)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Tensor:
        if not isinstance(index, Tensor) or bool((self.where[index] < 0).any()):
            _refuse()
        return self.rows[self.where[index]]


def _refuse() -> NoReturn:
    raise RunError("the samples of other clients were asked for, which are not here")
