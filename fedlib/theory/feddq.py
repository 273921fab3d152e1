"""How fine to round an update: what rounding costs, what its error does to training, how to split a budget of bits.

The numbers behind the chapter "How many bits, and when"; its statements are this project's own derivations. The setting
is that of Qu, Song, Tsui, "FedDQ", GLOBECOM 2022, arXiv:2110.02291: clients send updates, each rounded to s intervals
over its range R. The quantizer and the rule are the library's (`fedlib.methods.feddq`).
All clients hold the same loss, here a `fedlib.theory.fedmrn.Problem` of one client; nothing is sent as bytes.

    E ||rounded x - x||^2, exact, and its bound      -> `variance`, `variance_bound`
    QSGD's bound for the norm quantizer              -> `norm_bound`
    terms of the convergence theorem                 -> `theorem`
    resolution at which rounding equals sampling     -> `guide`
    widths of a budget: constant step, ascending     -> `constant_step`, `ascending`
    level for the rest of a budget, floor of R       -> `level`, `floor`
    federated averaging of rounded updates           -> `Setting`, `train`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from statistics import fmean as mean

import pandas as pd
import torch
from torch import Tensor

from fedlib.methods.feddq import quantizers
from fedlib.methods.feddq.schedules import Rule
from fedlib.rng import Rng
from fedlib.theory.fedmrn import Problem


def rounded(x: Tensor, intervals: int, rng: Rng | None) -> Tensor:
    """x [n] as the receiver sees it, rounded to so many intervals of its range; rng None rounds to the nearest."""
    low, span = quantizers.extent(x)
    return quantizers.restore(quantizers.affine(x, low, span, intervals, rng), x.numel(), "affine_stochastic")


def variance(x: Tensor, intervals: int) -> float:
    """E ||rounded x - x||^2 of stochastic rounding: step^2 sum f (1 - f), f the entries' places between two levels."""
    low, span = quantizers.extent(x)
    step = span / intervals
    f = ((x.double() - low) / step).frac() if step else torch.zeros(1)
    return float(step**2 * (f * (1 - f)).sum())


def variance_bound(d: int, span: float, intervals: int) -> float:
    """d R^2 / (4 s^2)."""
    return d * (span / intervals) ** 2 / 4


def norm_bound(d: int, intervals: int) -> float:
    """min(d / s^2, sqrt(d) / s): what E ||Q(x) - x||^2 / ||x||^2 of QSGD's quantizer cannot exceed (its Lemma 3.1)."""
    return min(d / intervals**2, sqrt(d) / intervals)


@dataclass(frozen=True)
class Setting:
    """Federated averaging of equal clients with a constant learning rate; `rule` None sends float32."""

    rule: Rule | None = None
    clients: int = 10
    local_steps: int = 20
    rounds: int = 60
    rate: float = 0.02


def theorem(setting: Setting, smoothness: float, sigma2: float, gap: float, errors: float) -> tuple[float, ...]:
    """The theorem's four terms: start, sampling, drift, rounding.

    sigma2: variance of a stochastic gradient; gap: f(w_0) - f*; errors: sum of J over all rounds and clients.
    """
    eta, n, tau, rounds, L = setting.rate, setting.clients, setting.local_steps, setting.rounds, smoothness
    start, sampling = 2 * gap / (eta * rounds * tau), eta * L * sigma2 / n
    return start, sampling, (eta * L) ** 2 * sigma2 * (tau - 1), L * errors / (eta * rounds * tau * n**2)


def guide(rate: float, deviation: float, local_steps: int) -> float:
    """The resolution at which FedDQ's rounding term equals the sampling term; deviation: of the noise of an entry."""
    return 1.5 * rate * deviation * sqrt(local_steps)


def floor(rate: float, deviation: float, local_steps: int, d: int) -> float:
    """What the mean range of an update of d entries cannot exceed when it is noise alone."""
    return 2 * rate * deviation * sqrt(2 * local_steps * log(d))


