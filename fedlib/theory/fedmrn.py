"""Federated learning on quadratics: an optimum that is known exactly, to hold the theory of FedMRN against.

Client k has the loss F_k(w) = (w - b_k)' A_k (w - b_k) / 2, and all clients weigh the same. The masked update is the
one that runs everywhere else (`fedlib.methods.fedmrn.masked_update`), broadcast over repetitions and clients, in
float64. Noise never travels here, so it comes from one torch generator: a seed hashed for each client and round would
take most of the time. Shapes: R repetitions, N clients, d dimensions.

    u, noise, PSM, upload                    -> `sent`
    rounds of E local steps                  -> `walk`
    Theorem A: ||w_t - w*||^2                -> `errors`, `curves`
    Theorem B: mean of ||grad F||^2          -> `squared_gradient`
    Theorem C: where it settles              -> `settled`, `moments`
    variance of a mask, g(u) = E min(|u|,|n|) -> `mask_variance`, `transmitted`
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log10, pi, sqrt

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedlib.errors import require_name, require_number
from fedlib.methods.fedmrn import FLOOR, FedMRN
from fedlib.rng import Rng

STEEPEST = 3 * sqrt(3) / 8  # largest slope of the well z^2 / (1 + z^2), at z = sqrt(1/3); its curvature is at most 2


@dataclass(frozen=True)
class Problem:
    """The clients' losses: (w - b_k)' A_k (w - b_k) / 2 + depth * sum_i z_i^2 / (1 + z_i^2) with z = w - b_k."""

    curvature: Tensor  # A_k [R, N, d, d], symmetric
    wish: Tensor  # b_k [R, N, d], what client k alone would like best
    mu: float = 1.0  # bounds on the eigenvalues of A_k
    smoothness: float = 10.0
    depth: float = 0.0  # of the wells, which make the loss non-convex
    deviation: float = 1.0  # of the gradient noise, normal, each entry

    @staticmethod
    def draw(
        rng: Rng, repetitions: int = 6, clients: int = 20, d: int = 20, mu: float = 1.0, smoothness: float = 10.0
    ) -> Problem:
        """Eigenvalues uniform on [mu, smoothness] in a random basis, wishes standard normal; all repetitions differ."""
        generator, shape = rng.child("problem").torch(), (repetitions, clients, d)
        basis = torch.linalg.qr(torch.randn(*shape, d, generator=generator, dtype=torch.float64))[0]
        eigenvalues = mu + (smoothness - mu) * torch.rand(shape, generator=generator, dtype=torch.float64)
        wish = torch.randn(shape, generator=generator, dtype=torch.float64)
        return Problem(basis * eigenvalues.unsqueeze(-2) @ basis.mT, wish, mu, smoothness)

    @staticmethod
    def wells(rng: Rng, repetitions: int = 6, clients: int = 20, d: int = 20, deviation: float = 0.1) -> Problem:
        """No quadratic part, wells of depth 1: non-convex, 2-smooth, gradients bounded by STEEPEST an entry."""
        wish = Problem.draw(rng, repetitions, clients, d).wish
        return Problem(wish.new_zeros(*wish.shape, d), wish, mu=0.0, smoothness=0.0, depth=1.0, deviation=deviation)

    def gradients(self, w: Tensor) -> Tensor:
        """Every client's gradient [R, N, d] at its own point, w [R, N, d], or at a common one, w [R, 1, d]."""
        z = w - self.wish
        # For matrices this small, faster than a batched product.
        quadratic = (self.curvature * z.unsqueeze(-2)).sum(-1) if self.smoothness else torch.zeros_like(z)
        return quadratic + 2 * self.depth * z / (1 + z * z).square() if self.depth else quadratic

    def loss(self, w: Tensor) -> Tensor:
        """F [R] at w [R, 1, d]."""
        z = w - self.wish
        quadratic = (z.unsqueeze(-2) @ self.curvature @ z.unsqueeze(-1))[..., 0, 0] / 2
        return (quadratic + self.depth * (z * z / (1 + z * z)).sum(-1)).mean(-1)

    def optimum(self) -> Tensor:
        """w* [R, 1, d] of the quadratic part: sum_k A_k w* = sum_k A_k b_k."""
        pull = (self.curvature @ self.wish.unsqueeze(-1)).sum(1)
        return torch.linalg.solve(self.curvature.sum(1), pull).mT


