"""The experiment files, and the runs that they describe; all is checked before anything is computed."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import ConfigDict, Discriminator, Field, Tag, create_model

from fedlib.data.sources import home
from fedlib.errors import SpecError, require_mapping, require_name
from fedlib.methods import registry
from fedlib.runs.spec import PROFILES, Spec, partitions
from fedlib.runs.validation import Like, Name, OneOf, Range, Table, read

TYPES = get_type_hints(Spec, include_extras=True)
REQUIRED = {f.name for f in dataclasses.fields(Spec) if f.default is dataclasses.MISSING}
LABELS = {"paper", "profile", "name", "group", "label", "split"}
# What a file's settings, a group's own and its grid may name: all that is no label and has no part of its own.
AXES = sorted(TYPES.keys() - LABELS - {"hyper", "downlink", "partition", "seed"})
# What an experiment file says of a method beside its name and its own settings.
METHOD = ("lr", "epochs", "optimizer", "momentum", "persistent", "feedback", "frozen", "downlink")

Seed = Annotated[int, Range(0, 2**31 - 1)]  # the run's and the partition's are added
Labelled = Annotated[
    Annotated[Name, Tag("key")] | Annotated[dict[Name, Name], Field(min_length=1, max_length=1), Tag("label: key")],
    Discriminator(lambda item: "label: key" if isinstance(item, dict) else "key"),
]


def _with(name: str, base: type[Table], types: dict[str, Any]) -> Any:
    """A model with further fields, none of which must be given."""
    fields: dict[str, Any] = {field: (type_, None) for field, type_ in types.items()}
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)


class Setting(Table):
    """A field of the runs, with its value for each profile."""

    unit: str
    source: str


class Method(Table):
    """A method with its own settings, and what else goes with it."""

    method: Annotated[str, OneOf(registry.METHODS)]
    hyper: dict[str, Any]
    paper: str = ""
    source: str = ""


class Grid(Table):
    """Lists of values, every combination of which is run; `hyper.x` is a method's own setting x."""

    free: ClassVar[str] = "hyper."
    model_config = ConfigDict(
        extra="allow", json_schema_extra={"propertyNames": {"pattern": rf"^({'|'.join(AXES)}|hyper\..+)$"}}
    )
    __pydantic_extra__: dict[str, list[Any]]


# All these models know the type of each field from Spec itself.
_Values = _with("Values", Table, {name: TYPES[name] for name in AXES})
_Axes = _with("Axes", Grid, {name: list[TYPES[name]] for name in AXES})  # type: ignore[valid-type]
_Method = _with("Method", Method, {name: TYPES[name] for name in METHOD})
_Settings = _with(
    "Settings", Table, {name: _with(name, Setting, dict.fromkeys(PROFILES, TYPES[name])) for name in AXES}
)


class Group(Table):
    """Runs: partitions x methods x every combination of the lists under `grid` x seeds."""

    methods: list[Labelled]  # a key of the file's methods, or {label: key} where it goes by another label here
    partitions: list[Name]
    seeds: list[Seed]
    settings: Annotated[dict[str, Any] | None, Like(_Values)] = None
    grid: Annotated[dict[str, Any] | None, Like(_Axes)] = None


class Experiment(Table):
    """What is run for a paper."""

    settings: Annotated[dict[str, Any], Like(_Settings)]
    methods: dict[Name, Annotated[dict[str, Any], Like(_Method)]]
    partitions: dict[Name, Annotated[dict[str, Any], Like(partitions((Seed, 0)))]]
    profiles: dict[Annotated[str, OneOf(PROFILES)], dict[Name, Group]]


def papers(root: Path | None = None) -> list[str]:
    return sorted(path.stem for path in ((root or home()) / "experiments").glob("*.yaml"))


def read_experiments(paper: str, root: Path | None = None) -> dict[str, Any]:
    """The experiment file of a paper: settings with value, unit and source; methods; partitions; profiles."""
    require_name("paper", paper, papers(root))
    return read((root or home()) / "experiments" / f"{paper}.yaml", Experiment)


def profiles(paper: str, root: Path | None = None) -> list[str]:
    """Those at which a paper has runs."""
    return [profile for profile, groups in read_experiments(paper, root)["profiles"].items() if groups]


def specs(paper: str, profile: str, only: str = "*", root: Path | None = None) -> list[Spec]:
    """All runs of one profile of a paper whose name matches the pattern `only`, in the order of the file."""
    require_name("profile", profile, PROFILES)
    content = read_experiments(paper, root)
    groups = content["profiles"].get(profile)
    if not groups:
        raise SpecError(f"experiments/{paper}.yaml: profiles.{profile}: no runs; take another profile, or add a group")
    found = [spec for group, grid in groups.items() for spec in _grid(paper, profile, group, grid, content)]
    twice = [name for name, n in collections.Counter(spec.name for spec in found).items() if n > 1]
    if twice:
        raise SpecError(f"experiments/{paper}.yaml: profiles.{profile}: {twice[0]} is asked for twice")
    found = [spec for spec in found if fnmatch.fnmatch(spec.name, only)]
    if not found:
        raise SpecError(f"only: {only!r} matches no run of {paper} at profile {profile}")
    return found


def _grid(paper: str, profile: str, group: str, grid: dict[str, Any], content: dict[str, Any]) -> Iterator[Spec]:
    """The runs of one group, see Group."""
    where = f"experiments/{paper}.yaml: profiles.{profile}.{group}"
    axes, own = grid.get("grid", {}), grid.get("settings", {})
    require_mapping(f"{where}.settings", own, content["settings"])
    settings = {name: s[profile] for name, s in content["settings"].items() if profile in s} | own
    for split, item in itertools.product(grid["partitions"], grid["methods"]):
        ((label, entry),) = item.items() if isinstance(item, dict) else [(item, item)]
        require_name(f"{where}.partitions", split, content["partitions"])
        require_name(f"{where}.methods", entry, content["methods"])
        method = {k: v for k, v in content["methods"][entry].items() if k not in ("paper", "source")}
        parts = {"seed": 0} | content["partitions"][split]
        for *point, seed in itertools.product(*axes.values(), grid["seeds"]):
            chosen = dict(zip(axes, point, strict=True))
            hyper = method["hyper"] | {k.removeprefix("hyper."): v for k, v in chosen.items() if "." in k}
            fields = settings | method | {k: v for k, v in chosen.items() if "." not in k}
            lacking = sorted((REQUIRED & content["settings"].keys()) - fields.keys())
            if lacking:
                raise SpecError(f"experiments/{paper}.yaml: settings.{lacking[0]}: no value for profile {profile}")
            words = [group, label, split, *(f"{k.split('.')[-1]}-{v}" for k, v in chosen.items()), f"seed{seed}"]
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words))
            labels = dict(paper=paper, profile=profile, name=name, group=group, label=label, split=split)
            partition = parts | {"seed": parts["seed"] + seed}
            try:
                yield Spec.from_dict(fields | labels | {"hyper": hyper, "partition": partition, "seed": seed})
            except SpecError as error:
                raise SpecError(f"{where}: {error}") from None
