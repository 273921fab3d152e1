"""Bernoulli masks: what they cost, how far their mean errs, what penalties on their probabilities do.

The numbers behind the chapter "Entropy regularization". The setting is that of Isik, Pase, Gunduz, Weissman, Zorzi,
"Sparse Random Networks for Communication-Efficient Federated Learning" (FedPM), ICLR 2023, arXiv:2209.15328: frozen
random weights w, trained scores s, probabilities theta = sigma(s), masks m ~ Bern(theta). The statements that are
checked with it are this project's own derivations. Everything runs on the CPU in one process; there is no server here.

    H(p), dH/dp, and p from H(p)                         -> `entropy`, `slope`, `density_of`
    cost of the adaptive and of the enumerative coder    -> `adaptive_bits`, `enumerative_bits`
    three counts of bits per parameter                   -> `bits_per_parameter`
    penalties on theta, their gradients in s             -> `PENALTIES`, `gradient`
    || mean of masks - mean of theta ||^2                -> `estimation_errors`
    masked networks, trained by Adam                     -> `Network`, `train`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, e, lgamma, log, log2, pi, sqrt

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from fedlib.data import Dataset
from fedlib.rng import Rng, signs

LN2 = log(2)
SCALES = {"e/√fan_in": e, "2/√fan_in": 2.0, "√(2/fan_in)": sqrt(2)}  # c times sqrt(fan_in); the first is FedPM's code


def entropy(p: Tensor) -> Tensor:
    """H(p) in bits, entry by entry; H(0) = H(1) = 0."""
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / LN2


def slope(p: Tensor) -> Tensor:
    """dH/dp = log2((1 - p) / p), bits; infinite at 0 and 1."""
    return torch.log2((1 - p) / p)


def density_of(bits: float) -> float:
    """The p in [0, 1/2] with H(p) = `bits`, for bits in [0, 1], by bisection."""
    low, high = 0.0, 0.5
    for _ in range(200):
        middle = (low + high) / 2
        value = -middle * log2(middle) - (1 - middle) * log2(1 - middle) if middle else 0.0
        low, high = (middle, high) if value < bits else (low, middle)
    return high


def adaptive_bits(n: int, k: int) -> float:
    """Bits that the estimator of Krichevsky and Trofimov (1981) gives a mask of n entries with k ones, in any order.

    It expects the next entry to be 1 with probability (ones so far + 1/2) / (entries so far + 1).
    """
    return (log(pi) + lgamma(n + 1) - lgamma(k + 0.5) - lgamma(n - k + 0.5)) / LN2


def enumerative_bits(n: int, k: int) -> int:
    """Whole bits of k, and of the number of the mask among those of n entries with k ones. Exact for n up to 1e9."""
    return ceil(log2(n + 1)) + ceil((lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / LN2 - 1e-6)


def bits_per_parameter(mask: Tensor, sizes: Sequence[int], theta: Tensor) -> tuple[float, float, float]:
    """Bits per parameter of a mask [n], counted in three ways: pooled, by layer, given the model.

    `sizes` are the layers' lengths, `theta` [n] what the receiver takes for each entry's probability.
    """
    pooled = entropy(mask.double().mean())
    layered = sum(entropy(part.double().mean()) * len(part) for part in mask.split(list(sizes))) / len(mask)
    given = -torch.where(mask > 0, theta, 1 - theta).double().log2().mean()
    return float(pooled), float(layered), float(given)


# Each maps theta [n] to a number between 0 and 1, that a strength lambda multiplies.
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda theta: theta.mean(),
    "pooled entropy": lambda theta: entropy(theta.mean()),
    "mean entropy": lambda theta: entropy(theta).mean(),
}


def gradient(penalty: str, s: Tensor, pooled: float | None = None) -> Tensor:
    """n times d(penalty)/ds at scores s [n], in closed form; `pooled` stands in for the mean of theta where given."""
    theta = torch.sigmoid(s)
    mean = theta.mean() if pooled is None else torch.tensor(pooled, dtype=s.dtype)
    factor = {"linear": torch.ones_like(s), "pooled entropy": slope(mean), "mean entropy": -s / LN2}[penalty]
    return factor * theta * (1 - theta)


def estimation_errors(theta: Tensor, draws: int, rng: Rng) -> Tensor:
    """|| mean of K masks - mean of K thetas ||^2 / n for theta [K, n], in each of `draws` independent trials [draws]."""
    generator, mean = rng.torch(), theta.mean(0)
    trials = [
        (torch.rand(theta.shape, generator=generator, dtype=theta.dtype) < theta).to(theta.dtype).mean(0)
        for _ in range(draws)
    ]
    return (torch.stack(trials) - mean).square().mean(1)


@dataclass(frozen=True)
class Network:
    """Fully connected ReLU network without biases; its weights are frozen, a mask keeps some of them."""

    w: Tensor  # [n], entries -c or +c with c of each layer
    shapes: tuple[tuple[int, int], ...]  # outputs, inputs of each layer

    @staticmethod
    def draw(widths: Sequence[int], scale: float, rng: Rng) -> Network:
        """c = scale / sqrt(inputs of the layer), signs of a fair coin."""
        shapes = tuple((outputs, inputs) for inputs, outputs in pairwise(widths))
        coins = [signs(rng.seed(), index, a * b) * scale / sqrt(b) for index, (a, b) in enumerate(shapes)]
        return Network(torch.cat([torch.from_numpy(part).float() for part in coins]), shapes)

    @property
    def sizes(self) -> list[int]:
        return [outputs * inputs for outputs, inputs in self.shapes]

    def layers(self, mask: Tensor, x: Tensor) -> list[Tensor]:
        """Pre-activations [images, outputs] of every layer for images x [images, inputs]; the last are the logits."""
        found: list[Tensor] = []
        for part, shape in zip((mask * self.w).split(self.sizes), self.shapes, strict=True):
            found.append(functional.linear(found[-1].relu() if found else x, part.view(shape)))
        return found

    def data_gradient(self, mask: Tensor, s: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Gradient [n] of the mean cross-entropy in the scores, straight through the mask: dm/dtheta counts as 1."""
        through = mask.clone().requires_grad_()
        loss = functional.cross_entropy(self.layers(through, x)[-1], y)
        theta = torch.sigmoid(s)
        return torch.autograd.grad(loss, through)[0] * theta * (1 - theta)