@dataclass(frozen=True)
class Setting:
    """How the clients train and what they send."""

    mask: str = "none"  # "none" is plain averaging; "binary" or "signed"
    law: str = "bernoulli"  # noise -alpha or +alpha; "uniform" on [-alpha, alpha)
    magnitude: float = 0.1  # alpha; where `scaled`, in units of the step size at the round's start
    scaled: bool = False
    doubled: bool = False  # masked updates times two, which repairs the mean of binary masks for a fixed u
    feedback: bool = False  # a client keeps u minus what it sent, and starts its next u from it
    cohort: int | None = None  # K clients a round, without replacement; None for all
    local_steps: int = 5  # E
    rate: float | None = None  # constant step size; None for Theorem A's

    def __post_init__(self) -> None:
        require_name("mask", self.mask, ("none", "binary", "signed"))
        require_name("law", self.law, ("bernoulli", "uniform"))
        require_number("magnitude", self.magnitude, 1e-6, 1e6)

    def step_size(self, t: int, problem: Problem) -> float:
        """2 / (mu (gamma + t)) with gamma = max(8 L / mu, E), unless a constant one is set."""
        if self.rate is not None:
            return self.rate
        return 2 / (problem.mu * (max(8 * problem.smoothness / problem.mu, self.local_steps) + t))


