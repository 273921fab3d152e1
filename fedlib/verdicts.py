"""The scorecard of all papers: a paper's claims at each profile that has runs, and how many came out how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fedlib import figures, record, score
from fedlib.exhibits import Exhibit, table
from fedlib.score import Score
from fedlib.spec import PROFILES, read_experiments, specs

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


def overview(paper: str, at: Sequence[str], root: Path | None = None) -> Exhibit:
    """One row a claim: what is said, and the verdict at each of these profiles."""
    rows = [
        {"claim": row[0].claim["says"]} | {f"profile {at[i]}": s.verdict for i, s in enumerate(row)}
        for row in zip(*(score.scores(paper, profile, root) for profile in at), strict=True)
    ]
    return table(pd.DataFrame(rows), f"Verdicts on {paper}, claim by claim.", f"verdicts-{paper}")


def card(paper: str, profile: str, root: Path | None = None) -> Exhibit:
    """The scores of a paper at a profile. The CSV names the records behind each claim as well, and gives its id."""
    results = score.scores(paper, profile, root)
    shown = figures.score_table(results, f"Claims of {paper} against the records of profile {profile}.")
    found = list(record.fresh(specs(paper, profile, root=root), root))
    fresh = [(spec.label, spec.group, spec.name) for spec, r, reason in found if r is not None and not reason]
    frame = shown.frame.assign(
        id=[s.claim["id"] for s in results],
        profile=profile,
        records=[" ".join(evidence(s, fresh, f"records/{paper}/{profile}")) for s in results],
    )
    return replace(shown, frame=frame, name=f"scorecard-{paper}-{profile}")


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
