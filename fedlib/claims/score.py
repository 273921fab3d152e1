"""Claims of the papers, held against our records by criteria that were fixed in `published/` before the runs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedlib.claims import history, results
from fedlib.claims.benchmarks import Values
from fedlib.claims.conditions import find_unmet
from fedlib.claims.measures import CASE, MEASURES
from fedlib.claims.published import Needs, Published, parameters
from fedlib.claims.verdicts import SUPPORTED, UNTESTED, Band, Evidence, Finding, judge
from fedlib.data.sources import home
from fedlib.errors import SpecError, require_name
from fedlib.runs import record
from fedlib.runs.experiments import profiles, specs
from fedlib.runs.validation import read


@dataclass(frozen=True)
class Score:
    """A claim's verdict at one profile; for an observation the verdict is empty."""

    paper: str
    profile: str
    claim: dict[str, Any]
    verdict: str
    finding: Finding | None  # missing where nothing was measured
    note: str  # why it was not tested, or what was left out


def bands(claim: dict[str, Any]) -> list[Band]:
    """Of a claim's own measure, and of what must go with it."""
    criteria = [claim, claim["joint"]] if "joint" in claim else [claim]
    return [
        Band(
            c.get("at_least", -math.inf) - c.get("margin", 0),
            c.get("at_most", math.inf) + c.get("margin", 0),
        )
        for c in criteria
    ]


def measure(name: str, given: dict[str, Any], tables: dict[str, pd.DataFrame]) -> Values:
    """Values of a measure from the tables `runs` and `rounds`, whichever it takes, and those arguments that it has."""
    names = parameters(name)
    return MEASURES[name](**{key: value for key, value in (tables | given).items() if key in names})


def judge_claim(
    claim: dict[str, Any], tables: dict[str, pd.DataFrame], planned: pd.DataFrame
) -> tuple[str, Finding | None, str]:
    """Verdict, finding and note of a claim on runs of which none is missing; planned: all runs, for what was tuned."""
    names = [claim["measure"], *([claim["joint"]["measure"]] if "joint" in claim else [])]
    frames = [pd.DataFrame(measure(name, claim["arguments"], tables)) for name in names]
    frames = [frame[frames[0].columns] for frame in frames]
    if frames[0].empty:
        return UNTESTED, None, "no fresh record"
    finding = judge(claim["quantifier"], [Evidence(f, band) for f, band in zip(frames, bands(claim), strict=True)])
    needs = Needs(**claim.get("needs", {}))
    few = [str(case) for case in frames[0] if frames[0][case].count() < needs.seeds]
    if few:
        fewer = f"a verdict needs {needs.seeds} {claim.get('values', 'seeds')} a case; fewer: {'; '.join(few)}"
        return UNTESTED, finding, fewer
    given = claim["arguments"]
    if "groups" in given:
        unmet = list(find_unmet(needs.model_dump(), given, tables, planned))
        if unmet:
            return UNTESTED, finding, "; ".join(unmet)
    outside = [case for case, intervals in finding.cases.items() if bands(claim)[0].excludes(intervals[0])]
    named = claim["quantifier"] == "all" and finding.verdict != SUPPORTED and outside
    return finding.verdict, finding, f"outside by themselves: {'; '.join(outside)}" if named else ""


def read_published(paper: str, root: Path | None = None) -> dict[str, Any]:
    """What a paper says: citation, payload sizes, claims with their criteria. SpecError names file and claim.

    A claim may name only methods and groups that some profile of its experiment file has.
    """
    where = f"published/{paper}.yaml"
    content = read((root or home()) / where, Published)
    runs = [run for profile in profiles(paper, root) for run in specs(paper, profile, root=root)]
    groups, labels = {run.group for run in runs}, {run.label for run in runs}
    stated, seen = [*content["claims"], *content.get("observations", [])], set()
    for claim in stated:
        if claim["id"] in seen:
            raise SpecError(f"{where}: claims.{claim['id']}: id is given twice; each claim needs its own")
        seen.add(claim["id"])
        for name, allowed in (("labels", labels), ("groups", groups), ("against", labels)):
            for value in claim.get("arguments", {}).get(name, []):
                require_name(f"{where}: claims.{claim['id']}.arguments.{name}", value, allowed)
    return content


