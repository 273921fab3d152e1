"""Claims of the papers, held against our records by criteria that were fixed in `published/` before the runs."""

from __future__ import annotations

import inspect
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlib.claims.benchmarks import Values
from fedlib.claims.measures import MEASURES
from fedlib.data.sources import home
from fedlib.errors import SpecError, require_mapping, require_name
from fedlib.runs import record
from fedlib.runs.experiments import read_experiments, read_yaml, specs

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested at this scale"
SEEDS = 3  # a verdict never rests on fewer
CLAIM = {"id", "says", "source", "measure", "arguments", "unit", "holds", "part", "why", "untested", "values"}


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
    low, high = claim["holds"]

    def shown(mean: float) -> str:
        """With as many places as tell it from the interval."""
        digits = next((d for d in range(2, 9) if not low <= round(mean, d) <= high), 9)
        return f"{mean:.{digits}f}"

    all_of_them = len(missed) == len(means) > 1
    which = "every case" if all_of_them else "; ".join(f"{case} {shown(means[case])}" for case in missed)
    return verdict, f"outside {low:g} to {high:g}: {which}"


def read_published(paper: str, root: Path | None = None) -> dict[str, Any]:
    """What a paper says: citation, payload sizes, claims with their criteria. SpecError names file and claim.

    A claim may name only methods and groups that some profile of its experiment file has.
    """
    path = (root or home()) / "published" / f"{paper}.yaml"
    content, where = read_yaml(path, {"paper", "payload", "claims"}), f"published/{path.name}"
    runs = [run for profile in read_experiments(paper, root)["profiles"] for run in specs(paper, profile, root=root)]
    groups, labels = {run.group for run in runs}, {run.label for run in runs}
    if not isinstance(content["claims"], list):
        raise SpecError(f"{where}: claims: {content['claims']!r} must be a list")
    ids: set[object] = set()
    for claim in content["claims"]:
        require_mapping(f"{where}: claims", claim, CLAIM)
        of = f"{where}: {claim.get('id')}"
        if claim.get("id") in ids:
            raise SpecError(f"{of}: id is given twice; each claim needs its own")
        ids.add(claim.get("id"))
        needed = {"id", "says", "source"}
        if "untested" not in claim:
            needed |= {"measure", "arguments", "holds", "unit", "why"}
        missing = sorted(needed - claim.keys())
        if missing:
            raise SpecError(f"{of}: {', '.join(missing)} not given")
        if "untested" in claim:
            continue
        require_name(f"{of}: measure", claim["measure"], MEASURES)
        parameters = list(inspect.signature(MEASURES[claim["measure"]]).parameters)[1:]
        require_mapping(f"{of}: arguments", claim["arguments"], parameters)
        for name in {"labels", "groups", "against", "networks"} & claim["arguments"].keys():
            if not isinstance(claim["arguments"][name], list):
                raise SpecError(f"{of}: arguments: {name}: {claim['arguments'][name]!r} must be a list")
            for one in claim["arguments"][name] if name in ("labels", "groups", "against") else ():
                require_name(f"{of}: arguments: {name}", one, groups if name == "groups" else labels)
        if set(parameters) != set(claim["arguments"]):
            raise SpecError(f"{of}: arguments: {', '.join(parameters)} must be given")
        for name in {"holds", "part"} & claim.keys():
            interval = claim[name]
            if not (isinstance(interval, list) and len(interval) == 2 and interval[0] <= interval[1]):
                raise SpecError(f"{of}: {name}: {interval!r} must be an interval [lowest, highest]")
    return content


def scored(root: Path | None = None) -> list[str]:
    """The papers with claims: those with a file in published/."""
    return sorted(path.stem for path in ((root or home()) / "published").glob("*.yaml"))


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
        labels, groups = {*given.get("labels", []), *given.get("against", [])}, given.get("groups", [])
        absent = sorted(", ".join(case) for case in partial if case[0] in labels and case[1] in groups)
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
