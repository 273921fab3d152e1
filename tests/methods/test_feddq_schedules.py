"""FedDQ's rule for the width, the schedules around it, and the settings: no training.

Numbers are the properties of its specification (section 7.3). The oracles are exact fractions
and numbers worked by hand.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlib.errors import SpecError
from fedlib.methods.feddq import quantizers
from fedlib.methods.feddq.schedules import Rule
from fedlib.rng import Rng
from fedlib.wire import levels

widths = st.integers(1, 16)
arrays = hnp.arrays(np.float32, st.integers(2, 30), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))

# 7.3: property 7, and the rest of 8; 3.3 and 7.2: the rule


def test_07_equals_the_released_scripts_and_exact_arithmetic() -> None:
    ratios = 2 ** np.random.default_rng(0).uniform(1, 16, 1000)
    found = []
    for ratio, rho in zip(ratios.tolist(), np.resize([0.005, 0.001, 0.01], 1000).tolist(), strict=True):
        span = ratio * rho
        found.append(Rule(resolution=rho).width_for(span))
        assert found[-1] == int(np.ceil(np.log2(span / rho)))
        assert Fraction(rho) * 2 ** (found[-1] - 1) < Fraction(span) <= Fraction(rho) * 2 ** found[-1]
    assert set(found) == set(range(2, 17))


@given(st.floats(1e-20, 1e20), st.floats(1e-20, 1e20), st.floats(1e-6, 1e3), widths, widths)
def test_07_monotone_clamped_and_one_bit_a_doubling(a: float, b: float, rho: float, one: int, other: int) -> None:
    least, most = sorted((one, other))
    rule, coarser = (Rule(resolution=r, least=least, most=most) for r in (rho, 2 * rho))
    low, high = (rule.width_for(span) for span in sorted((a, b)))
    assert least <= low <= high <= most
    if least < low < most:
        assert coarser.width_for(min(a, b)) == low - 1
    if least < high < most:
        assert rule.width_for(max(a, b) * 8) == min(most, high + 3)


@given(arrays, st.floats(0.001, 10))
def test_07_step_is_at_most_four_thirds_of_the_resolution(values: np.ndarray, rho: float) -> None:
    x, rule = torch.from_numpy(values), Rule(resolution=rho)
    span = quantizers.extent(x)[1]
    assume(1e-20 < span <= rho * 2**16)
    found, _ = rule.quantize(x, 0, Rng(0))
    assert found.second <= 4 / 3 * rho * (1 + 1e-6)
    if span > 2 * rho:
        assert found.second > rho / 2
    double, _ = rule.quantize(x * 2, 0, Rng(0))
    assert double.width == min(16, found.width + 1) or span <= 2 * rho, "8: the width follows log2 of the scale"


@pytest.mark.parametrize("power", [2, 4, 8, 16])
@pytest.mark.parametrize("rho", [0.005, 0.001, 0.3, 2.0**-9])
def test_07_exact_powers_of_two(power: int, rho: float) -> None:
    """ceil of an exact integer is that integer; the next number above needs one bit more (4: the float after it)."""
    rule = Rule(resolution=rho, least=1)
    assert rule.width_for(power * rho) == int(math.log2(power))
    assert rule.width_for(power * rho * (1 + 1e-12)) == int(math.log2(power)) + 1


@pytest.mark.parametrize(
    "span, rule, expected",
    [
        (0.0, Rule(), 0),
        (9e-31, Rule(resolution=1e-12), 0),
        (1.1e-30, Rule(), 2),
        (1e-9, Rule(), 2),
        (0.005, Rule(), 2),
        (0.005, Rule(least=1), 1),
        (0.02, Rule(least=5), 5),
        (0.0201, Rule(), 3),
        (327.68, Rule(), 16),
        (328.0, Rule(), 16),
        (1e30, Rule(), 16),
        (1e30, Rule(most=7), 7),
    ],
)
def test_rule_at_its_bounds(span: float, rule: Rule, expected: int) -> None:
    assert rule.width_for(span) == expected


@pytest.mark.parametrize("quantizer", quantizers.AFFINE)
@pytest.mark.parametrize("values", [[0.25] * 3, [-7.5], [0.0], [1e-31, 0.0], [2.0**127] * 2])
def test_a_constant_tensor_takes_no_bits_and_comes_back(quantizer: str, values: list[float]) -> None:
    """7.2: no range, one entry, or a range below 1e-30."""
    x = torch.tensor(values)
    for schedule in ("range", "fixed", "ascending", "loss"):
        found, _ = Rule(quantizer=quantizer, schedule=schedule).quantize(x, 5, Rng(0))
        assert (found.width, found.second, found.levels.size) == (0, 0, 0)
        assert quantizers.restore(found, len(x), quantizer).tolist() == pytest.approx(values, abs=1e-30)
        assert (levels.pack([found], False), len(levels.headers([found]))) == (b"", 9)


def test_an_empty_tensor_is_skipped() -> None:
    """7.2: 0 entries take no levels."""
    found, _ = Rule().quantize(torch.zeros(0), 0, Rng(0))
    assert found.levels.size == 0 and quantizers.restore(found, 0, "affine_stochastic").shape == (0,)


# Schedules


@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(1, 300), st.integers(9, 16))
def test_11_schedules_follow_the_loss(first: float, a: float, b: float, s: int, most: int) -> None:
    """ceil(s_0 sqrt(f_0 / f)), never less for a smaller loss; the mirror image never more, nor below 3."""
    ascending, loss = (Rule(schedule=name, first=s, most=most) for name in ("ascending", "loss"))
    high, low = first * max(a, b), first * min(a, b)
    found = [ascending.next_intervals(f, first) for f in (first, high, low)]
    assert found[0] == s and found == sorted(found) and found[2] <= 2**most - 1
    for f, n in zip((first, high, low), found, strict=True):
        exact = s * math.sqrt(first / f)
        assert n == 2**most - 1 <= exact or 0 <= n - exact < 1
    mirrored = [loss.next_intervals(f, first) for f in (first, high, low)]
    assert mirrored[0] == max(3, s) and mirrored == sorted(mirrored, reverse=True)
    for f, n in zip((first, high, low), mirrored, strict=True):
        exact = s * math.sqrt(f / first)
        assert 0 <= n - exact < 1 or n == 3 > exact


def test_schedules_worked_by_hand() -> None:
    ascending, loss = Rule(schedule="ascending"), Rule(schedule="loss", first=255)
    assert [ascending.next_intervals(2.0 / n, 2.0) for n in (1, 1.01, 2, 4, 4.01, 100)] == [2, 3, 3, 4, 5, 20]
    assert [loss.next_intervals(2.0 / n, 2.0) for n in (1, 4, 100, 1e6)] == [255, 128, 26, 3]
    assert ascending.next_intervals(0.0, 2.0) == 65535 and loss.next_intervals(0.0, 2.0) == 3
    assert loss.next_intervals(8.0, 2.0) == 510


# Settings that do not go with each other


@pytest.mark.parametrize(
    "hyper, words",
    [
        ({"least": 5, "most": 4}, "hyper.least: 5 exceeds hyper.most: 4"),
        *[({"quantizer": q}, f"hyper.quantizer: '{q}' .* another schedule than range") for q in quantizers.NORMED],
        ({"quantizer": "norm", "schedule": "ascending"}, "hyper.most below 16"),
        ({"quantizer": "norm", "schedule": "fixed", "most": 15, "width": 16}, "hyper.width: 16 exceeds hyper.most: 15"),
    ],
)
def test_settings_that_do_not_go_with_each_other_are_named(hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Rule(**hyper)
