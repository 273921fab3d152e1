"""The scorecard of all papers as tables: the verdicts claim by claim, and the scores of one paper at one profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fedlib.claims import score
from fedlib.claims.scorecard import evidence
from fedlib.pages import figures
from fedlib.pages.exhibit import Exhibit, table
from fedlib.runs import record
from fedlib.runs.experiments import specs


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
