"""Rounding, the theorem's terms, budgets of bits, a small training, against numbers worked by hand and brute force."""

import itertools
from dataclasses import replace
from math import log, log2, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlib.methods.feddq import quantizers
from fedlib.methods.feddq.schedules import Rule
from fedlib.rng import Rng
from fedlib.theory import feddq as theory
from fedlib.theory.feddq import Setting
from fedlib.theory.fedmrn import Problem

PLACE = Rng(3)
vectors = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=40).map(torch.tensor)
spread = st.lists(st.floats(1, 16), min_size=3, max_size=3)


def quadratic(repetitions: int = 2, d: int = 6, deviation: float = 0.1) -> Problem:
    return replace(Problem.draw(PLACE, repetitions, 1, d, 0.1, 1.0), deviation=deviation)


def test_variance_by_hand() -> None:
    # Step 1, places 0, 1/4, 1/2, 0: 3/16 + 1/4. With step 3/2, places 0, 1/6, 1, 0: 9/4 * 5/36.
    assert theory.variance(torch.tensor([0, 0.25, 1.5, 3]), 3) == pytest.approx(3 / 16 + 1 / 4)
    assert theory.variance(torch.tensor([0, 0.25, 1.5, 3]), 2) == pytest.approx(5 / 16)
    assert theory.variance(torch.full((5,), 0.1), 3) == 0
    assert theory.rounded(torch.full((5,), 0.1), 3, PLACE).tolist() == pytest.approx([0.1] * 5)


def test_stochastic_rounding_has_this_mean_and_this_variance() -> None:
    x, count = torch.randn(30, generator=PLACE.child("x").torch()), 4000
    draws = torch.stack([theory.rounded(x, 7, PLACE.child("draw", i)) for i in range(count)]).double()
    _, span = quantizers.extent(x)
    assert ((draws.mean(0) - x).abs() < 5 * span / 7 / 2 / sqrt(count)).all()
    squares = (draws - x).square().sum(1)
    assert abs(squares.mean().item() - theory.variance(x, 7)) < 5 * squares.std().item() / sqrt(count)


@given(vectors, st.integers(1, 300))
def test_variance_keeps_its_bound_and_nearest_rounding_is_not_worse(x: torch.Tensor, intervals: int) -> None:
    _, span = quantizers.extent(x)
    exact, nearest = theory.variance(x, intervals), theory.rounded(x, intervals, None).double()
    slack = 1e-6  # float32 of entries up to 1
    assert exact <= theory.variance_bound(len(x), span, intervals) * (1 + 1e-9)
    assert float((nearest - x.double()).norm()) <= sqrt(exact) + slack * sqrt(len(x))


def test_bounds_by_hand() -> None:
    assert theory.variance_bound(7, 3.0, 3) == 7 / 4
    assert (theory.norm_bound(16, 2), theory.norm_bound(4, 4)) == (2, 0.25)


def test_theorem_by_hand() -> None:
    # 2*3/(0.1*5*3); 0.1*2*4/2; 0.01*4*4*2; 2*6/(0.1*5*3*4).
    setting = Setting(clients=2, local_steps=3, rounds=5, rate=0.1)
    assert theory.theorem(setting, 2.0, 4.0, 3.0, 6.0) == pytest.approx((4, 0.4, 0.32, 2))


@given(st.floats(0.001, 1), st.floats(0.01, 10), st.integers(1, 1000), st.integers(1, 10**6))
def test_at_the_guide_rounding_equals_sampling(rate: float, deviation: float, steps: int, d: int) -> None:
    setting = Setting(clients=4, local_steps=steps, rounds=7, rate=rate)
    errors = 7 * 4 * 4 / 9 * d * theory.guide(rate, deviation, steps) ** 2
    _, sampling, _, rounding = theory.theorem(setting, 3.0, d * deviation**2, 1.0, errors)
    assert rounding == pytest.approx(sampling)


def test_floor_bounds_the_mean_range_of_noise() -> None:
    noise = 0.1 * 0.5 * torch.randn(2000, 9, 50, generator=PLACE.child("noise").torch()).sum(1)
    mean = (noise.amax(1) - noise.amin(1)).mean().item()
    assert 0.75 < mean / theory.floor(0.1, 0.5, 9, 50) < 1


def test_level_by_hand() -> None:
    # s^3 / (s + 1) is 1/2 at s = 1 and 27/4 at s = 3.
    assert theory.level(1.0, 2 / log(2), 1.0, 1.0, 1) == pytest.approx(1)
    assert theory.level(1.0, 2 / log(2), 2 / 27, 1.0, 1) == pytest.approx(3)