def level(span: float, budget: float, gap: float, smoothness: float, clients: int) -> float:
    """Intervals s that minimise the theorem's bound when all bits left, `budget` in total, are spent at one level.

    The root of s^3 / (s + 1) = L R^2 B ln 2 / (4 n^2 F), by bisection of log2 s.
    """
    target = smoothness * span**2 * budget * log(2) / (4 * clients**2 * gap)
    return _bisect(lambda s: s**3 / (s + 1), target)


def constant_step(ranges: Sequence[float], bits: float) -> list[int]:
    """FedDQ's widths, from 1 bit on, at the finest resolution whose mean width is at most `bits`."""

    def widths(resolution: float) -> list[int]:
        rule = Rule(resolution=resolution, least=1)
        return [rule.width_for(span) for span in ranges]

    fineness = _bisect(lambda fine: mean(widths(1 / fine)), bits)
    return widths(1 / fineness)


def ascending(losses: Sequence[float], bits: float) -> list[int]:
    """Widths of c sqrt(f_0 / f) intervals, as in AdaQuantFL, for the largest c whose mean width is at most `bits`."""

    def widths(c: float) -> list[int]:
        return [max(1, ceil(c * sqrt(losses[0] / loss))).bit_length() for loss in losses]

    return widths(_bisect(lambda c: mean(widths(c)), bits))


def _bisect(rising: Callable[[float], float], target: float) -> float:
    """The largest x in [2^-39, 2^39] at which a function that rises with x does not exceed the target."""
    low, high = -39.0, 39.0
    if rising(2**low) > target:
        raise ValueError(f"a target of {target} is out of reach: the least value is {rising(2**low)}")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(2**middle) <= target else (low, middle)
    return 2**low


def train(problem: Problem, setting: Setting, rng: Rng, widths: Sequence[int] | None = None) -> pd.DataFrame:
    """One row a round and repetition: what was sent, and the left side of the theorem. It starts at w = 0.

    before, after: loss at the round's start and end; gradient: mean over its steps of ||grad f(u)||^2 at the mean u of
    the clients' models; range, bits: means over clients of R and of the width; error: sum over clients of
    d R^2 / (4 s^2). `widths`, one a round, replaces `setting.rule`.
    """
    generator, rule = rng.child("noise").torch(), setting.rule
    repetitions, _, d = problem.wish.shape
    w, rows = torch.zeros(repetitions, 1, d, dtype=torch.float64), []
    following, first_loss = [rule.first if rule else 0] * repetitions, problem.loss(w).tolist()
    for number in range(setting.rounds):
        rule = Rule(schedule="fixed", width=widths[number]) if widths else rule
        before, local = problem.loss(w).tolist(), w.expand(-1, setting.clients, -1)
        squares = torch.zeros(repetitions, dtype=torch.float64)
        noise = torch.randn(setting.local_steps, *local.shape, generator=generator, dtype=torch.float64)
        for disturbance in noise * problem.deviation:
            gradients = problem.gradients(torch.cat([local, local.mean(1, keepdim=True)], 1))  # the last ones at u
            squares += gradients[:, -1].square().sum(-1) / setting.local_steps
            local = local - setting.rate * (gradients[:, :-1] + disturbance)
        updates = (local - w).float()
        sent: list[tuple[float, float, float]] = []
        for r, update in enumerate(updates):
            spans = [quantizers.extent(x)[1] for x in update]
            if rule is None:
                sent.append((mean(spans), 32.0, 0.0))
                continue
            levels = [max(1, rule.intervals_for(span, following[r])) for span in spans]
            for i, s in enumerate(levels):
                update[i] = rounded(update[i], s, rng.child("rounding", number, r, i))
            error = sum((variance_bound(d, span, s) for span, s in zip(spans, levels, strict=True)), 0.0)
            sent.append((mean(spans), mean([s.bit_length() for s in levels]), error))
            if rule.schedule == "ascending":
                following[r] = rule.next_intervals(before[r], first_loss[r])
        w = w + updates.double().mean(1, keepdim=True)
        columns = zip(range(repetitions), before, problem.loss(w).tolist(), squares.tolist(), sent, strict=True)
        rows += [(number + 1, *values, *about) for *values, about in columns]
    return pd.DataFrame(rows, columns=["round", "repetition", "before", "after", "gradient", "range", "bits", "error"])
