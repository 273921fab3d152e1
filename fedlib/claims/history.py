"""Since when a claim has had its criterion, as Git tells it: a criterion must be older than the records it judges."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

CRITERION = ("measure", "arguments", "quantifier", "at_least", "at_most", "margin", "joint", "needs")


def read_criteria(text: str) -> dict[str, Any]:
    """Of each claim in the text of a file in published/, by its id, what decides its verdict; {} if it is none."""
    try:
        content = YAML(typ="safe").load(text)
        claims = content["claims"]
        return {claim["id"]: {key: claim[key] for key in CRITERION if key in claim} for claim in claims}
    except (YAMLError, KeyError, TypeError):
        return {}


def date_criteria(paper: str, root: Path) -> dict[str, datetime | None]:
    """When each claim of today's file got the criterion that it has; None: not committed yet.

    Empty where Git, or the file's whole history, is not there: then nothing can be said.
    """
    name = f"published/{paper}.yaml"
    if _git(root, "rev-parse", "--is-shallow-repository") != "false\n":
        return {}
    log = _git(root, "log", "--format=%H %aI", "--", name)
    if not log:
        return {}
    today = read_criteria((root / name).read_text(encoding="utf-8"))
    since: dict[str, datetime | None] = dict.fromkeys(today)
    open_ones = set(today)
    for line in log.splitlines():  # newest first: a claim is followed back for as long as it is the same
        commit, date = line.split()
        then = read_criteria(_git(root, "show", f"{commit}:{name}") or "")
        open_ones = {claim for claim in open_ones if then.get(claim) == today[claim]}
        since |= dict.fromkeys(open_ones, datetime.fromisoformat(date).astimezone(UTC))
    return since


def name_younger(paper: str, times: Mapping[str, str], root: Path) -> list[str]:
    """The claims whose criterion is younger than the oldest record that it judges; times: of that record, by claim."""
    since = date_criteria(paper, root)
    younger = []
    for claim, time in times.items():
        made = datetime.fromisoformat(time)
        made = made if made.tzinfo else made.replace(tzinfo=UTC)
        if claim in since and (since[claim] or datetime.max.replace(tzinfo=UTC)) > made:
            younger.append(claim)
    return younger


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
