"""Networks that end in the mean over places and a linear layer `head`: `network[:-1]` is their embedding, [n, d].

ResNet-20 and the MobileNet layout of YAMNet as the code of FedCompress (`FederatedML/FedCompress`, 8610253) has them,
narrower ones, and four convolutions for digits. Convolutions have no biases; a BatchNorm follows each.

Initial weights follow that code as well: kernels of the ResNet (and of the network for digits) have He's law of
`initializers`, those of the MobileNet and every head Glorot's, which is Keras' default; biases are 0.

Momentum is the weight of a batch in the moving statistics, the complement of what Keras calls so. With 0.01 they lag
hundreds of steps behind, which networks for runs of few steps avoid by 0.1.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedlib.errors import SpecError
from fedlib.models.initializers import Builder, initialise, number, values
from fedlib.rng import Rng

WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)  # of the stem and of block 1 to 13
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of block 1 to 13; the stem's is 2


def pooled4(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Four 3x3 convolutions, a 2x2 max-pool after the second; d = 64. 1x8x8: 33,338 parameters (10 classes)."""
    _require("pooled4", side, 2)
    layers = OrderedDict[str, nn.Module]()
    for index, (before, after) in enumerate(itertools.pairwise((channels, 16, 32, 32, 64)), 1):
        layers[f"conv{index}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(after)
        layers[f"relu{index}"] = nn.ReLU()
        if index == 2:
            layers["pool"] = nn.MaxPool2d(2)
    return _headed(layers, 64, classes, root)


def resnet20(momentum: float) -> Builder:
    """Stem and three stages of three blocks (He et al., CVPR 2016, section 4.2), the second and third on half the side;
    d = 64.

    Before a convolution of stride 2, Keras pads an image with an even side by a pixel at the bottom and right only, so
    that the convolution is centred on the odd rows and columns while the shortcut takes the even ones. Here both take
    the even ones. Shapes, counts and cost are the same, and kernels are trained for the place where they lie.

    Images of 4 x 4 leave one place, of which no BatchNorm trains on a batch of one image.
    """

    def build(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
        _require("resnet20", side, 4)
        layers = OrderedDict[str, nn.Module](
            conv=nn.Conv2d(channels, 16, 3, padding=1, bias=False), norm=_norm(16, momentum), relu=nn.ReLU()
        )
        for index, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            blocks = {f"block{place}": Basic(before if place == 1 else after, after, momentum) for place in (1, 2, 3)}
            layers[f"stage{index}"] = nn.Sequential(OrderedDict(blocks))
        return _headed(layers, 64, classes, root)

    return build


class Basic(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut); [n, before, h, w] -> [n, after, h, w].

    Where the number of channels grows, conv1 has stride 2 and the result sides h / 2 and w / 2, rounded up. The
    shortcut then is every second row and column of x with channels of zeros after its own ("type A").
    """

    def __init__(self, before: int, after: int, momentum: float) -> None:
        super().__init__()
        self.added = after - before
        self.stride = 2 if self.added else 1
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, padding=1, bias=False)
        self.norm1 = _norm(after, momentum)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = _norm(after, momentum)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.added:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return torch.relu(hidden + x)


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=momentum)


def mobilenet(momentum: float, divisor: int = 1, left_out: Sequence[int] = ()) -> Builder:
    """A stem and 13 depthwise-separable blocks (Howard et al. 2017) with YAMNet's widths over `divisor`, for
    log-mel spectrograms [n, 1, frames, bands], of which `side` counts the frames; d = 1024 / divisor. left_out: numbers
    of blocks.

    Before a convolution of stride 2, Keras pads an even side by a pixel at the bottom and right only, this network by
    one at each end, of which the convolution does not reach the last. It is the same network on images turned by 180
    degrees. A side is halved five times, rounded up; one of 32 leaves a single place, of which no BatchNorm trains on a
    batch of one image.
    """
    widths = [width // divisor for width in WIDTHS]

    def build(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
        _require("mobilenet", side, 32)
        layers = OrderedDict[str, nn.Module](
            conv=nn.Conv2d(channels, widths[0], 3, stride=2, padding=1, bias=False),
            norm=Shift(widths[0], momentum),
            relu=nn.ReLU(),
        )
        for index, ((before, after), stride) in enumerate(zip(itertools.pairwise(widths), STRIDES, strict=True), 1):
            block = OrderedDict[str, nn.Module](
                depthwise=nn.Conv2d(before, before, 3, stride, padding=1, groups=before, bias=False),
                norm1=Shift(before, momentum),
                relu1=nn.ReLU(),
                pointwise=nn.Conv2d(before, after, 1, bias=False),
                norm2=Shift(after, momentum),
                relu2=nn.ReLU(),
            )
            if index not in left_out:
                layers[f"block{index}"] = nn.Sequential(block)
        return _headed(layers, widths[-1], classes, root, law="glorot")

    return build


class Shift(nn.BatchNorm2d):
    """BatchNorm that trains a shift and has no scale (Keras' `scale=False`)."""

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__(channels, eps=1e-4, momentum=momentum)
        self.register_parameter("weight", None)


def _require(name: str, side: int, least: int) -> None:
    if side < least:
        raise SpecError(f"model: {name} needs images of {least} x {least} pixels or more; these have {side} x {side}")


def _headed(layers: OrderedDict[str, nn.Module], width: int, classes: int, root: Rng, law: str = "he") -> nn.Sequential:
    """The layers, the mean over places and a head, with initial weights: kernels by `law`, the head by Glorot's.

    `initializers` has a law of its own for whatever is called "head", so that the head's weights are drawn as "output".
    """
    head = nn.Linear(width, classes)
    layers.update(mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=head)
    network = initialise(nn.Sequential(layers), law, root)
    with torch.no_grad():
        head.weight.copy_(values(number(root), "output.weight", head.weight.shape, "glorot"))
    return network
