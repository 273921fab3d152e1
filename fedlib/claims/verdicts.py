"""From measured values to a verdict: intervals by Student's t, and the rule of each quantifier.

A claim is judged as a whole. Values are differences or ratios paired by seed: one column a case (method, group,
partition), one row a seed. The level of an interval is 95 %; where one of several cases may decide alone, its level is
raised after Bonferroni, so that many cases do not make an error likelier than one does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTED = "supported", "contradicted", "undecided", "not tested at this scale"
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTED)
QUANTIFIERS = ("all", "some", "mean", "up to")
LEVEL = 0.95
ROUNDING = 1e-9  # of a limit: less never decides


@dataclass(frozen=True)
class Interval:
    """The mean of n values and the ends of its interval, in the values' unit."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Band:
    """Where a value has to lie, ends included, in the values' unit."""

    low: float
    high: float

    def holds(self, interval: Interval) -> bool:
        """Whether the whole interval lies inside."""
        return interval.low >= self.low - _slack(self.low) and interval.high <= self.high + _slack(self.high)

    def excludes(self, interval: Interval) -> bool:
        """Whether the whole interval lies outside."""
        return interval.high < self.low - _slack(self.low) or interval.low > self.high + _slack(self.high)


@dataclass(frozen=True)
class Evidence:
    """Values of one measure, a column a case and a row a seed, and the band that they are held to."""

    values: pd.DataFrame
    band: Band


@dataclass(frozen=True)
class Finding:
    """A verdict; the effect that it rests on, first the claim's own measure, then what must go with it; all cases."""

    verdict: str
    effects: tuple[Interval, ...]
    cases: dict[str, tuple[Interval, ...]]
    values: pd.DataFrame  # of the claim's own measure, as in Evidence


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Interval of the mean by Student's t with n - 1 degrees of freedom; for one value or none, all of the line."""
    return column_intervals(pd.DataFrame({0: values}), level)[0]


def column_intervals(values: pd.DataFrame, level: float = LEVEL) -> list[Interval]:
    """The same for each column, of those of its values that are there."""
    table = values.to_numpy(dtype=float)
    counts = np.sum(~np.isnan(table), axis=0)
    means = np.nansum(table, axis=0) / np.maximum(counts, 1)
    squares = np.nansum((table - means) ** 2, axis=0)
    found = []
    for mean, square, n in zip(means.tolist(), squares.tolist(), counts.tolist(), strict=True):
        mean = mean if n else math.nan
        half = _quantile(level, n - 1) * math.sqrt(square / (n - 1) / n) if n > 1 else math.inf
        found.append(Interval(mean, mean - half, mean + half, n))
    return found


@functools.cache
def _quantile(level: float, freedom: int) -> float:
    return float(stats.t.ppf((1 + level) / 2, freedom))


def judge(quantifier: str, evidence: Sequence[Evidence]) -> Finding:
    """The verdict on a claim from its measure and from those that must hold with it, all of them for the same cases.

    mean: the mean over cases, seed by seed, lies in the band. all: so it does, and no case lies outside; one that does
    contradicts where its interval is still outside at the raised level, and otherwise leaves the claim undecided.
    some, up to: one case at least lies in the band, whichever it is. Supported needs each measure, contradicted one.
    """
    return _judge_one_of_them(evidence) if quantifier in ("some", "up to") else _judge_together(evidence, quantifier)


def _judge_together(evidence: Sequence[Evidence], quantifier: str) -> Finding:
    pooled = tuple(mean_interval(e.values.dropna().mean(axis=1).tolist()) for e in evidence)
    bands = [e.band for e in evidence]
    cases = _cases(evidence, LEVEL)
    strict = _cases(evidence, 1 - (1 - LEVEL) / len(cases))

    def outside(found: tuple[Interval, ...]) -> bool:
        return any(band.excludes(interval) for band, interval in zip(bands, found, strict=True))

    inside = all(band.holds(interval) for band, interval in zip(bands, pooled, strict=True))
    against = outside(pooled)
    if quantifier == "all":
        inside &= not any(map(outside, cases.values()))
        against |= any(map(outside, strict.values()))
    verdict = CONTRADICTED if against else SUPPORTED if inside else UNDECIDED
    return Finding(verdict, pooled, cases, evidence[0].values)


def _judge_one_of_them(evidence: Sequence[Evidence]) -> Finding:
    bands = [e.band for e in evidence]
    cases = _cases(evidence, LEVEL)
    strict = _cases(evidence, 1 - (1 - LEVEL) / len(cases))
    inside = [c for c, found in strict.items() if all(b.holds(i) for b, i in zip(bands, found, strict=True))]
    possible = [c for c, found in cases.items() if not any(b.excludes(i) for b, i in zip(bands, found, strict=True))]
    verdict = SUPPORTED if inside else UNDECIDED if possible else CONTRADICTED
    # The case nearest to the claim: among those that it rests on, the one furthest inside the band.
    nearest = max(inside or possible or cases, key=lambda case: _depth(bands[0], cases[case][0].mean))
    return Finding(verdict, (strict if inside else cases)[nearest], cases, evidence[0].values)


def _cases(evidence: Sequence[Evidence], level: float) -> dict[str, tuple[Interval, ...]]:
    found = zip(*(column_intervals(e.values, level) for e in evidence), strict=True)
    return dict(zip(map(str, evidence[0].values.columns), found, strict=True))


def _depth(band: Band, value: float) -> float:
    """How far a value is from the end of the band that is an end; negative outside."""
    return min(value - band.low, band.high - value)


def _slack(limit: float) -> float:
    return ROUNDING * max(1.0, abs(limit)) if math.isfinite(limit) else 0.0
