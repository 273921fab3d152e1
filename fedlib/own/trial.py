"""Before a run: whether the network takes the data, by one step on two samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlib.data.objective import Objective
from fedlib.errors import SpecError
from fedlib.runs import build
from fedlib.runs.spec import Spec


def draws(spec: Spec) -> bool:
    """Whether the network draws by itself, as dropout does. SpecError: what a step of training on two samples shows."""
    task = build.task(spec, torch.device("cpu"))
    x, y = (part[:2] for part in task.train)
    model = task.initial()
    before = {name: buffer.clone() for name, buffer in task.network.named_buffers()}
    task.network.train()
    outputs = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            try:
                outputs.append(task.logits({name: tensor.clone() for name, tensor in model.items()}, x))
            except Exception as error:  # whatever a network raises
                said = str(error).splitlines()[:1] or [type(error).__name__]
                hint = "; x is integer: make it float for all but embeddings" if not x.is_floating_point() else ""
                raise SpecError(
                    f"network: it cannot take samples of shape {list(x.shape[1:])} ({said[0]}){hint}"
                ) from error
        output = outputs[0]
        if not isinstance(output, Tensor):
            raise SpecError(f"network: gives {type(output).__name__}; expected one tensor, [n, ...]: return it alone")
        check_output(task.objective, output, y, torch.cat([task.train[1].flatten(), task.test[1].flatten()]))
    for name, buffer in task.network.named_buffers():
        if name not in task.statistics and not torch.equal(buffer, before[name]):
            raise SpecError(f"network: buffer {name} changes in training; only BatchNorm's statistics are sent")
    return not torch.equal(outputs[0], outputs[1])


def check_output(objective: Objective, output: Tensor, y: Tensor, labels: Tensor) -> None:
    if objective.classes:
        most = int(labels.max())
        if output.ndim < 2 or output.shape[-1] <= most:
            wide = output.shape[-1] if output.ndim > 1 else 1
            raise SpecError(
                f"labels: {most} occurs, but the network has {wide} outputs, for labels 0 to {wide - 1}; "
                "count labels from 0, give the network more outputs, or floats where these are no labels"
            )
    for name, measure in {"loss": objective.train, **objective.metrics}.items():
        try:
            found: Any = measure(output, y)
        except Exception as error:
            raise SpecError(
                f"{name}: raises {type(error).__name__} on an output of shape {list(output.shape)}: {error}"
            ) from error
        if not isinstance(found, Tensor | float | int) or (isinstance(found, Tensor) and found.numel() != 1):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise SpecError(f"{name}: gives {shape}; expected one number, the mean over a batch")
