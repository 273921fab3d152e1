"""The scorecard of all papers: a paper's claims at each profile that has runs, and how many came out how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from fedlib.claims.results import FRESH, where
from fedlib.claims.score import Score
from fedlib.claims.verdicts import VERDICTS
from fedlib.runs import record
from fedlib.runs.experiments import profiles, specs
from fedlib.runs.spec import PROFILES, TUNING


def list_profiles(paper: str, otherwise: str, root: Path | None = None) -> list[str]:
    """Those at which the paper has a record, fresh or stale, of more than a search, the largest first; `otherwise`
    where it has none, if planned."""
    planned = profiles(paper, root)

    def has_run(profile: str) -> bool:
        reported = (s for s in specs(paper, profile, root=root) if not s.group.startswith(TUNING))
        return any(record.path(s, root).exists() for s in reported)

    there = [p for p in reversed(PROFILES) if p in planned and has_run(p)]
    return there or [p for p in (otherwise,) if p in planned]


def count(results: Iterable[Score]) -> dict[str, int]:
    """How many claims have each verdict, in the order of VERDICTS."""
    found = Counter(s.verdict for s in results)
    return {verdict: found[verdict] for verdict in VERDICTS}


def evidence(result: Score, runs: pd.DataFrame, folder: str) -> list[str]:
    """Files that a claim's numbers come from, of the paper's `runs`."""
    if not result.finding:
        return []
    given = result.claim["arguments"]
    if "groups" not in given:  # measured by a script, not in a run
        return ["bench/results"]
    labels = [*given["labels"], *given.get("against", [])]
    if result.claim["measure"] == "saving_to_target":
        labels.append("fedavg")  # which sets the target
    own = where(runs, state=FRESH, group=given["groups"], label=labels)
    return [f"{folder}/{name}.json" for name in own["name"]]
