"""Claims of the papers, held against our records by criteria that were fixed in `published/` before the runs."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlib import record, targets
from fedlib.data.sources import home
from fedlib.errors import SpecError, require_mapping, require_name
from fedlib.record import Record
from fedlib.spec import read_yaml, specs

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested at this scale"
SEEDS = 3  # a verdict never rests on fewer
CLAIM = {"id", "says", "source", "measure", "arguments", "unit", "holds", "part", "why", "untested"}
Values = dict[str, list[float]]  # case, e.g. "fedmrn-binary, main, iid" -> one value per seed
Cases = dict[tuple[str, str, str], dict[int, Record]]


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


def by_case(records: Sequence[Record], labels: Collection[str], groups: Collection[str]) -> Cases:
    """Records by (label, group, split) and seed, each method at the learning rate of its grid that serves it best.

    Best is the mean final accuracy over seeds, for every method alike; with one learning rate there is no choice.
    """
    found: dict[tuple[str, str, str], dict[float, dict[int, Record]]] = {}
    for r in records:
        s = r["spec"]
        if s["label"] in labels and s["group"] in groups:
            runs = found.setdefault((s["label"], s["group"], s["split"]), {}).setdefault(s["lr"], {})
            if s["seed"] in runs:
                raise SpecError(f"{s['name']}: another run has its label, group, split, lr and seed; give it a label")
            runs[s["seed"]] = r
    return {case: max(rates.values(), key=_mean_accuracy) for case, rates in found.items()}


def best(records: Sequence[Record]) -> list[Record]:
    """The records of each method, group and partition at the learning rate that serves it best; others left out."""
    specs = [r["spec"] for r in records]
    cases = by_case(records, {s["label"] for s in specs}, {s["group"] for s in specs})
    return [r for runs in cases.values() for r in runs.values()]


def _mean_accuracy(runs: dict[int, Record]) -> float:
    return statistics.fmean(r["final"]["accuracy"] for r in runs.values())


def bits_per_weight(records: list[Record], labels: list[str], groups: list[str], part: str) -> Values:
    """Measured bits that one part of the uploads spends per masked parameter."""

    def bits(r: Record) -> float:
        return 8 * r["final"]["uplink_parts"][part] / (r["final"]["uploads"] * r["parameters"]["weights"])

    return {_name(case): [bits(r) for r in runs.values()] for case, runs in by_case(records, labels, groups).items()}


def bits_per_parameter(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Measured bits of a mean upload, all its parts, per parameter of the network."""
    cases = by_case(records, labels, groups)
    return {_name(case): [8 * upload_bytes(r) / parameters(r) for r in runs.values()] for case, runs in cases.items()}


