"""The networks of partial training (FedPT), as the code of `google-research/federated` (a5af8c4) has them.

Names of parameters tell layers apart, for the patterns of `fedlib.models.freezing`. None has BatchNorm, whose
statistics would be neither trained nor frozen, and none dropout. `initializers` makes the initial weights, by the laws
of that code.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedlib.errors import SpecError
from fedlib.models.initializers import Builder, initialise
from fedlib.rng import Rng

HEAD = 100  # outputs of the public script for CIFAR-10, which has ten classes


def emnist(widths: tuple[int, int], hidden: int) -> Builder:
    """conv1, conv2, dense1, dense2 with biases; ReLU after all but the last, 2x2 max-pooling after convolutions."""

    def build(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
        if side < 4:
            raise SpecError(f"model: emnist halves images twice; {side} x {side} pixels are too small, 4 are enough")
        layers = OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, widths[0], 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(widths[0], widths[1], 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(widths[1] * (side // 4) ** 2, hidden),
            relu3=nn.ReLU(),
            dense2=nn.Linear(hidden, classes),
        )
        return initialise(nn.Sequential(layers), "glorot", root)

    return build


def resnet18_gn(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """ResNet-18 with GroupNorm. 3 channels: 11,181,642 parameters (10 classes)."""
    return initialise(resnet(channels, classes), "he", root)


def resnet18_gn_100head(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """The same with 100 outputs, of which the last are never right. 3 channels: 11,227,812 parameters."""
    if classes > HEAD:
        raise SpecError(f"model: resnet18-gn-100head has {HEAD} outputs, the data {classes} classes; use resnet18-gn")
    return initialise(resnet(channels, HEAD), "he", root)


def transformer(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Language model for texts of any length (`side` tokens, of `classes` kinds), of a size that two CPU cores train:
    widths are those of the paper's code divided by 3, 8, 2 and 16. 32 * classes + 37,664 parameters."""
    if channels != 1:
        raise SpecError(f"model: transformer reads one token id a place; these data have {channels} channels")
    network = language_model(classes, embedding=32, width=64, heads=4, hidden=128, blocks=1)
    return initialise(network, "glorot", root)


def resnet(channels: int, outputs: int, widths: Sequence[int] = (64, 128, 256, 512)) -> nn.Sequential:
    """Stem, four stages of two pre-activation blocks, all on maps of a quarter of the image's side (no stage strides),
    last norm, mean over places, head.

    Keras pads the stem (7x7, stride 2) and the pool (3x3, stride 2) of an image with an even side by one pixel less at
    the top and left than at the bottom and right; here it is the other way round. It is the same network on images
    turned by 180 degrees.
    """
    layers = OrderedDict[str, nn.Module](
        stem=nn.Conv2d(channels, widths[0], 7, stride=2, padding=3, bias=False),
        norm1=_norm(widths[0]),
        relu1=nn.ReLU(),
        pool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    for index, (before, after) in enumerate(itertools.pairwise((widths[0], *widths)), 1):
        pair = {"block1": Residual(before, after, first=index == 1), "block2": Residual(after, after)}
        layers[f"stage{index}"] = nn.Sequential(OrderedDict(pair))
    layers.update(norm2=_norm(widths[-1]), relu2=nn.ReLU(), mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    layers["head"] = nn.Linear(widths[-1], outputs)
    return nn.Sequential(layers)


class Residual(nn.Module):
    """x + conv2(relu(norm2(conv1(relu(norm1(x)))))) with 3x3 convolutions; [n, before, h, w] -> [n, after, h, w].

    The network's `first` block has no norm1 and ReLU, which the stem ends with. Where the number of channels changes,
    the x that is added goes through a 1x1 convolution and a norm.
    """

    def __init__(self, before: int, after: int, first: bool = False) -> None:
        super().__init__()
        self.enter = nn.Sequential() if first else nn.Sequential(OrderedDict(norm1=_norm(before), relu=nn.ReLU()))
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = _norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        changed = OrderedDict(project=nn.Conv2d(before, after, 1, bias=False), norm=_norm(after))
        self.shortcut = nn.Sequential() if before == after else nn.Sequential(changed)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(self.enter(x)))))
        return hidden + self.shortcut(x)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-3)


def language_model(
    vocabulary: int, embedding: int = 96, width: int = 512, heads: int = 8, hidden: int = 2048, blocks: int = 1
) -> nn.Sequential:
    """Decoder-only Transformer: token ids [n, length], or as numbers [n, 1, length, 1], to logits [n, length,
    vocabulary] of the token after each. Sizes as in the paper's code: 4,211,680 parameters (vocabulary 10,004).

    Causal: padding at the end has no influence on what stands before it. The logits use the embedding's own weights.
    """
    if width % heads:
        raise SpecError(f"heads: {heads} must divide the width {width}")
    first = Embedded(vocabulary, embedding)
    layers = OrderedDict[str, nn.Module](embedding=first, widen=nn.Linear(embedding, width))
    layers.update({f"block{index}": Block(width, heads, hidden) for index in range(1, blocks + 1)})
    logits = nn.Linear(embedding, vocabulary, bias=False)
    logits.weight = first.weight  # one parameter, named and counted once
    layers.update(narrow=nn.Linear(width, embedding), logits=logits)
    return nn.Sequential(layers)


class Embedded(nn.Embedding):
    """Token ids to their vectors times sqrt(width), plus sine and cosine of the place; [n, length, width]."""

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.flatten(1).long()
        scaled = super().forward(tokens) * math.sqrt(self.embedding_dim)
        return scaled + positions(tokens.shape[1], self.embedding_dim, self.weight)


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """Columns 2i and 2i + 1: sine and cosine of place / 10000^(2i / width) (Vaswani et al. 2017). [length, width]

    Computed anew, as a buffer would pass for one of BatchNorm's statistics.
    """
    place = torch.arange(length, device=like.device, dtype=like.dtype)[:, None]
    column = torch.arange(width, device=like.device)
    angle = place * 10000.0 ** (-(column - column % 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


class Block(nn.Module):
    """Attention, then a feed-forward pair, each added to its input and then normalised; [n, length, width]."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        pair = OrderedDict[str, nn.Module](
            hidden=nn.Linear(width, hidden), relu=nn.ReLU(), output=nn.Linear(hidden, width)
        )
        self.feed = nn.Sequential(pair)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feed(x))


class Attention(nn.Module):
    """Causal self-attention by plain products: vmap takes them, and a count of products sees them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        split = (n, length, self.heads, width // self.heads)
        query, key, value = (layer(x).reshape(split).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / math.sqrt(split[3])  # [n, heads, length, length]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(3) @ value
        return self.output(mixed.transpose(1, 2).reshape(n, length, width))
