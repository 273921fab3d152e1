"""Before a grid: whether each network of it can take the samples that it would be trained on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedlib.errors import FedlibError, SpecError
from fedlib.runs import build
from fedlib.runs.spec import Spec

ROWS = 2  # one sample alone, a network with BatchNorm refuses


def check(specs: Iterable[Spec]) -> None:
    """One dry forward pass for each pair of network and data set. SpecError names the first that does not fit."""
    for spec in {(spec.model, spec.data): spec for spec in specs}.values():
        try:
            task = build.task(spec, torch.device("cpu"))
            samples = task.train[0][:ROWS], task.train[1][:ROWS]
            with torch.no_grad():
                task.loss(task.initial(), samples)
        except FedlibError:
            raise
        except Exception as error:  # whatever a network raises
            said = str(error).splitlines()[:1] or [type(error).__name__]
            pair = f"model {spec.model!r} does not fit data set {spec.data!r}"
            raise SpecError(f"{spec.name}: {pair} ({said[0]}); use another of them") from error
