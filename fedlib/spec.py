"""The description of a run, and the experiment files it is read from; all is checked before anything is computed."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlib import data, methods, models
from fedlib.data import partition
from fedlib.data.sources import home
from fedlib.errors import SpecError

PROFILES = ("smoke", "lab", "paper")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run, completely: two equal specs give, on a CPU, equal records. Units stand beside the fields."""

    paper: str
    profile: str
    name: str  # file name of the record, made from the labels below
    group: str  # label of the experiment within the paper, e.g. "main"
    label: str  # label of the method with its settings, e.g. "fedmrn-binary"
    split: str  # label of the partition, e.g. "dirichlet-0.3"
    method: str  # key of methods.METHODS
    hyper: dict[str, Any]  # fields of the method's Hyper
    data: str  # key of data.sets.ENTRIES
    model: str  # key of models.MODELS
    partition: dict[str, Any]  # kind, seed and the kind's own parameters
    clients: int  # in total
    cohort: int  # clients drawn per round, uniformly without replacement
    rounds: int
    epochs: int  # local epochs per round
    batch: int  # samples per local step
    lr: float  # local learning rate
    evaluate_every: int  # rounds; the last round is always evaluated
    seed: int

    def __post_init__(self) -> None:
        for field, allowed in (
            ("profile", PROFILES),
            ("method", methods.METHODS),
            ("data", data.sets.ENTRIES),
            ("model", models.MODELS),
        ):
            check_name(field, getattr(self, field), allowed)
        for field in ("clients", "cohort", "rounds", "epochs", "batch", "evaluate_every"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise SpecError(f"{field}: {value!r} must be an integer of at least 1")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise SpecError(f"seed: {self.seed!r} must be an integer from 0 to 4294967295")
        if not (isinstance(self.lr, int | float) and 0 < self.lr < float("inf")):
            raise SpecError(f"lr: {self.lr!r} must be a positive number")
        if self.cohort > self.clients:
            raise SpecError(f"cohort: {self.cohort} exceeds clients: {self.clients}; draw fewer, or have more clients")
        partition.check(**self.partition)
        methods.hyper(self.method, self.hyper)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def key(self) -> str:
        """Canonical text, equal for equal specs."""
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        known = {f.name for f in dataclasses.fields(cls)}
        check_keys("run", values, known)
        missing = sorted(known - values.keys())
        if missing:
            raise SpecError(f"run: {', '.join(missing)} not given")
        return cls(**values)


def check_name(field: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise SpecError(f"{field}: {value!r} is unknown; allowed: {', '.join(sorted(allowed))}")


def check_keys(where: str, given: Any, known: Any) -> None:
    if not isinstance(given, dict):
        raise SpecError(f"{where}: {given!r} must be a mapping")
    for key in given:
        if key not in known:
            raise SpecError(f"{where}: unknown key {key!r}; allowed: {', '.join(sorted(known))}")


def papers(root: Path | None = None) -> list[str]:
    return sorted(path.stem for path in ((root or home()) / "experiments").glob("*.yaml"))


def read_experiments(paper: str, root: Path | None = None) -> dict[str, Any]:
    """The experiment file of a paper: settings with value, unit and source; methods; partitions; profiles."""
    check_name("paper", paper, papers(root))
    path = (root or home()) / "experiments" / f"{paper}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_keys(path.name, content, {"settings", "methods", "partitions", "profiles"})
    for name, setting in content["settings"].items():
        check_keys(f"{path.name}: settings.{name}", setting, {"unit", "paper", "source", *PROFILES})
    check_keys(f"{path.name}: profiles", content["profiles"], PROFILES)
    return content


def specs(paper: str, profile: str, only: str = "*", root: Path | None = None) -> list[Spec]:
    """All runs of one profile of a paper whose name matches the pattern `only`, in the order of the file."""
    check_name("profile", profile, PROFILES)
    content = read_experiments(paper, root)
    found = []
    for group, grid in content["profiles"].get(profile, {}).items():
        where = f"experiments/{paper}.yaml: profiles.{profile}.{group}"
        check_keys(where, grid, {"methods", "partitions", "seeds", "settings"})
        settings = {name: s[profile] for name, s in content["settings"].items() if profile in s}
        check_keys(f"{where}.settings", grid.get("settings", {}), content["settings"])
        settings |= grid.get("settings", {})
        for split in grid["partitions"]:
            check_name(f"{where}.partitions", split, content["partitions"])
            for label in grid["methods"]:
                check_name(f"{where}.methods", label, content["methods"])
                for seed in grid["seeds"]:
                    parts = dict(content["partitions"][split])
                    parts["seed"] = parts.get("seed", 0) + seed
                    name = f"{group}_{label}_{split}_seed{seed}"
                    values = dict(paper=paper, profile=profile, name=name, group=group, label=label, split=split)
                    method = {k: v for k, v in content["methods"][label].items() if k not in ("paper", "source")}
                    run = settings | method | values | {"partition": parts, "seed": seed}
                    if fnmatch.fnmatch(name, only):
                        found.append(Spec.from_dict(run))
    if not found:
        raise SpecError(f"only: {only!r} matches no run of {paper} at profile {profile}")
    return found
