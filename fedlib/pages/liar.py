"""The page of one client that lies: what it does to each method, and what rules in the mean's place do against it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from fedlib.claims.results import FRESH, LATE, NOT_RUN, where
from fedlib.claims.verdicts import mean_interval
from fedlib.pages import scorecard
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, draw_point, picture
from fedlib.pages.page import means, tell
from fedlib.pages.tables import Cells, average, deviate, summarize

RULES = {"none": "mean", "clipped": "clipped", "median": "median", "trimmed": "trimmed"}  # by the spec's field `robust`
METHODS = ("fedavg", "fedpm", "feddq", "fedpt", "fedcompress", "fedmrn", "eden")
SIDES = {0: "all honest", 1: "one of ten lies"}  # by the number of attackers
CHANCE = 10.0  # %, of ten classes
NUMBERS = ["label", "robust", "attackers", "seed", LATE]


def take_groups(planned: pd.DataFrame) -> pd.DataFrame:
    """The fresh runs of these groups; one with a liar that has no record diverged, and counts as chance."""
    own = planned[planned["group"].str.startswith(("honest", "liar"))]
    fresh, missing = where(own, state=FRESH), where(own, state=NOT_RUN, attackers=1)
    return pd.concat([fresh, missing.assign(**{LATE: CHANCE})]) if len(fresh) else fresh


def lie_figure(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """Accuracy of each method under each rule, a panel where all are honest and one where one client lies."""
    figure, axes = canvas(2, height=4.2)
    methods = list(runs["label"].unique())
    for ax, (attackers, title) in zip(axes, SIDES.items(), strict=True):
        for index, (rule, told) in enumerate(RULES.items()):
            own = where(runs, robust=rule, attackers=attackers)
            for place, (_, points) in enumerate((m, where(own, label=m)) for m in methods):
                if len(points):
                    x = pd.Series([place + 0.16 * (index - 1.5)])
                    draw_point(ax, x, points[LATE], index, told if not place else "_nolegend_")
        ax.set(title=title, ylim=(0, 100))
        ax.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
        ax.grid(visible=False, axis="x")
    axes[0].set_ylabel("test accuracy (%)")
    add_legend(figure, axes)
    frame = runs[["label", "robust", "attackers", "seed", LATE, "uplink_bytes"]].rename(columns={"label": "method"})
    drops = ", ".join(f"{m} {tell(_fall(runs, m, 'none'), '.0f')}" for m in methods)
    alt = f"Two panels of test accuracy by method and rule. Under the plain mean one liar costs, in points: {drops}."
    how = "Mean over seeds; bars: minimum to maximum. A run that diverged counts as chance, 10 %."
    return picture(figure, alt, f"{caption} {how}", frame, name, where(runs, state=FRESH))


def lie_table(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """A row a method: bytes of an upload; accuracy where all are honest; and by rule where one client lies."""

    def under(rule: str) -> Any:
        return lambda own: _told(where(own, robust=rule, attackers=1))

    cells: Cells = {"bytes an upload": average("upload_bytes"), "all honest": lambda own: _told(_honest(own))}
    cells |= {f"a liar, {told}": under(rule) for rule, told in RULES.items()}
    return summarize(runs, {"label": "method"}, cells, caption, name, runs[NUMBERS])


def price_table(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """A row a method: by how much each rule lies above the mean where nobody lies, seed by seed."""

    def over(rule: str) -> Any:
        return lambda own: scorecard.tell(_gap(where(own, attackers=0), rule)) if len(where(own, robust=rule)) else "–"

    cells: Cells = {told: over(rule) for rule, told in RULES.items() if rule != "none"}
    guarded = where(runs, label=list(where(runs, robust="median")["label"].unique()))
    return summarize(guarded, {"label": "method"}, cells, caption, name, runs[NUMBERS])


def quote_lies(runs: pd.DataFrame) -> dict[str, Any]:
    """By method: accuracy where all are honest (`eden-honest`), with the liar by rule (`eden-median`); its cost."""
    numbers: dict[str, Any] = means(_honest(runs), METHODS, "{}-honest", LATE)
    for label in METHODS:
        own = where(runs, label=label)
        for rule, told in RULES.items():
            numbers[f"{label}-{told}"] = tell(where(own, robust=rule, attackers=1)[LATE].mean())
        numbers[f"{label}-fall"] = tell(_fall(runs, label, "none"), ".0f")
    return numbers


def _honest(own: pd.DataFrame) -> pd.DataFrame:
    return where(own, robust="none", attackers=0)


def _told(own: pd.DataFrame) -> str:
    if own.empty:
        return "–"
    lost = int((own["state"] == NOT_RUN).sum())
    return deviate(LATE)(own) + (f" ({lost} of {len(own)} diverged)" if lost else "")


def _fall(runs: pd.DataFrame, label: str, rule: str) -> float:
    own = where(runs, label=label, robust=rule)
    return float(where(own, attackers=0)[LATE].mean() - where(own, attackers=1)[LATE].mean())


def _gap(own: pd.DataFrame, rule: str) -> Any:
    here, base = (where(own, robust=name).set_index("seed")[LATE] for name in (rule, "none"))
    return mean_interval((here - base).dropna().tolist())
