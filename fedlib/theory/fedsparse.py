"""Bernoulli masks: what they cost, how far their mean errs, what penalties on their probabilities do.

The numbers behind the chapter "Entropy regularization"; its statements are this project's own derivations. The setting
is that of Isik, Pase, Gunduz, Weissman, Zorzi, "Sparse Random Networks for Communication-Efficient Federated Learning"
(FedPM), ICLR 2023, arXiv:2209.15328: frozen random weights w, trained scores s, probabilities theta = sigma(s), masks
m ~ Bern(theta). Here is one client and no server; everything runs on the CPU.

    H(p), dH/dp, and p from H(p)                       -> `entropy`, `slope`, `density_of`
    cost under an adaptive and an enumerative code     -> `adaptive_bits`, `enumerative_bits`
    three counts of bits per parameter                 -> `bits_per_parameter`
    penalties on theta, their gradients in s           -> `PENALTIES`, `gradient`
    || mean of masks - mean of theta ||^2              -> `estimation_errors`
    Adam's steps for a given sequence of gradients     -> `adam_steps`
    masked networks and their training                 -> `Network`, `train`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lgamma, log, log2, pi, sqrt

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from fedlib.data.sets import Dataset
from fedlib.rng import Rng, signs

LN2 = log(2)


def entropy(p: Tensor) -> Tensor:
    """H(p) in bits, entry by entry; H(0) = H(1) = 0."""
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / LN2


def slope(p: Tensor) -> Tensor:
    """dH/dp = log2((1 - p) / p), bits; infinite at 0 and 1."""
    return torch.log2((1 - p) / p)


def density_of(bits: float) -> float:
    """The p in (0, 1/2] with H(p) = `bits`, for bits in (0, 1], by bisection of log2 p."""
    low, high = -1000.0, -1.0
    for _ in range(100):
        middle = (low + high) / 2
        below = entropy(torch.tensor(2**middle, dtype=torch.float64)) < bits
        low, high = (middle, high) if below else (low, middle)
    return 2**high


def adaptive_bits(n: int, k: int) -> float:
    """Bits of a mask of n entries with k ones under the estimator of Krichevsky and Trofimov (1981).

    It takes the next entry for a 1 with probability (ones so far + 1/2) / (entries so far + 1); their order is all one.
    """
    return (log(pi) + lgamma(n + 1) - lgamma(k + 0.5) - lgamma(n - k + 0.5)) / LN2


def enumerative_bits(n: int, k: int) -> float:
    """Bits that number k, and the mask among those of n entries with k ones; before either is rounded up."""
    return log2(n + 1) + (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / LN2


def bits_per_parameter(mask: Tensor, sizes: Sequence[int], theta: Tensor) -> tuple[float, float, float]:
    """Bits per parameter of a mask [n], counted in three ways: pooled, by layer, given the model.

    `sizes` are the layers' lengths, `theta` [n] what the receiver takes for each entry's probability.
    """
    mask = mask.double()
    layered = sum(entropy(part.mean()) * len(part) for part in mask.split(list(sizes))) / len(mask)
    given = -torch.where(mask > 0, theta, 1 - theta).double().log2().mean()
    return float(entropy(mask.mean())), float(layered), float(given)


# Each maps theta [n] to a number from 0 to 1, which a strength lambda multiplies.
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.mean,
    "pooled entropy": lambda theta: entropy(theta.mean()),
    "mean entropy": lambda theta: entropy(theta).mean(),
}


def gradient(penalty: str, s: Tensor, pooled: float | None = None) -> Tensor:
    """n times the penalty's gradient in the scores s [n], in closed form; `pooled`, if given, replaces mean(theta)."""
    theta = torch.sigmoid(s)
    mean = theta.mean() if pooled is None else torch.tensor(pooled, dtype=s.dtype)
    factor = {"linear": torch.ones_like(s), "pooled entropy": slope(mean), "mean entropy": -s / LN2}[penalty]
    return factor * theta * (1 - theta)


def draw_mask(theta: Tensor, generator: torch.Generator) -> Tensor:
    """Independent entries 0 and 1, of theta's shape and type, with means theta (to 2^-24 in float32)."""
    return (torch.rand(theta.shape, generator=generator, dtype=theta.dtype) < theta).to(theta.dtype)