def noise(law: str, alpha: float, shape: torch.Size, generator: torch.Generator) -> Tensor:
    n = torch.rand(shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
    n = alpha * (torch.where(n < 0, -1.0, 1.0) if law == "bernoulli" else n)
    floor = float(FLOOR)
    return torch.where(n.abs() < floor, floor, n)


def sent(u: Tensor, n: Tensor, progress: float, chance: Tensor, setting: Setting) -> Tensor:
    """What stands in for u [R, N, d]: masked noise in a share `progress` of the entries. At 1 it is the upload."""
    if setting.mask == "none":
        return u
    update = FedMRN(mask=setting.mask).masked_update(u, n, progress, chance)
    return 2 * update if setting.doubled else update


def weights(cohort: int | None, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Each client's weight in the average [R, N, 1]: 1/K in the cohort, 0 outside it."""
    if cohort is None:
        return torch.full((*shape[:2], 1), 1 / shape[1], dtype=torch.float64)
    order = torch.rand(shape[:2], generator=generator).argsort(1)
    return ((order < cohort).double() / cohort).unsqueeze(-1)


def walk(problem: Problem, setting: Setting, rng: Rng, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For t = 0, 1, ...: the server's model w [R, 1, d] at the round's start and every client's u [R, N, d] at step t.

    Clients outside the cohort train too, and nobody hears of it: this is what the proofs imagine.
    """
    generator, shape = rng.child("walk").torch(), problem.wish.shape
    residual, steps = torch.zeros_like(problem.wish), setting.local_steps
    for start in itertools.count(0, steps):
        alpha = setting.magnitude * (setting.step_size(start, problem) if setting.scaled else 1.0)
        n = noise(setting.law, alpha, shape, generator)
        chance = torch.rand(steps + 1, *shape, generator=generator)
        disturbance = torch.randn(steps, *shape, generator=generator) * problem.deviation
        u = residual
        for step in range(steps):
            yield w, u
            gradient = problem.gradients(w + sent(u, n, (step + 1) / steps, chance[step], setting)) + disturbance[step]
            u = u - setting.step_size(start + step, problem) * gradient
        update, share = sent(u, n, 1.0, chance[steps], setting), weights(setting.cohort, shape, generator)
        w = w + (share * update).sum(1, keepdim=True)
        if setting.feedback:
            residual = torch.where(share > 0, u - update, residual)


def errors(problem: Problem, setting: Setting, rng: Rng, steps: int) -> pd.DataFrame:
    """||w_t - w*||^2 from w_0 = 0, by repetition, at the ends of rounds: six a decade, counted back from `steps`."""
    require_number("steps", steps, setting.local_steps, 10**7)
    last, optimum = steps // setting.local_steps, problem.optimum()
    shares = 10.0 ** (-np.arange(int(6 * log10(last)) + 1) / 6)
    wanted = set(((last * shares).round().astype(int) * setting.local_steps).tolist())
    rows = []
    for t, (w, _) in enumerate(itertools.islice(walk(problem, setting, rng, 0 * optimum), max(wanted) + 1)):
        if t in wanted:
            squares = (w - optimum).square().sum((1, 2)).tolist()
            rows += [{"t": t, "repetition": r, "error": square} for r, square in enumerate(squares)]
    return pd.DataFrame(rows)


def curves(problem: Problem, settings: Mapping[str, Setting], rng: Rng, steps: int) -> pd.DataFrame:
    """`errors` of several settings, named in the column `variant`; they see the same problems."""
    found = [errors(problem, setting, rng, steps).assign(variant=name) for name, setting in settings.items()]
    return pd.concat(found, ignore_index=True)


def squared_gradient(problem: Problem, setting: Setting, rng: Rng, steps: int, w: Tensor) -> Tensor:
    """Mean over t < steps of ||grad F||^2 at the mean of the clients' unmasked iterates [R], begun at w [R, 1, d]."""
    total = torch.zeros(len(w), dtype=torch.float64)
    for server, u in itertools.islice(walk(problem, setting, rng, w), steps):
        total += problem.gradients(server + u.mean(1, keepdim=True)).mean(1).square().sum(-1)
    return total / steps


def settled(problem: Problem, setting: Setting, rng: Rng, steps: int) -> float:
    """Mean of ||w_t - w*||^2 over repetitions and the last half of `steps`, begun at w*."""
    optimum = problem.optimum()
    path = itertools.islice(walk(problem, setting, rng, optimum), steps // 2, steps)
    return float(torch.stack([(w - optimum).square().sum((1, 2)).mean() for w, _ in path]).mean())


def moments(problem: Problem, rng: Rng, draws: int = 200) -> tuple[float, float, float]:
    """Means over repetitions, clients and gradient noise at w*: of ||g||_1, ||g||^2 and sum g_i^4."""
    exact = problem.gradients(problem.optimum())
    noise = torch.randn(draws, *exact.shape, generator=rng.child("moments").torch()) * problem.deviation
    g = exact + noise
    return tuple(float(part.sum(-1).mean()) for part in (g.abs(), g.square(), g**4))  # type: ignore[return-value]


def mask_variance(u: Tensor, n: Tensor, progress: float, mask: str) -> Tensor:
    """Variance of each entry of a masked update, given u and n."""
    c = FedMRN(mask=mask).clipped(u, n) * n
    return progress * (c.abs() * (n.abs() - c.abs()) if mask == "binary" else n * n - c * c)


def transmitted(u: Tensor, alpha: float, law: str) -> Tensor:
    """g(u) = E min(|u|, |n|): what signed masks transmit of u on average, for noise of each law in `LAWS`."""
    size = u.abs()
    if law == "bernoulli":
        return size.clamp(max=alpha)
    if law == "uniform":
        return torch.where(size < alpha, size - size**2 / (2 * alpha), alpha / 2)
    tail = 1 - torch.erf(size / (alpha * sqrt(2)))
    return alpha * sqrt(2 / pi) * (1 - torch.exp(-(size**2) / (2 * alpha**2))) + size * tail
