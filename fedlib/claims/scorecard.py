"""The scorecard of all papers: a paper's claims at each profile that has runs, and how many came out how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedlib.claims import score
from fedlib.claims.score import Score
from fedlib.runs import record
from fedlib.runs.experiments import read_experiments, specs
from fedlib.runs.spec import PROFILES

VERDICTS = (score.HOLDS, score.PART, score.FAILS, score.UNTESTED)


def profiles(paper: str, otherwise: str, root: Path | None = None) -> list[str]:
    """Those at which the paper has a record, fresh or stale; `otherwise` where it has none at all, if planned."""
    planned = read_experiments(paper, root)["profiles"]
    there = [
        p for p in PROFILES if p in planned and any(r for _, r, _ in record.fresh(specs(paper, p, root=root), root))
    ]
    return there or [p for p in (otherwise,) if p in planned]


def counts(results: Sequence[Score]) -> dict[str, int]:
    """How many claims have each verdict, in the order of VERDICTS."""
    found = Counter(s.verdict for s in results)
    return {verdict: found[verdict] for verdict in VERDICTS}


def evidence(result: Score, fresh: Sequence[tuple[str, str, str]], folder: str) -> list[str]:
    """Files that a claim's numbers come from; fresh: label, group and name of the paper's valid records."""
    if not result.values:
        return []
    given = result.claim["arguments"]
    if "groups" not in given:  # measured by a script, not in a run
        return ["bench/results"]
    labels = [*given["labels"], *given.get("against", [])]
    if result.claim["measure"] == "saving_to_target":
        labels.append("fedavg")  # which sets the target
    return [f"{folder}/{name}.json" for label, group, name in fresh if group in given["groups"] and label in labels]
