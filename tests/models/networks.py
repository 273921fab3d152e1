"""Networks, and what is counted and checked of them, for all the tests of this folder."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedlib.models import initializers, partial
from fedlib.models.registry import build
from fedlib.rng import Rng

Shapes = dict[str, torch.Size]
POOLED = ("resnet20", "mobilenet-short", "pooled4")


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def follows(values: Tensor, deviation: float) -> bool:
    """Mean 0 and this deviation, each within five standard errors of a normal law."""
    entries, n = values.detach(), values.numel()
    centred = abs(float(entries.mean())) < 5 * deviation / n**0.5
    return centred and abs(float(entries.std()) / deviation - 1) < 5 / (2 * n) ** 0.5


def untouched(norm: nn.BatchNorm2d) -> bool:
    """Moving statistics as at the start: mean 0, variance 1."""
    assert norm.running_mean is not None and norm.running_var is not None
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


def shaken(network: nn.Sequential) -> nn.Sequential:
    """In evaluation mode; no scale, shift, bias or statistic is such that forgetting it would not show."""
    generator = torch.Generator().manual_seed(5)
    network.requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1:
            noise = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor * noise.exp() if name.endswith("running_var") else tensor + noise)
    return network.eval()


def on_paper(make: Callable[[], nn.Sequential]) -> nn.Sequential:
    """The network without entries: shapes are all that counting needs."""
    with torch.device("meta"):
        return make()


def shapes(network: nn.Module) -> Shapes:
    return {name: p.shape for name, p in network.named_parameters()}


def size(shapes: Mapping[str, torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())


def emnist() -> nn.Sequential:
    return on_paper(lambda: build("emnist", 1, 28, 62, Rng(0)))


def resnet(outputs: int) -> nn.Sequential:
    return on_paper(lambda: partial.resnet(3, outputs))


def spec_transformer(blocks: int) -> nn.Sequential:
    return on_paper(lambda: partial.language_model(10_004, blocks=blocks))


def few(name: str) -> tuple[nn.Sequential, Callable[[int], Tensor]]:
    """A network and inputs for it: `n` of them."""
    generator = torch.Generator().manual_seed(2)
    if name in POOLED:
        return build(name, 1, 32, 5, Rng(0)), lambda n: torch.randn(n, 1, 32, 33, generator=generator)
    if name == "transformer":
        network = build(name, 1, 6, 12, Rng(0))
        return network, lambda n: torch.randint(0, 12, (n, 1, 6, 1), generator=generator).float()
    if name == "emnist":
        network = build("emnist-narrow", 1, 8, 5, Rng(0))
        return network, lambda n: torch.randn(n, 1, 8, 8, generator=generator)
    network = initializers.initialise(partial.resnet(3, 5, widths=(32, 32, 64, 64)), "he", Rng(0))
    return network, lambda n: torch.randn(n, 3, 8, 8, generator=generator)
