"""What a model and its local training are described by: named tensors and their shapes, and the training plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # by name
Samples = tuple[Tensor, Tensor]  # x [n, ...], y [n, ...]
Shapes = Mapping[str, torch.Size]


def count(shapes: Shapes) -> int:
    """Entries of all tensors together."""
    return sum(shape.numel() for shape in shapes.values())


def flat(tensors: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """Those of the tensors that have a shape here, in the order of the shapes, as one vector [d]."""
    return torch.cat([tensors[name].flatten() for name in shapes])


def all_finite(tensor: Tensor) -> bool:
    """Whether all entries are: their sum tells in one pass, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def layers(vector: Tensor, shapes: Shapes) -> Tensors:
    """The inverse: a vector [d] as tensors by name (views)."""
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def layer_of_each_entry(shapes: Shapes) -> np.ndarray:
    """Number of the layer that each of the d entries belongs to."""
    return np.repeat(np.arange(len(shapes)), [shape.numel() for shape in shapes.values()])


@dataclass(frozen=True)
class Plan:
    """Local training of one client in one round: SGD, with momentum or without, or Adam; no weight decay."""

    epochs: int
    batch: int  # samples a step; the last, smaller batch is kept
    lr: float
    optimizer: str = "sgd"
    persistent: bool = False  # what the optimizer keeps outlives the round, at the client
    momentum: float = 0.0  # of SGD: m <- momentum m + gradient, and the step is lr m

    @property
    def keeps(self) -> bool:
        """Whether the optimizer keeps anything from step to step."""
        return self.optimizer == "adam" or self.momentum > 0

    def steps(self, samples: int) -> int:
        """S = E * ceil(D / B)."""
        return self.epochs * -(-samples // self.batch)
