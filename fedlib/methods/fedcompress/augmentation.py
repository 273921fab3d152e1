"""Random flips, shifts and cuts of training images, made from draws that engines can stack.

As in the code of FedCompress (`FederatedML/FedCompress`, 8610253): a horizontal flip, a crop of the image with a border
of an eighth of its side, and cutout (DeVries, Taylor, arXiv:1708.04552) of a square of half its side, whose centre lies
at random, or, as that code calls it, on the upper left corner. What is cut or beyond the border is 0, the mean of
normalised images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlib.core.task import Task
from fedlib.rng import Stream

KINDS = ("none", "corner", "random")  # where cutout cuts, of those that are not none


def draws(kind: str, task: Task, stream: Stream) -> Tensor | None:
    """Uniform on [0, 1) [batch, 5], on the task's device: what `augmented` needs for a batch, or a smaller one."""
    return None if kind == "none" else stream.uniform(task.plan.batch, 5)


def augmented(batch: tuple[Tensor, Tensor], u: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Images [n, channels, height, width] flipped, shifted and cut, by draws u [at least n, 5]; their labels."""
    if u is None:
        return batch
    x, labels = batch
    n, _, h, w = x.shape
    flip, down, right, y, z = u[:n, :, None].unbind(1)
    rows, columns = torch.arange(h, device=x.device).expand(n, h), torch.arange(w, device=x.device).expand(n, w)
    if kind == "corner":
        y, z = torch.zeros_like(y), torch.zeros_like(z)
    cut = _near(rows, y, h)[:, :, None] & _near(columns, z, w)[:, None, :]
    columns = torch.where(flip < 0.5, w - 1 - columns, columns)
    i, j = rows + _shift(down, h), columns + _shift(right, w)
    inside = ((i >= 0) & (i < h))[:, :, None] & ((j >= 0) & (j < w))[:, None, :]
    image = torch.arange(n, device=x.device)[:, None, None]
    found = x[image, :, i.clamp(0, h - 1)[:, :, None], j.clamp(0, w - 1)[:, None, :]]  # [n, height, width, channels]
    return (found * (inside & ~cut)[..., None]).permute(0, 3, 1, 2), labels


def _shift(u: Tensor, side: int) -> Tensor:
    return (u * (2 * (side // 8) + 1)).long() - side // 8


def _near(places: Tensor, u: Tensor, side: int) -> Tensor:
    centre = (u * side).long()
    return (places >= centre - side // 4) & (places < centre + side // 4)
