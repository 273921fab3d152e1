"""Intervals and verdicts against hand-worked numbers, and how often the rules err on values whose truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedlib.claims import simulation
from fedlib.claims.verdicts import CONTRADICTED, SUPPORTED, UNDECIDED, Band, Evidence, judge, mean_interval

AT_LEAST_0 = Band(0, math.inf)
# Student's t at 97.5 % with two degrees of freedom is 4.302653: of 1, 2, 3 the half width is 4.302653 / sqrt(3).
HALF = 4.302653 / math.sqrt(3)


def around(mean: float, spread: float = 1.0) -> list[float]:
    """Three values with this mean, and an interval of spread times HALF to either side."""
    return [mean - spread, mean, mean + spread]


def verdict(quantifier: str, cases: dict[str, list[float]], band: Band = AT_LEAST_0) -> str:
    return judge(quantifier, [Evidence(pd.DataFrame(cases), band)]).verdict


def test_an_interval_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - HALF, abs=1e-6) and found.high == pytest.approx(2 + HALF, abs=1e-6)
    assert mean_interval([5.0] * 4) == type(found)(5.0, 5.0, 5.0, 4), "equal values have no spread"
    assert mean_interval([5.0]).low == -math.inf, "one value says nothing of the spread"


def test_an_interval_as_scipy_has_it() -> None:
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.99, 6, values.mean(), stats.sem(values))
    found = mean_interval(values.tolist(), 0.99)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    "mean, expected",
    [(3.0, SUPPORTED), (HALF + 0.01, SUPPORTED), (1.0, UNDECIDED), (-1.0, UNDECIDED), (-HALF - 0.01, CONTRADICTED)],
)
@pytest.mark.parametrize("quantifier", ["all", "some", "mean", "up to"])
def test_with_one_case_all_quantifiers_agree(quantifier: str, mean: float, expected: str) -> None:
    assert verdict(quantifier, {"a": around(mean)}) == expected


def test_rounding_never_decides() -> None:
    tie = {"a": [-3.7e-15] * 3}
    assert [verdict(quantifier, tie) for quantifier in ("all", "some", "mean", "up to")] == [SUPPORTED] * 4
    assert verdict("mean", {"a": [-1e-3] * 3}) == CONTRADICTED


def test_without_a_seed_in_common_nothing_is_decided() -> None:
    apart = {"a": [5.0, 5.0, math.nan, math.nan], "b": [math.nan, math.nan, 5.0, 5.0]}
    assert verdict("mean", apart) == UNDECIDED


@pytest.mark.parametrize(
    "cases, each, least_one, mean",
    [
        # One of two far below: the mean is fine, `all` is not.
        ({"a": around(9, 0.1), "b": around(-5, 0.1)}, CONTRADICTED, SUPPORTED, SUPPORTED),
        # One of two below at 95 %, but not at the raised level of 97.5 %: half widths 2.48 and 3.58.
        ({"a": around(9, 0.1), "b": around(-3)}, UNDECIDED, SUPPORTED, SUPPORTED),
        # One of two slightly below, within its spread.
        ({"a": around(9, 0.1), "b": around(-0.1)}, SUPPORTED, SUPPORTED, SUPPORTED),
        ({"a": around(-9, 0.1), "b": around(-5, 0.1)}, CONTRADICTED, CONTRADICTED, CONTRADICTED),
        ({"a": around(-9, 0.1), "b": around(0)}, CONTRADICTED, UNDECIDED, CONTRADICTED),
        # Spread that goes the other way in the other case: the mean over cases, seed by seed, has none.
        ({"a": [0.0, 1.0, 2.0], "b": [2.0, 1.0, 0.0]}, SUPPORTED, UNDECIDED, SUPPORTED),
    ],
)
def test_quantifiers_differ_where_cases_do(cases: dict[str, list[float]], each: str, least_one: str, mean: str) -> None:
    assert (verdict("all", cases), verdict("some", cases), verdict("mean", cases)) == (each, least_one, mean)
    assert verdict("up to", cases) == least_one


def test_a_saving_and_its_accuracy_must_come_in_the_same_case() -> None:
    """Two policies: one saves much and loses much, the other neither."""
    saving = pd.DataFrame({"bold": around(50, 0.1), "shy": around(5, 0.1)})
    accuracy = pd.DataFrame({"bold": around(-10, 0.1), "shy": around(0, 0.1)})
    both = [Evidence(saving, Band(40, math.inf)), Evidence(accuracy, Band(-2, math.inf))]
    assert judge("up to", both[:1]).verdict == SUPPORTED and judge("up to", both).verdict == CONTRADICTED
    both[1] = Evidence(accuracy.assign(bold=around(-1, 0.1)), Band(-2, math.inf))
    found = judge("up to", both)
    assert found.verdict == SUPPORTED
    assert [effect.mean for effect in found.effects] == [50.0, -1.0], "what it rests on is the bold policy"


def test_many_cases_do_not_raise_the_errors() -> None:
    """With 38 cases, a method one point better in each is hardly ever contradicted; the interval covers the truth."""
    rng = np.random.default_rng(1)
    values = pd.DataFrame(rng.normal(0, 2.3, (3, 38)))
    rates = {effect: simulation.rate_of_verdicts(values, "all", AT_LEAST_0, effect, 400, rng) for effect in (0, 1, 3)}
    assert rates[1][CONTRADICTED] <= 5 and rates[0][CONTRADICTED] <= 8
    assert rates[0][SUPPORTED] <= 5 < 90 < rates[3][SUPPORTED]
    assert 91 <= simulation.coverage(values, 1000, rng) <= 99


def test_a_simulation_keeps_the_spread_of_seeds_and_cases() -> None:
    rng = np.random.default_rng(2)
    values = pd.DataFrame(rng.normal(size=(4, 1)) * 3 + rng.normal(size=(4, 5)))
    made = np.array([simulation.simulate(values, 7.0, rng).to_numpy() for _ in range(4000)])
    assert made.mean() == pytest.approx(7, abs=0.1)
    assert made.mean(axis=2).var() == pytest.approx(values.mean(axis=1).var(ddof=1), rel=0.2)
