"""Claims of the papers, held against our records by criteria that were fixed in `published/` before the runs."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlib import record
from fedlib.data.sources import home
from fedlib.errors import SpecError, require_mapping, require_name
from fedlib.record import Record
from fedlib.spec import read_yaml, specs

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested at this scale"
SEEDS = 3  # a verdict never rests on fewer
CLAIM = {"id", "says", "source", "measure", "arguments", "unit", "holds", "part", "why", "untested"}
Values = dict[str, list[float]]  # case, e.g. "fedmrn-binary, iid" -> one value per seed


@dataclass(frozen=True)
class Score:
    paper: str
    claim: dict[str, Any]
    verdict: str
    values: Values
    note: str  # why it was not tested, or which cases miss

    @property
    def means(self) -> dict[str, float]:
        return {case: statistics.fmean(values) for case, values in self.values.items()}


def _by_case(records: list[Record], labels: list[str]) -> dict[tuple[str, str], dict[int, Record]]:
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for r in records:
        if r["spec"]["label"] in labels and r["spec"]["group"] == "main":
            found.setdefault((r["spec"]["label"], r["spec"]["split"]), {})[r["spec"]["seed"]] = r
    return found


def bits_per_weight(records: list[Record], labels: list[str], part: str) -> Values:
    """Measured bits that one part of the uploads spends per masked parameter."""

    def bits(r: Record) -> float:
        return 8 * r["final"]["uplink_parts"][part] / (r["final"]["uploads"] * r["parameters"]["weights"])

    return {
        f"{label}, {split}": [bits(r) for r in runs.values()]
        for (label, split), runs in _by_case(records, labels).items()
    }


def _pairs(
    records: list[Record], labels: list[str], against: str, measure: Callable[[Record, Record], float]
) -> Values:
    base = _by_case(records, [against])
    values: Values = {}
    for (label, split), runs in _by_case(records, labels).items():
        other = base.get((against, split), {})
        values[f"{label}, {split}"] = [measure(r, other[seed]) for seed, r in runs.items() if seed in other]
    return values


def upload_ratio(records: list[Record], labels: list[str], against: str) -> Values:
    """Bytes of the other method's mean upload over bytes of this one's, same partition and seed."""
    return _pairs(records, labels, against, lambda r, other: upload_bytes(other) / upload_bytes(r))


def accuracy_gap(records: list[Record], labels: list[str], against: str) -> Values:
    """Final test accuracy less the other method's, in points, same partition and seed."""
    return _pairs(
        records, labels, against, lambda r, other: 100 * (r["final"]["accuracy"] - other["final"]["accuracy"])
    )


def upload_bytes(r: Record) -> float:
    """Mean measured bytes of one accepted upload."""
    final = r["final"]
    return (final["uplink_bytes"] - final["uplink_parts"].get("refused", 0)) / final["uploads"]


MEASURES: dict[str, Callable[..., Values]] = {
    "bits_per_weight": bits_per_weight,
    "upload_ratio": upload_ratio,
    "accuracy_gap": accuracy_gap,
}


def judge(claim: dict[str, Any], values: Values) -> tuple[str, str]:
    """Verdict and note: the mean of every case must lie in the claim's interval."""
    if not values:
        return UNTESTED, "no fresh record"
    few = [case for case, seeds in values.items() if len(seeds) < SEEDS]
    if few:
        return UNTESTED, f"a verdict needs {SEEDS} seeds a case; fewer: {', '.join(few)}"
    means = {case: statistics.fmean(seeds) for case, seeds in values.items()}

    def outside(name: str) -> list[str]:
        low, high = claim[name]
        return [case for case, mean in means.items() if not low <= mean <= high]

    missed = outside("holds")
    if not missed:
        return HOLDS, ""
    verdict = PART if "part" in claim and not outside("part") else FAILS
    which = "every case" if len(missed) == len(means) > 1 else "; ".join(f"{case} {means[case]:.2f}" for case in missed)
    return verdict, f"outside {claim['holds']}: {which}"


def read_published(paper: str, root: Path | None = None) -> dict[str, Any]:
    """What a paper says: citation, payload sizes, claims with their criteria. SpecError names file and claim."""
    path = (root or home()) / "published" / f"{paper}.yaml"
    content = read_yaml(path, {"paper", "payload", "claims"})
    if not isinstance(content["claims"], list):
        raise SpecError(f"{path.name}: claims: {content['claims']!r} must be a list")
    for claim in content["claims"]:
        require_mapping(f"{path.name}: claims", claim, CLAIM)
        where = f"{path.name}: {claim.get('id')}"
        needed = {"id", "says", "source"}
        if "untested" not in claim:
            needed |= {"measure", "arguments", "holds", "unit", "why"}
        missing = sorted(needed - claim.keys())
        if missing:
            raise SpecError(f"{where}: {', '.join(missing)} not given")
        if "untested" in claim:
            continue
        require_name(f"{where}: measure", claim["measure"], MEASURES)
        parameters = list(inspect.signature(MEASURES[claim["measure"]]).parameters)[1:]
        require_mapping(f"{where}: arguments", claim["arguments"], parameters)
        if set(parameters) != set(claim["arguments"]):
            raise SpecError(f"{where}: arguments: {', '.join(parameters)} must be given")
        for name in {"holds", "part"} & claim.keys():
            interval = claim[name]
            if not (isinstance(interval, list) and len(interval) == 2 and interval[0] <= interval[1]):
                raise SpecError(f"{where}: {name}: {interval!r} must be an interval [lowest, highest]")
    return content


def scores(paper: str, profile: str, root: Path | None = None) -> list[Score]:
    """One score a claim, from the fresh records of a profile alone."""
    found = record.fresh(specs(paper, profile, root=root), root)
    records = [r for _, r, reason in found if r is not None and not reason]
    result = []
    for claim in read_published(paper, root)["claims"]:
        if "untested" in claim:
            result.append(Score(paper, claim, UNTESTED, {}, claim["untested"]))
            continue
        values = MEASURES[claim["measure"]](records, **claim["arguments"])
        verdict, note = judge(claim, values)
        result.append(Score(paper, claim, verdict, values, note))
    return result


def summary(results: list[Score]) -> dict[str, Any]:
    """What `dvc metrics show` prints: per paper and claim the verdict and the mean of each case."""
    table: dict[str, Any] = {}
    for s in results:
        means = {case: round(mean, 4) for case, mean in s.means.items()}
        table.setdefault(s.paper, {})[s.claim["id"]] = {"verdict": s.verdict} | means
    return table
