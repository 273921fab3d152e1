"""What a file in published/ says of a paper: its claims, each with the criterion by which it is judged."""

from __future__ import annotations

import functools
import inspect
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Discriminator, Tag, ValidationInfo, create_model, field_validator, model_validator

from fedlib.claims.measures import MEASURES
from fedlib.claims.tuning import SEARCHED
from fedlib.claims.verdicts import QUANTIFIERS
from fedlib.runs.validation import Name, OneOf, Range, Table, schema, wrong

TABLES = {"runs", "rounds"}  # what a measure is given besides the claim's arguments
Number = Annotated[float, Range(-1e300, 1e300)]


@functools.cache
def arguments(measure: str) -> type[Table]:
    """What a measure has to be given beside the tables: all of its other parameters, of their types."""
    types = get_type_hints(MEASURES[measure])
    fields: dict[str, Any] = {name: (types[name], ...) for name in sorted(parameters(measure) - TABLES)}
    return create_model(measure, __base__=Table, **fields)


def parameters(measure: str) -> set[str]:
    """The names of a measure's parameters."""
    return set(inspect.signature(MEASURES[measure]).parameters)


def _by_measure() -> dict[str, Any]:
    """The same for a JSON schema."""

    def rule(name: str) -> dict[str, Any]:
        given = {"properties": {"arguments": schema(arguments(name))}}
        return {"if": {"properties": {"measure": {"const": name}}}, "then": given}

    return {"allOf": [rule(name) for name in MEASURES]}


class Criterion(Table):
    """Where a measured value must lie: what the paper says, and the margin that we allow beyond it, in the unit."""

    measure: Annotated[str, OneOf(MEASURES)]
    at_least: Number | None = None
    at_most: Number | None = None
    margin: Annotated[float, Range(0, 1e300)] = 0

    @model_validator(mode="after")
    def _has_an_end(self) -> Criterion:
        low, high = self.at_least, self.at_most
        if low is None and high is None:
            raise wrong("at_least or at_most must be given", "key")
        if low is not None and high is not None and low > high:
            raise wrong(f"at_least {low:g} exceeds at_most {high:g}", "key")
        return self


class Needs(Table):
    """What runs must have so that they can decide a claim; otherwise it is not tested at their scale."""

    seeds: Annotated[int, Range(2, 1000)] = 3  # of each case
    local_steps: Annotated[int, Range(1, 10**9)] | None = None  # the source's, of a client in a round, within a factor
    plateau: Annotated[float, Range(0, 100)] | None = None  # points that the reference may gain in the last third
    room: Annotated[float, Range(0, 100)] | None = None  # points by which the reference leads those compared against
    reference: Name = "fedavg"
    tuned: Annotated[str, OneOf(SEARCHED)] = "accuracy"  # what a search for settings, where there is one, was made for


class Measured(Table):
    """What is measured, and in which runs."""

    model_config = ConfigDict(json_schema_extra=_by_measure())
    id: Name
    says: str
    measure: Annotated[str, OneOf(MEASURES)]
    arguments: dict[str, Any]
    unit: str
    values: str = "seeds"

    @field_validator("arguments")
    @classmethod
    def _fit_the_measure(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "measure" in info.data:
            arguments(info.data["measure"]).model_validate(given)
        return given


class Claim(Measured, Criterion):
    """What a paper says, and the rule by which it is held to that; see `fedlib.claims.verdicts.judge`."""

    source: str
    quantifier: Annotated[str, OneOf(QUANTIFIERS)]
    joint: Criterion | None = None  # what must be true of the same cases at once, such as the accuracy of a saving
    needs: Needs = Needs()
    why: str  # of margin, joint and needs

    @model_validator(mode="after")
    def _joint_has_its_arguments(self) -> Claim:
        lacking = parameters(self.joint.measure) - TABLES - self.arguments.keys() if self.joint else set()
        if lacking:
            raise wrong(f"joint: {', '.join(sorted(lacking))} must be among the claim's arguments", "key")
        return self


class Untested(Table):
    """What cannot be tested here, and why."""

    id: Name
    says: str
    source: str
    untested: str


class Observation(Measured):
    """What we measure beside the claims: no paper says it, so that it has no verdict."""

    why: str


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
            Annotated[Claim, Tag("tested")] | Annotated[Untested, Tag("untested")],
            Discriminator(lambda claim: "untested" if isinstance(claim, dict) and "untested" in claim else "tested"),
        ]
    ]
    observations: list[Observation] | None = None