def final_bits(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Bits per parameter that the paper's own definition counts in the last round."""
    return {
        _name(case): [last_bits(r) for r in runs.values()] for case, runs in by_case(records, labels, groups).items()
    }


def storage_ratio(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Bytes of the network as float32 over bytes of the model's file after the last round."""
    cases = by_case(records, labels, groups)
    return {_name(case): [4 * parameters(r) / model_bytes(r) for r in runs.values()] for case, runs in cases.items()}


def parameters(r: Record) -> int:
    return int(sum(r["parameters"].values()))


def last_bits(r: Record) -> float:
    """Mean over the last round's uploads, per parameter, by the paper's definition."""
    last = r["rounds"][-1]
    return float(last["paper_bits"] / len(last["clients"]) / parameters(r))


def model_bytes(r: Record) -> int:
    return int(r["rounds"][-1]["notes"]["model file"])


def _name(case: tuple[str, str, str], against: str = "") -> str:
    label, group, split = case
    return f"{label}{' against ' + against if against else ''}, {group}, {split}"


def _pairs(
    records: list[Record],
    labels: list[str],
    groups: list[str],
    against: list[str],
    measure: Callable[[Record, Record], float],
) -> Values:
    """One value a seed for each method and each method it is held against, where both have run."""
    base = by_case(records, against, groups)
    values: Values = {}
    for (label, group, split), runs in by_case(records, labels, groups).items():
        for name in against:
            other = base.get((name, group, split), {})
            pairs = [measure(r, other[seed]) for seed, r in runs.items() if seed in other]
            if pairs:
                values[_name((label, group, split), name if len(against) > 1 else "")] = pairs
    return values


def upload_ratio(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Bytes of the other method's mean upload over bytes of this one's, same partition and seed."""
    return _pairs(records, labels, groups, against, lambda r, other: upload_bytes(other) / upload_bytes(r))


def accuracy_gap(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Final test accuracy less the other method's, in points, same partition and seed, each at its learning rate."""

    def gap(r: Record, other: Record) -> float:
        return 100 * (r["final"]["accuracy"] - other["final"]["accuracy"])

    return _pairs(records, labels, groups, against, gap)


def bits_ratio(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """The other method's bits per parameter in the last round over this one's, by the paper's definition."""
    return _pairs(records, labels, groups, against, lambda r, other: last_bits(other) / max(last_bits(r), 1e-9))


def speed_gap(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """As accuracy_gap, for the mean accuracy over the evaluated rounds: higher is sooner there."""
    return _pairs(records, labels, groups, against, lambda r, other: 100 * (_area(r) - _area(other)))


def saving_to_target(
    records: list[Record], labels: list[str], groups: list[str], against: list[str], quantity: str, largest: bool
) -> Values:
    """Percent of what the other method spends (`rounds`, `bits` or `megabytes`) until both reach the same accuracy.

    The target is `targets.SHARE` of FedAvg's best. largest: of the methods in `against` only the one with the largest
    mean saving, for claims that say "up to".
    """

    def percent(r: Record, other: Record) -> float:
        goal = targets.target(records, r)
        return targets.saving(targets.reached(r, goal), targets.reached(other, goal), quantity)

    dense = by_case(records, ["fedavg"], groups)
    there = [group for group in groups if any(case[1] == group for case in dense)]
    found = _pairs(records, labels, there, against, percent)
    if not largest or not found:
        return found
    case = max(found, key=lambda name: statistics.fmean(found[name]))
    return {case: found[case]}


def range_ratio(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Range of the updates in the last round over that in the first: mean over tensors of the ratio of mean ranges."""

    def ratio(r: Record) -> float:
        first, last = (r["rounds"][index]["notes"]["ranges"] for index in (0, -1))
        return statistics.fmean(last[name] / first[name] for name in first if first[name])

    cases = by_case(records, labels, groups)
    return {_name(case): [ratio(r) for r in runs.values()] for case, runs in cases.items()}


def _area(r: Record) -> float:
    return statistics.fmean(entry["accuracy"] for entry in r["rounds"] if entry["accuracy"] is not None)


def upload_bytes(r: Record) -> float:
    """Mean measured bytes of one accepted upload."""
    final = r["final"]
    return (final["uplink_bytes"] - final["uplink_parts"].get("refused", 0)) / final["uploads"]


MEASURES: dict[str, Callable[..., Values]] = {
    "bits_per_weight": bits_per_weight,
    "upload_ratio": upload_ratio,
    "accuracy_gap": accuracy_gap,
    "speed_gap": speed_gap,
    "bits_per_parameter": bits_per_parameter,
    "final_bits": final_bits,
    "bits_ratio": bits_ratio,
    "storage_ratio": storage_ratio,
    "saving_to_target": saving_to_target,
    "range_ratio": range_ratio,
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
        for name in {"labels", "groups", "against"} & claim["arguments"].keys():
            if not isinstance(claim["arguments"][name], list):
                raise SpecError(f"{where}: arguments: {name}: {claim['arguments'][name]!r} must be a list")
        if set(parameters) != set(claim["arguments"]):
            raise SpecError(f"{where}: arguments: {', '.join(parameters)} must be given")
        for name in {"holds", "part"} & claim.keys():
            interval = claim[name]
            if not (isinstance(interval, list) and len(interval) == 2 and interval[0] <= interval[1]):
                raise SpecError(f"{where}: {name}: {interval!r} must be an interval [lowest, highest]")
    return content


def scores(paper: str, profile: str, root: Path | None = None) -> list[Score]:
    """One score a claim, from fresh records alone; a method of whose runs one is missing is left out of a group.

    Otherwise its best learning rate would be the best of those that happen to be there.
    """
    found = list(record.fresh(specs(paper, profile, root=root), root))
    partial = {(spec.label, spec.group, spec.split) for spec, _, reason in found if reason}
    records = [r for spec, r, _ in found if r is not None and (spec.label, spec.group, spec.split) not in partial]
    result = []
    for claim in read_published(paper, root)["claims"]:
        if "untested" in claim:
            result.append(Score(paper, claim, UNTESTED, {}, claim["untested"]))
            continue
        given = claim["arguments"]
        values = MEASURES[claim["measure"]](records, **given)
        verdict, note = judge(claim, values)
        labels = {*given["labels"], *given.get("against", [])}
        absent = sorted(", ".join(case) for case in partial if case[0] in labels and case[1] in given["groups"])
        if values and absent:
            note = "; ".join(filter(None, [note, f"left out, since runs are missing: {'; '.join(absent)}"]))
        result.append(Score(paper, claim, verdict, values, note))
    return result


def summary(results: list[Score]) -> dict[str, Any]:
    """What `dvc metrics show` prints: per paper and claim the verdict and the mean of each case."""
    table: dict[str, Any] = {}
    for s in results:
        means = {case: round(mean, 4) for case, mean in s.means.items()}
        table.setdefault(s.paper, {})[s.claim["id"]] = {"verdict": s.verdict} | means
    return table
