"""Training a part of a network: the numbers behind the chapter of that name, whose proofs are this project's own.

The method is that of Sidahmed et al., arXiv:2110.03450 (`fedlib.methods.fedpt`): tensors y are trained, z are frozen.

    Jacobian by tensors, K of some of them           -> `jacobians`, `kernel`
    eigenvalues of K_y over those of K, by width     -> `shares`
    factor on the mean square of a layer's input     -> `gain`
    bytes that the backward pass waits for           -> `kept`
    noise at which freezing overtakes                -> `crossing`
    clipped, noisy gradient descent on a quadratic   -> `descent`
    epsilon by formula, which checks the package     -> `classic_epsilon`, `sharper_epsilon`, `poisson_divergence`
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, jacrev

from fedlib.methods.fedpt import accounting
from fedlib.models.initializers import initialise
from fedlib.rng import Rng


def layers(widths: Sequence[int], law: str, root: Rng) -> nn.Sequential:
    """Linear layers `layer1`, `layer2`, ... with biases and ReLUs between them, in float64."""
    found = OrderedDict[str, nn.Module]()
    for index, (before, after) in enumerate(itertools.pairwise(widths), 1):
        if index > 1:
            found[f"relu{index - 1}"] = nn.ReLU()
        found[f"layer{index}"] = nn.Linear(before, after)
    return initialise(nn.Sequential(found), law, root).double()


def jacobians(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Derivative of all outputs for x [n, ...] with respect to each parameter: [n outputs, entries]."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    found = jacrev(lambda tensors: functional_call(network, tensors, (x,)).flatten())(parameters)
    return {name: part.flatten(1) for name, part in found.items()}


def kernel(jacobian: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
    """J J^T of the named parameters alone."""
    rows = len(next(iter(jacobian.values())))
    return sum((jacobian[name] @ jacobian[name].T for name in names), torch.zeros(rows, rows, dtype=torch.float64))


def shares(x: Tensor, trained: Mapping[str, Collection[str]], widths: Sequence[int], root: Rng) -> pd.DataFrame:
    """Networks of inputs, 32, m hidden units and one output with He's weights, three for each width m: columns what,
    log2 of m, middle and smallest eigenvalue of the part (a set of layers, by a name) over that of the whole."""
    rows = []
    for m, repetition in itertools.product(widths, range(3)):
        jacobian = jacobians(layers((x.shape[1], 32, m, 1), "he", root.child(repetition)), x)
        whole = torch.linalg.eigvalsh(kernel(jacobian, jacobian))
        for what, chosen in trained.items():
            own = [name for name in jacobian if name.split(".")[0] in chosen]
            ratio = torch.linalg.eigvalsh(kernel(jacobian, own)).clamp(min=0) / whole
            rows.append((what, math.log2(m), float(ratio[len(x) // 2]), float(ratio[0]), float(ratio.max())))
    columns = ["what", "log₂ of the width m", "middle eigenvalue", "smallest", "largest ratio"]
    return pd.DataFrame(rows, columns=columns)


def gain(law: str, fan_in: int, fan_out: int) -> float:
    """Mean square of a layer's output, without ReLU, over that of its input, in the mean over the weights."""
    return {"he": 2.0, "glorot": 2 * fan_in / (fan_in + fan_out), "torch": 1 / 3}[law]


def kept(network: nn.Module, x: Tensor, frozen: Collection[str]) -> int:
    """Bytes of activations that automatic differentiation keeps from the forward pass for the backward pass."""
    tensors = {name: p.detach().to("meta").requires_grad_(name not in frozen) for name, p in network.named_parameters()}
    own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            held.append(tensor)  # or another could get its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        functional_call(network, tensors, (x.to("meta"),))
    return sum(sizes.values())


def crossing(share: float, trained: float, entries: float) -> float:
    """nm / M above which one clipped step is better with a part frozen, by the bound; infinity where it never is.

    The other part is `trained` of the `entries` (or of the Hessian's trace over L) and `share` of the squared gradient.
    """
    room = share * entries - trained
    return math.sqrt((1 - share) / room) if room > 0 else math.inf


def descent(
    curvature: Tensor, start: Tensor, trained: Tensor, ratio: float, rates: Tensor, rng: Rng, rounds: int = 50
) -> Tensor:
    """Loss after so many rounds on f(x) = sum of h_j x_j^2 / 2, over that of the start, for each rate; float64.

    trained: places of the entries that move. All clients agree, C = 1, and ratio is nm / M: a step is the rate times
    the clipped negative gradient plus noise of deviation nm C / M an entry.
    """
    generator = rng.torch()
    losses = curvature * start.square() / 2
    h, x = curvature[trained], start[trained].expand(len(rates), -1)
    for _ in range(rounds):
        gradient = h * x
        clipped = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1)
        noise = ratio * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = x - rates[:, None] * (clipped + noise)
    return (losses.sum() - losses[trained].sum() + (h * x.square()).sum(1) / 2) / losses.sum()


def expected_norm(size: int, std: float) -> float:
    """Mean Euclidean norm of `size` draws from N(0, std^2); about std sqrt(size)."""
    return std * math.sqrt(2) * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2))


def convert(orders: np.ndarray, divergences: np.ndarray, delta: float) -> float:
    """Epsilon from Rényi divergences at orders above 1 (Canonne, Kamath, Steinke 2020, proposition 12)."""
    bounds = divergences + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(bounds.min()))


def classic_epsilon(rho: float, delta: float) -> float:
    """Epsilon of rho-zCDP by Bun and Steinke's proposition 1.3."""
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def sharper_epsilon(rho: float, delta: float) -> float:
    """Epsilon of rho-zCDP by `convert`."""
    return convert(accounting.ORDERS, accounting.ORDERS * rho, delta)


def poisson_divergence(rate: float, noise_multiplier: float, order: int) -> float:
    """Rényi divergence, of a whole order, of one round with Poisson sampling (Mironov, Talwar, Zhang 2019)."""
    k = np.arange(order + 1)
    logs = [math.lgamma(order + 1) - math.lgamma(j + 1) - math.lgamma(order - j + 1) for j in range(order + 1)]
    terms = logs + k * math.log(rate) + (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * noise_multiplier**2)
    return float(np.logaddexp.reduce(terms)) / (order - 1)
