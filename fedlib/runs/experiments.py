"""The experiment files, and the runs that they describe; all is checked before anything is computed."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedlib.data.sources import home
from fedlib.errors import SpecError, require_mapping, require_name, require_number
from fedlib.runs.spec import PROFILES, Spec

REQUIRED = {f.name for f in dataclasses.fields(Spec) if f.default is dataclasses.MISSING}
# What an experiment file says of a method: fields of Spec.
METHOD = {"method", "lr", "epochs", "optimizer", "momentum", "persistent", "feedback", "frozen", "downlink", "hyper"}
# What a grid may vary beside "hyper.x": all that is not a label and has no list of its own.
AXES = {
    "method",
    "data",
    "model",
    "clients",
    "cohort",
    "rounds",
    "epochs",
    "batch",
    "lr",
    "sampling",
    "held_out",
    "optimizer",
    "momentum",
    "persistent",
    "feedback",
    "frozen",
    "evaluate_every",
}


def papers(root: Path | None = None) -> list[str]:
    return sorted(path.stem for path in ((root or home()) / "experiments").glob("*.yaml"))


def read_yaml(path: Path, keys: set[str]) -> dict[str, Any]:
    """A YAML file that must be a mapping with exactly these keys; SpecError names file and key."""
    where = f"{path.parent.name}/{path.name}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SpecError(f"{where}: cannot be read: {error}") from error
    require_mapping(where, content, keys)
    missing = sorted(keys - content.keys())
    if missing:
        raise SpecError(f"{where}: {', '.join(missing)} not given")
    return dict(content)


def read_experiments(paper: str, root: Path | None = None) -> dict[str, Any]:
    """The experiment file of a paper: settings with value, unit and source; methods; partitions; profiles."""
    require_name("paper", paper, papers(root))
    path = (root or home()) / "experiments" / f"{paper}.yaml"
    content = read_yaml(path, {"settings", "methods", "partitions", "profiles"})
    for part in ("settings", "methods", "partitions"):
        require_mapping(f"{path.name}: {part}", content[part], content[part])
    for name, setting in content["settings"].items():
        require_mapping(f"{path.name}: settings.{name}", setting, {"unit", "source", *PROFILES})
    for name, method in content["methods"].items():
        require_mapping(f"{path.name}: methods.{name}", method, METHOD | {"paper", "source"})
        hyper = method.get("hyper")
        require_mapping(f"{path.name}: methods.{name}.hyper", hyper, hyper or ())
    for name, parts in content["partitions"].items():
        require_mapping(f"{path.name}: partitions.{name}", parts, parts)
    require_mapping(f"{path.name}: profiles", content["profiles"], PROFILES)
    return content


def specs(paper: str, profile: str, only: str = "*", root: Path | None = None) -> list[Spec]:
    """All runs of one profile of a paper whose name matches the pattern `only`, in the order of the file."""
    require_name("profile", profile, PROFILES)
    content = read_experiments(paper, root)
    groups = content["profiles"].get(profile, {})
    require_mapping(f"experiments/{paper}.yaml: profiles.{profile}", groups, groups)
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


def _grid(paper: str, profile: str, group: str, grid: Any, content: dict[str, Any]) -> Iterator[Spec]:
    """The runs of one group: partitions x methods x every combination of the lists under `grid` x seeds.

    A method is a key of the file's methods, or {label: key} where it goes by another label in this group.
    """
    where = f"experiments/{paper}.yaml: profiles.{profile}.{group}"
    require_mapping(where, grid, {"methods", "partitions", "seeds", "settings", "grid"})
    axes = grid.get("grid", {})
    require_mapping(f"{where}.grid", axes, axes)
    require_mapping(f"{where}.grid", axes, AXES | {axis for axis in axes if str(axis).startswith("hyper.")})
    lists = {name: grid.get(name) for name in ("methods", "partitions", "seeds")}
    for name, values in (lists | {f"grid.{name}": values for name, values in axes.items()}).items():
        if not isinstance(values, list):
            raise SpecError(f"{where}: {name}: {values!r} must be a list")
    own = grid.get("settings", {})
    require_mapping(f"{where}.settings", own, content["settings"])
    settings = {name: s[profile] for name, s in content["settings"].items() if profile in s} | own
    for split, item in itertools.product(grid["partitions"], grid["methods"]):
        require_name(f"{where}.partitions", split, content["partitions"])
        label, entry = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, item)
        require_name(f"{where}.methods", entry, content["methods"])
        if not isinstance(label, str) or not re.fullmatch(r"[\w.-]+", label):
            raise SpecError(f"{where}.methods: {label!r} must be made of letters, digits, '.', '-' and '_'")
        method = {k: v for k, v in content["methods"][entry].items() if k not in ("paper", "source")}
        for *point, seed in itertools.product(*axes.values(), grid["seeds"]):
            require_number("seed", seed, 0, 2**31 - 1, integer=True)
            parts = dict(content["partitions"][split])
            require_number("partition.seed", parts.get("seed", 0), 0, 2**31 - 1, integer=True)
            parts["seed"] = parts.get("seed", 0) + seed
            chosen = dict(zip(axes, point, strict=True))
            hyper = method["hyper"] | {k.removeprefix("hyper."): v for k, v in chosen.items() if "." in k}
            fields = settings | method | {k: v for k, v in chosen.items() if "." not in k}
            lacking = sorted((REQUIRED & content["settings"].keys()) - fields.keys())
            if lacking:
                raise SpecError(f"experiments/{paper}.yaml: settings.{lacking[0]}: no value for profile {profile}")
            name = "_".join(
                [group, label, split, *(f"{k.split('.')[-1]}-{v}" for k, v in chosen.items()), f"seed{seed}"]
            )
            labels = dict(paper=paper, profile=profile, name=name, group=group, label=label, split=split)
            yield Spec.from_dict(fields | labels | {"hyper": hyper, "partition": parts, "seed": seed})
