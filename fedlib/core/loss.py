"""The loss that every network here trains with."""

from __future__ import annotations

from torch import Tensor, nn

from fedlib.data.text import NO_LABEL


def cross_entropy(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Of logits [n, classes] with labels [n]; of sequences [n, length, classes] with [n, length], where NO_LABEL does
    not count."""
    if logits.ndim == 2:
        return nn.functional.cross_entropy(logits, y, reduction=reduction)
    return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction=reduction, ignore_index=NO_LABEL)
