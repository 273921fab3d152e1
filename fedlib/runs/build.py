"""From a spec to what its run works with: the task that both sides agree on, and the method bound to it."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import torch

from fedlib.core.client import Job
from fedlib.core.task import Task
from fedlib.data import partition, sets, sources
from fedlib.models import registry as models
from fedlib.models.freezing import frozen_names
from fedlib.rng import Rng
from fedlib.runs.spec import Spec


def job(spec: Spec, device: torch.device) -> Job:
    """What engines need of a run. SpecError: a network that does not fit the data, or a policy that does not fit it."""
    agreed = task(spec, device)
    writer = spec.writer.bind(agreed) if spec.writer else None
    method = spec.chosen.bind(agreed, writer)
    return Job(method, spec.seed, spec.rounds, spec.key(), job_of, spec.attackers, spec.attack)


def job_of(key: str, device: torch.device) -> Job:
    """The same from the text of a spec, in another process."""
    return job(Spec.from_dict(json.loads(key)), device)


def task(spec: Spec, device: torch.device) -> Task:
    dataset = set_aside(_load(spec.data, device), spec.validation)
    (_, channels, side, _), classes = dataset.train_x.shape, len(dataset.classes)
    network = models.build(spec.model, channels, side, classes, Rng(spec.seed)).to(device)
    labels = dataset.train_y.cpu().numpy()
    return Task.of(
        network,
        frozen_names(spec.frozen, {name: p.shape for name, p in network.named_parameters()}, "frozen"),
        plan=spec.plan,
        train=(dataset.train_x, dataset.train_y),
        test=(dataset.test_x, dataset.test_y),
        partition=partition.make(labels, spec.clients, owners=dataset.owners, **spec.partition),
        device=device,
        cohort=spec.cohort,
        held_out=spec.held_out,
    )


def set_aside(dataset: sets.Dataset, share: float) -> sets.Dataset:
    """A share of the training samples in place of the test set, drawn once for all runs; the rest stays for training.

    For searches: what they choose by is neither trained on nor reported.
    """
    if not share:
        return dataset
    count = len(dataset.train_y)
    held = np.sort(Rng(0).child("validation").stream().permutation(count).numpy()[: int(share * count)])
    kept = np.setdiff1d(np.arange(count), held)
    owners = None if dataset.owners is None else dataset.owners[kept]
    (train_x, train_y), (test_x, test_y) = (
        (dataset.train_x[torch.from_numpy(places)], dataset.train_y[torch.from_numpy(places)])
        for places in (kept, held)
    )
    return dataclasses.replace(dataset, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, owners=owners)


@functools.lru_cache(maxsize=1)
def _load(name: str, device: torch.device) -> sets.Dataset:
    d = sources.load(name)
    # Fastest for convolutions on a CPU; the last bits of a result depend on the layout, so it is always this one.
    layout = torch.channels_last
    return dataclasses.replace(
        d,
        train_x=d.train_x.to(device, memory_format=layout),
        train_y=d.train_y.to(device),
        test_x=d.test_x.to(device, memory_format=layout),
        test_y=d.test_y.to(device),
    )