def draw_mask(theta: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(theta.shape, generator=generator) < theta).float()


def train(
    network: Network,
    data: Dataset,
    rng: Rng,
    penalty: str = "linear",
    strength: float = 0.0,
    rounds: int = 20,
    steps: int = 15,
    lr: float = 0.1,
    fresh: bool = True,
    scores: Tensor | None = None,
) -> tuple[pd.DataFrame, Tensor]:
    """Train scores (standard normal, or those given) on loss + strength * penalty by Adam; batches of 64 images.

    A mask is drawn at every step. `fresh` starts Adam anew each round. Returns a row for each round: accuracy in % on
    the test images (mean of 5 masks), bits per parameter (pooled) of a mask, density, mean entropy of theta, and the
    expected kept weights of each layer; and the scores [n].
    """
    generator = rng.torch()
    s = torch.randn(len(network.w), generator=generator) if scores is None else scores.clone()
    x, y, test = data.train_x.flatten(1), data.train_y, data.test_x.flatten(1)
    optimizer, rows = torch.optim.Adam([s], lr), []
    for number in range(1, rounds + 1):
        if fresh:
            optimizer = torch.optim.Adam([s], lr)
        for _ in range(steps):
            batch, theta = torch.randint(len(x), (64,), generator=generator), torch.sigmoid(s)
            s.grad = network.data_gradient(draw_mask(theta, generator), s, x[batch], y[batch])
            s.grad += strength / len(s) * gradient(penalty, s)
            optimizer.step()
        theta = torch.sigmoid(s)
        masks = [draw_mask(theta, generator) for _ in range(5)]
        right = sum((network.layers(m, test)[-1].argmax(1) == data.test_y).float().mean().item() for m in masks)
        row = {"round": number, "accuracy": 100 * right / 5, "bits": entropy(masks[0].double().mean()).item()}
        row |= {"density": theta.mean().item(), "mean entropy": entropy(theta.double()).mean().item()}
        rows.append(row | {f"layer {i}": part.sum().item() for i, part in enumerate(theta.split(network.sizes), 1)})
    return pd.DataFrame(rows), s