@given(st.floats(0.1, 10), st.floats(1e3, 1e6), st.floats(0.01, 10))
def test_level_minimises_the_bound(span: float, budget: float, gap: float) -> None:
    d, n, tau, rate, smoothness = 20, 5, 4, 0.1, 2.0

    def bound(s: float) -> float:
        rounds = budget / (n * d * log2(s + 1))
        return 2 * gap / (rate * rounds * tau) + smoothness * d * span**2 / (4 * s**2) / (rate * tau * n)

    s = theory.level(span, budget, gap, smoothness, n)
    assert bound(s) <= min(bound(s * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_widths_by_hand() -> None:
    assert theory.constant_step([8, 4, 2, 1], 2.5) == [4, 3, 2, 1]
    assert theory.ascending([16, 4, 1], 2) == [1, 2, 3]  # 1, 2, 4 intervals
    with pytest.raises(ValueError, match="out of reach"):
        theory.constant_step([8, 4], 0.5)


@given(spread)
def test_constant_step_is_near_the_best_of_all_splits(ranges: list[float]) -> None:
    # From 3 bits on, rounding widths up costs at most 1.27 (mean over geometric mean of four-fold steps) * (8/7)^2.
    def error(widths: tuple[int, ...]) -> float:
        return sum(theory.variance_bound(1, r, 2**b - 1) for r, b in zip(ranges, widths, strict=True))

    found = tuple(theory.constant_step(ranges, 7))
    splits = [w for w in itertools.product(range(1, 16), repeat=3) if sum(w) == sum(found)]
    assert 3 <= min(found) <= sum(found) / 3 <= 7
    assert error(found) <= 1.66 * min(map(error, splits))


def test_training_in_float32_is_gradient_descent() -> None:
    # f = (w - 1)^2 from w = 0, one step of 0.1: gradient -2, w = 0.2, f = 0.64; then gradient -1.6, w = 0.36.
    problem = Problem(torch.full((1, 1, 1, 1), 2.0).double(), torch.ones(1, 1, 1).double(), deviation=0.0)
    found = theory.train(problem, Setting(None, clients=3, local_steps=1, rounds=2, rate=0.1), PLACE)
    assert found["after"].tolist() == pytest.approx([0.64, 0.4096])
    assert found["before"].tolist() == pytest.approx([1, 0.64])
    assert found["gradient"].tolist() == pytest.approx([4, 2.56])
    assert found[["range", "bits", "error"]].values.tolist() == [[0, 32, 0]] * 2


def test_training_obeys_the_rule_and_the_schedules() -> None:
    problem, short = quadratic(), Setting(rounds=8, clients=1)
    ruled = theory.train(problem, replace(short, rule=Rule(resolution=0.01)), PLACE)
    assert ruled["bits"].tolist() == [Rule(resolution=0.01).width_for(span) for span in ruled["range"]]
    rising = theory.train(problem, replace(short, rule=Rule(schedule="ascending")), PLACE)
    one = rising[rising["repetition"] == 1].reset_index()
    following = [Rule(schedule="ascending").next_intervals(f, one["before"][0]) for f in one["before"]]
    assert one["bits"].tolist() == [s.bit_length() for s in [2, *following[:-1]]]
    given_widths = theory.train(problem, short, PLACE, [1, 2, 3, 4, 5, 6, 7, 8])
    assert given_widths["bits"].tolist() == np.repeat(range(1, 9), 2).tolist()
    last = given_widths.iloc[-1]
    assert last["error"] == pytest.approx(6 * last["range"] ** 2 / (4 * 255**2))


def test_sixteen_bits_are_almost_float32_and_runs_repeat() -> None:
    problem, fine = quadratic(), Setting(Rule(schedule="fixed", width=16), rounds=5)
    plain, rounded = theory.train(problem, replace(fine, rule=None), PLACE), theory.train(problem, fine, PLACE)
    np.testing.assert_allclose(rounded["after"], plain["after"], rtol=1e-4)
    assert rounded.equals(theory.train(problem, fine, PLACE))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_left_side_keeps_the_bound_from_the_optimum(width: int) -> None:
    # Nothing but noise and rounding: 6 entries of deviation 0.1, f(w_0) = f* = 0.
    drawn, setting = quadratic(4), Setting(Rule(schedule="fixed", width=width), rounds=10)
    found = theory.train(replace(drawn, wish=0 * drawn.wish), setting, PLACE)
    bound = sum(theory.theorem(setting, 1.0, 6 * 0.1**2, 0.0, found.groupby("round")["error"].mean().sum()))
    assert bound / 20 < found["gradient"].mean() < bound