def estimation_errors(theta: Tensor, draws: int, rng: Rng) -> Tensor:
    """|| mean of K masks - mean of K thetas ||^2 / n for theta [K, n], in `draws` independent trials [draws]."""
    generator, mean = rng.torch(), theta.mean(0)
    return torch.stack([(draw_mask(theta, generator).mean(0) - mean).square().mean() for _ in range(draws)])


def adam_steps(gradients: Tensor, eps: float = 1e-8) -> Tensor:
    """Adam's steps in units of the learning rate, for gradients [t, k] of k scores, from a fresh state [t, k].

    Kingma and Ba, ICLR 2015, arXiv:1412.6980, algorithm 1, with its default decays 0.9 and 0.999.
    """
    m, v, steps = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        steps.append(m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + eps))
    return torch.stack(steps)


@dataclass(frozen=True)
class Network:
    """Fully connected ReLU network without biases: frozen weights -c or +c, of which a mask keeps some."""

    w: Tensor  # [n]
    shapes: tuple[tuple[int, int], ...]  # outputs, inputs of each layer

    @staticmethod
    def draw(widths: Sequence[int], scale: float, rng: Rng) -> Network:
        """c = scale / sqrt(inputs of the layer), signs of a fair coin."""
        shapes, seed = tuple((outputs, inputs) for inputs, outputs in pairwise(widths)), rng.seed()
        parts = [torch.from_numpy(signs(seed, i, a * b)) * (scale / sqrt(b)) for i, (a, b) in enumerate(shapes)]
        return Network(torch.cat(parts), shapes)

    @property
    def sizes(self) -> list[int]:
        return [outputs * inputs for outputs, inputs in self.shapes]

    def layers(self, mask: Tensor, x: Tensor) -> list[Tensor]:
        """Pre-activations [images, outputs] of every layer for x [images, inputs]; the last are the logits."""
        outputs: list[Tensor] = []
        for part, shape in zip((mask * self.w).split(self.sizes), self.shapes, strict=True):
            outputs.append(functional.linear(outputs[-1].relu() if outputs else x, part.view(shape)))
        return outputs

    def data_gradient(self, mask: Tensor, s: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the mean cross-entropy in the scores [n], straight through: dm/dtheta counts as 1."""
        through = mask.clone().requires_grad_()
        loss = functional.cross_entropy(self.layers(through, x)[-1], y)
        theta = torch.sigmoid(s)
        return torch.autograd.grad(loss, through)[0] * theta * (1 - theta)


def train(
    network: Network,
    data: Dataset,
    rng: Rng,
    penalty: str = "linear",
    strength: float = 0.0,
    rounds: int = 20,
    fresh: bool = True,
    scores: Tensor | None = None,
) -> tuple[pd.DataFrame, Tensor]:
    """Train scores, standard normal or as given, on loss + strength * penalty: 15 Adam steps a round, lr 0.1, batch 64.

    Every step draws a mask. `fresh` starts Adam anew each round. Returns the scores [n], and a row a round: accuracy (%
    of test images, mean of 5 masks), bits per parameter of the first (pooled), density mean(theta), mean entropy of
    theta, expected kept weights of each layer.
    """
    generator = rng.torch()
    s = torch.randn(len(network.w), generator=generator) if scores is None else scores.clone()
    x, test = data.train_x.flatten(1), data.test_x.flatten(1)
    optimizer, rows = torch.optim.Adam([s], lr=0.1), []
    for number in range(1, rounds + 1):
        if fresh:
            optimizer = torch.optim.Adam([s], lr=0.1)
        for _ in range(15):
            batch = torch.randint(len(x), (64,), generator=generator)
            mask = draw_mask(torch.sigmoid(s), generator)
            s.grad = network.data_gradient(mask, s, x[batch], data.train_y[batch])
            s.grad += strength / len(s) * gradient(penalty, s)
            optimizer.step()
        theta = torch.sigmoid(s).double()
        masks = [draw_mask(theta.float(), generator) for _ in range(5)]
        right = [(network.layers(mask, test)[-1].argmax(1) == data.test_y).double().mean() for mask in masks]
        row = {"round": number, "accuracy": 100 * float(sum(right)) / 5}
        row |= {"bits": entropy(masks[0].double().mean()).item(), "density": theta.mean().item()}
        row |= {"mean entropy": entropy(theta).mean().item()}
        rows.append(row | {f"layer {i}": part.sum().item() for i, part in enumerate(theta.split(network.sizes), 1)})
    return pd.DataFrame(rows), s
