"""Data and a network of a caller's own on their way to worker processes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, Self

import cloudpickle
import torch

from fedlib.core.client import Job
from fedlib.data import sets
from fedlib.models.given import Given
from fedlib.models.initializers import Builder
from fedlib.models.registry import MODELS
from fedlib.runs import build


class Carried:
    """Data and network of a caller's own, in the tables while it is open; pickled, it is a file that workers read."""

    def __init__(self, entry: sets.Entry, model: str, network: Builder) -> None:
        self.entry, self.model, self.network = entry, model, network
        self.folder = tempfile.TemporaryDirectory(prefix="fedlib-")

    def __enter__(self) -> Self:
        self.register()
        return self

    def register(self) -> None:
        sets.ENTRIES[self.entry.name], MODELS[self.model] = self.entry, self.network
        build.CARRIED[self.entry.name, self.model] = self

    def __exit__(self, *_: object) -> None:
        if self.entry.held:
            sets.ENTRIES.pop(self.entry.name, None)
        if isinstance(self.network, Given):
            MODELS.pop(self.model, None)
        build.CARRIED.pop((self.entry.name, self.model), None)
        build.forget()
        self.folder.cleanup()

    def __reduce__(self) -> tuple[Any, ...]:
        file = Path(self.folder.name) / "own"
        if not file.exists():
            file.write_bytes(cloudpickle.dumps((self.entry, self.model, self.network)))
        return _unpickled, (str(file),)

    def __call__(self, key: str, device: torch.device) -> Job:
        """As `job_of`."""
        self.register()
        return build.job_of(key, device)


@functools.lru_cache(maxsize=1)
def _unpickled(file: str) -> Carried:
    return Carried(*cloudpickle.loads(Path(file).read_bytes()))