def scored(root: Path | None = None) -> list[str]:
    """The papers with claims: those with a file in published/."""
    return sorted(path.stem for path in ((root or home()) / "published").glob("*.yaml"))


def scores(paper: str, profile: str, root: Path | None = None) -> list[Score]:
    """One score a claim, then one an observation, from fresh records alone.

    A method of whose runs one is missing is left out of its group, which the note says.
    """
    runs, rounds = results.read(paper, profile, root=root)
    cases = list(runs[[*CASE]].itertuples(index=False, name=None))
    partial = {case for case, state in zip(cases, runs["state"], strict=True) if state != results.FRESH}
    tables = {"runs": runs[[case not in partial for case in cases]], "rounds": rounds}
    content = read_published(paper, root)
    young = _name_younger(paper, content["claims"], tables["runs"], root or home())
    judged = []
    for claim in content["claims"]:
        if "untested" in claim:
            judged.append(Score(paper, profile, claim, UNTESTED, None, claim["untested"]))
            continue
        verdict, finding, note = judge_claim(claim, tables, runs)
        if finding and claim["id"] in young:
            younger = "its criterion is younger than its records"
            verdict, note = UNTESTED, "; ".join(filter(None, [note, younger]))
        judged.append(Score(paper, profile, claim, verdict, finding, _add_absent(note, claim, partial, finding)))
    for seen in content.get("observations", []):
        frame = pd.DataFrame(measure(seen["measure"], seen["arguments"], tables))
        finding = None if frame.empty else judge("mean", [Evidence(frame, Band(-math.inf, math.inf))])
        judged.append(Score(paper, profile, seen, "", finding, _add_absent("", seen, partial, finding)))
    return judged


def _name_younger(paper: str, claims: list[dict[str, Any]], runs: pd.DataFrame, root: Path) -> list[str]:
    """The claims whose criterion was committed after a record that it judges was made."""
    times: dict[str, str] = {}
    for claim in claims:
        given = claim.get("arguments", {})
        if "groups" in given:
            own = results.where(runs, group=given["groups"], label=[*given["labels"], *given.get("against", [])])
            times |= {claim["id"]: own["time"].min()} if len(own) else {}
    return history.name_younger(paper, times, root)


def _add_absent(note: str, claim: dict[str, Any], partial: set[tuple[str, ...]], finding: Finding | None) -> str:
    given = claim["arguments"]
    labels, groups = {*given.get("labels", []), *given.get("against", [])}, given.get("groups", [])
    absent = sorted(", ".join(case) for case in partial if case[0] in labels and case[1] in groups)
    left = f"left out, since runs are missing: {'; '.join(absent)}" if finding and absent else ""
    return "; ".join(filter(None, [note, left]))


def summary(judged: list[Score]) -> dict[str, dict[str, Any]]:
    """What `dvc metrics show` prints, a row a claim: scale, verdict, and the effect with its interval and n.

    Keys are paths below scores/, as `fedmrn/one-bit.json`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for score in judged:
        row: dict[str, Any] = {"scale": score.profile, "verdict": score.verdict or "observed"}
        if score.finding:
            effect = score.finding.effects[0]
            ends = {"effect": effect.mean, "low": effect.low, "high": effect.high}
            row |= {name: round(value, 4) for name, value in ends.items() if math.isfinite(value)} | {"n": effect.n}
        rows[f"{score.paper}/{score.claim['id']}.json"] = row
    return rows


def write(judged: list[Score], root: Path | None = None) -> Path:
    """Write the summary into scores/, a file a claim, and remove what stands there of other claims."""
    folder = (root or home()) / "scores"
    rows = summary(judged)
    for name, row in rows.items():
        record.write(folder / name, (json.dumps(row) + "\n").encode())
    for path in folder.glob("*/*.json"):
        if str(path.relative_to(folder)) not in rows:
            path.unlink(missing_ok=True)  # another process may have done so
    return folder
