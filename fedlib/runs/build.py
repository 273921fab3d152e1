"""From a spec to what its run works with: the task that both sides agree on, and the method bound to it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable

import numpy as np
import torch

from fedlib.core.client import Job
from fedlib.core.task import PRECISIONS, Task
from fedlib.data import partition, sets, sources
from fedlib.errors import RunError
from fedlib.models import registry as models
from fedlib.models.freezing import frozen_names
from fedlib.rng import Rng
from fedlib.runs.spec import Spec

CARRIED: dict[tuple[str, str], Callable[[str, torch.device], Job]] = {}  # what stands for `job_of`, by data and network


def job(spec: Spec, device: torch.device) -> Job:
    """What engines need of a run. SpecError: a network that does not fit the data, or a policy that does not fit it."""
    agreed = task(spec, device)
    writer = spec.writer.bind(agreed) if spec.writer else None
    method, rebuild = spec.chosen.bind(agreed, writer), CARRIED.get((spec.data, spec.model), job_of)
    return Job(method, spec.seed, spec.rounds, spec.key(), rebuild, spec.attackers, spec.attack)


def job_of(key: str, device: torch.device) -> Job:
    """The same from the text of a spec, in another process."""
    return job(Spec.from_dict(json.loads(key)), device)


def task(spec: Spec, device: torch.device) -> Task:
    _require_precision(spec.precision, device)
    dataset = set_aside(_load(spec.data, device), spec.validation)
    _, channels, side, *_ = (*dataset.train_x.shape, 1, 1)
    network = models.build(spec.model, channels, side, len(dataset.classes), Rng(spec.seed)).to(device)
    labels = dataset.train_y.cpu().numpy()
    frozen = frozen_names(spec.frozen, {name: p.shape for name, p in network.named_parameters()}, "frozen")
    return Task.of(
        network,
        frozen | {name for name, p in network.named_parameters() if not p.requires_grad},
        plan=spec.plan,
        train=(dataset.train_x, dataset.train_y),
        test=(dataset.test_x, dataset.test_y),
        partition=partition.make(labels, spec.clients, owners=dataset.owners, shards=dataset.shards, **spec.partition),
        device=device,
        cohort=spec.cohort,
        held_out=spec.held_out,
        objective=dataset.objective,
        precision=spec.precision,
    )


def _require_precision(precision: str, device: torch.device) -> None:
    """RunError where the device has no such products: it would only pretend to, and take longer."""
    there = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bfloat16()
    if precision != PRECISIONS[0] and not there:
        raise RunError(f"precision: {precision!r} is not built into this {device.type}; use {PRECISIONS[0]!r}")


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
    shards = dataset.shards and tuple(np.searchsorted(kept, np.intersect1d(own, kept)) for own in dataset.shards)
    (train_x, train_y), (test_x, test_y) = (
        (dataset.train_x[torch.from_numpy(places)], dataset.train_y[torch.from_numpy(places)])
        for places in (kept, held)
    )
    return dataclasses.replace(
        dataset, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, owners=owners, shards=shards
    )


@functools.lru_cache(maxsize=1)
def _load(name: str, device: torch.device) -> sets.Dataset:
    d = sources.load(name)
    # Fastest for convolutions on a CPU; the last bits of a result depend on the layout, so it is always this one.
    layout = torch.channels_last if d.train_x.ndim == 4 else torch.preserve_format
    return dataclasses.replace(
        d,
        train_x=d.train_x.to(device, memory_format=layout),
        train_y=d.train_y.to(device),
        test_x=d.test_x.to(device, memory_format=layout),
        test_y=d.test_y.to(device),
    )


def forget() -> None:
    """Let go of the data set that was loaded last."""
    _load.cache_clear()
