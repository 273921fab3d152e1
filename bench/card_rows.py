"""What the stages of first_card.py share: rows that are kept at once, data in place of missing files, clocks."""

import contextlib
import dataclasses
import importlib.util
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlib.data import sets, sources
from fedlib.data.images import Arrays
from fedlib.errors import DataError
from fedlib.runs.spec import Spec

SHAPES = {"fashion-mnist": (1, 28, 28), "cifar10-jpeg": (3, 32, 32), "digits": (1, 8, 8)}
FEW = 1000  # training images in a trial on a CPU


class Rows:
    """A stage's results by name; the file is whole after each."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.found: dict[str, dict[str, Any]] = {}
        self._keep()

    def add(self, name: str, **values: Any) -> None:
        self.found[name] = values
        print(name, json.dumps(values), flush=True)
        self._keep()

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails in here is a row, and no end of the stage: all faults are wanted at once."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(name, error=f"{type(error).__name__}: {error}"[:500])

    def _keep(self) -> None:
        half = self.target.with_suffix(".half")
        half.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        half.replace(self.target)


def reader(shape: tuple[int, ...], scale: float, samples: int, tests: int, classes: int) -> Callable[[Path], Arrays]:
    """What makes up random images."""

    def read(_: Path) -> Arrays:
        draw = np.random.Generator(np.random.Philox(1))
        x = draw.integers(int(scale) + 1, size=(samples + tests, *shape), dtype=np.uint8)
        y = draw.integers(classes, size=samples + tests)
        return x[:samples], y[:samples], x[samples:], y[samples:]

    return read


def there(name: str) -> bool:
    if name == "digits":
        return importlib.util.find_spec("sklearn") is not None
    try:
        sources.verify(name)
    except DataError:
        return False
    return True


def stand_in(rows: Rows, few: bool) -> None:
    """Random images of the same shape where a data set is not there, or few are wanted; the rows say so."""
    for name, shape in SHAPES.items():
        few_here = few and name != "digits"  # of which there are few anyway
        if there(name) and not few_here:
            continue
        entry = sets.ENTRIES[name]
        samples, tests = (FEW, FEW // 10) if few_here else (entry.samples, max(360, entry.samples // 6))
        read = reader(shape, entry.scale, samples, tests, len(entry.classes))
        sets.ENTRIES[name] = dataclasses.replace(entry, read=read, files=(), shipped="")
        rows.add(f"data {name}", images=f"{samples} random ones of shape {shape} in place of the files")


def small(spec: Spec, device: torch.device, **changes: Any) -> Spec:
    """A paper's run with these changes; on a CPU with few clients and one epoch, to see that it works."""
    if device.type == "cpu":
        few = min(spec.clients, 20)
        changes = {"clients": few, "cohort": min(spec.cohort, 2), "epochs": 1, "rounds": 2} | changes
    return dataclasses.replace(spec, **changes)


def settled(device: torch.device) -> float:
    """The time, once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of a call, the device's work included."""
    begin = settled(device)
    call()
    return settled(device) - begin
