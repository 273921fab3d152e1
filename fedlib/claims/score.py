"""Claims of the papers, held against our records by criteria that were fixed in `published/` before the runs."""

from __future__ import annotations

import functools
import inspect
import statistics
from collections.abc import KeysView
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
)

from fedlib.claims import results
from fedlib.claims.benchmarks import Values
from fedlib.claims.measures import CASE, MEASURES
from fedlib.data.sources import home
from fedlib.errors import SpecError, require_name
from fedlib.runs.experiments import profiles, specs
from fedlib.runs.validation import Name, OneOf, Range, Table, read, schema, wrong

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested at this scale"
SEEDS = 3  # a verdict never rests on fewer
TABLES = {"runs", "rounds"}  # what a measure is given besides the claim's arguments


def parameters(measure: str) -> KeysView[str]:
    return inspect.signature(MEASURES[measure]).parameters.keys()


@functools.cache
def arguments(measure: str) -> type[Table]:
    """What a measure has to be given beside the tables: all of its other parameters, of their types."""
    types = get_type_hints(MEASURES[measure])
    fields: dict[str, Any] = {name: (types[name], ...) for name in sorted(parameters(measure) - TABLES)}
    return create_model(measure, __base__=Table, **fields)


def _by_measure() -> dict[str, Any]:
    """The same for a JSON schema."""

    def one(name: str) -> dict[str, Any]:
        given = {"properties": {"arguments": schema(arguments(name))}}
        return {"if": {"properties": {"measure": {"const": name}}}, "then": given}

    return {"allOf": [one(name) for name in MEASURES]}


def _interval(ends: list[float]) -> list[float]:
    if ends[0] > ends[1]:
        raise wrong("must be an interval [lowest, highest]")
    return ends


Interval = Annotated[
    list[Annotated[float, Range(-1e300, 1e300)]], Field(min_length=2, max_length=2), AfterValidator(_interval)
]


class Untested(Table):
    """What cannot be tested here, and why."""

    id: Name
    says: str
    source: str
    untested: str


class Tested(Table):
    """What a paper says, and by which measure it is held to that; see `judge`."""

    model_config = ConfigDict(json_schema_extra=_by_measure())
    id: Name
    says: str
    source: str
    measure: Annotated[str, OneOf(MEASURES)]
    arguments: dict[str, Any]
    unit: str
    holds: Interval
    part: Interval | None = None
    why: str
    values: str = "seeds"

    @field_validator("arguments")
    @classmethod
    def _fit_the_measure(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "measure" in info.data:
            arguments(info.data["measure"]).model_validate(given)
        return given


class Paper(Table):
    """What was read of a paper."""

    title: str
    citation: str
    read: str
    code: str = ""


class Published(Table):
    """What a paper says."""

    paper: Paper
    payload: dict[str, dict[str, int]]  # of a method's upload: bytes by part
    claims: list[
        Annotated[
            Annotated[Tested, Tag("tested")] | Annotated[Untested, Tag("untested")],
            Discriminator(lambda claim: "untested" if isinstance(claim, dict) and "untested" in claim else "tested"),
        ]
    ]


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
    where = f"published/{paper}.yaml"
    content = read((root or home()) / where, Published)
    runs = [run for profile in profiles(paper, root) for run in specs(paper, profile, root=root)]
    groups, labels = {run.group for run in runs}, {run.label for run in runs}
    ids: set[str] = set()
    for claim in content["claims"]:
        if claim["id"] in ids:
            raise SpecError(f"{where}: claims.{claim['id']}: id is given twice; each claim needs its own")
        ids.add(claim["id"])
        for name, allowed in (("labels", labels), ("groups", groups), ("against", labels)):
            for one in claim.get("arguments", {}).get(name, []):
                require_name(f"{where}: claims.{claim['id']}.arguments.{name}", one, allowed)
    return content


def scored(root: Path | None = None) -> list[str]:
    """The papers with claims: those with a file in published/."""
    return sorted(path.stem for path in ((root or home()) / "published").glob("*.yaml"))


def scores(paper: str, profile: str, root: Path | None = None) -> list[Score]:
    """One score a claim, from fresh records alone; a method of whose runs one is missing is left out of a group.

    Otherwise its best learning rate would be the best of those that happen to be there.
    """
    runs, rounds = results.read(paper, profile, root=root)
    partial = set(runs.loc[runs["state"] != results.FRESH, [*CASE]].itertuples(index=False, name=None))
    whole = runs[[case not in partial for case in runs[[*CASE]].itertuples(index=False, name=None)]]
    tables, scored = {"runs": whole, "rounds": rounds}, []
    for claim in read_published(paper, root)["claims"]:
        if "untested" in claim:
            scored.append(Score(paper, claim, UNTESTED, {}, claim["untested"]))
            continue
        measure, given = claim["measure"], claim["arguments"]
        values = MEASURES[measure](**{name: tables[name] for name in TABLES & parameters(measure)}, **given)
        verdict, note = judge(claim, values)
        labels, groups = {*given.get("labels", []), *given.get("against", [])}, given.get("groups", [])
        absent = sorted(", ".join(case) for case in partial if case[0] in labels and case[1] in groups)
        if values and absent:
            note = "; ".join(filter(None, [note, f"left out, since runs are missing: {'; '.join(absent)}"]))
        scored.append(Score(paper, claim, verdict, values, note))
    return scored


def summary(results: list[Score]) -> dict[str, Any]:
    """What `dvc metrics show` prints: per paper and claim the verdict and the mean of each case."""
    table: dict[str, Any] = {}
    for s in results:
        means = {case: round(mean, 4) for case, mean in s.means.items()}
        table.setdefault(s.paper, {})[s.claim["id"]] = {"verdict": s.verdict} | means
    return table
