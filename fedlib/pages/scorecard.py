"""The scorecard of all papers as tables: the verdicts claim by claim, and the scores of one paper at one profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fedlib.claims import results, score
from fedlib.claims.scorecard import evidence
from fedlib.pages import tables
from fedlib.pages.exhibit import Exhibit, table


def overview(paper: str, at: Sequence[str], root: Path | None = None) -> Exhibit:
    """One row a claim: what is said, and the verdict at each of these profiles."""
    rows = [
        {"claim": row[0].claim["says"]} | {f"profile {at[i]}": s.verdict for i, s in enumerate(row)}
        for row in zip(*(score.scores(paper, profile, root) for profile in at), strict=True)
    ]
    return table(pd.DataFrame(rows), f"Verdicts on {paper}, claim by claim.", f"verdicts-{paper}")


def card(paper: str, profile: str, root: Path | None = None) -> Exhibit:
    """The scores of a paper at a profile. The CSV names the records behind each claim as well, and gives its id."""
    scores = score.scores(paper, profile, root)
    shown = tables.score_table(scores, f"Claims of {paper} against the records of profile {profile}.")
    runs, _ = results.read(paper, profile, root=root)
    frame = shown.frame.assign(
        id=[s.claim["id"] for s in scores],
        profile=profile,
        records=[" ".join(evidence(s, runs, f"records/{paper}/{profile}")) for s in scores],
    )
    return replace(shown, frame=frame, name=f"scorecard-{paper}-{profile}")
