"""The pages that set all methods side by side: numbers for the sentences of compare and combine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.results import FRESH, each, where
from fedlib.pages.comparison import BOTH, UP, name_front, take_tuned
from fedlib.pages.page import NOT_RUN, Page, mean

SKEWED, ALIKE = "dirichlet-0.3", "iid"
COLUMNS = {"up": "uplink_megabytes", "both": "megabytes"}
COMBINED = (
    *("masks-coded", "part-levels", "part-masks", "part-eden", "masks-levels-down", "masks-clusters-down"),
    *("masks-student-down", "part-masks-levels-down", "part-eden-levels-down"),
    *("masks-feedback", "eden-feedback", "topk-feedback", "fedavg", "fedmrn", "fedpt", "feddq", "eden", "topk"),
)


def take_skewed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with skewed clients; all, where the profile has none of these."""
    skewed = where(runs, split=SKEWED)
    return skewed if len(skewed) else runs


def quote_comparison(page: Page, main: pd.DataFrame) -> dict[str, Any]:
    """Fronts, who is ahead in every seed, turns of the benchmark, and rates at an end of their grid."""
    accuracy = main.pivot_table(index="seed", columns="label", values="accuracy", sort=False)
    gaps = accuracy.sub(accuracy["fedavg"], axis=0)[main["label"].unique()]
    ahead = [str(name) for name in gaps if (gaps[name].dropna() > 0).all()]
    behind = [str(name) for name in gaps if (gaps[name].dropna() < 0).all()]
    turns = next(row["time_ratios"] for row in benchmark("compare")["rows"] if row["method"] == "eden")
    edges = []
    for label, own in each(select_tuning(page), "label"):
        done = where(own, state=FRESH)
        if len(done) and take_tuned(done)["lr"] in (own["lr"].min(), own["lr"].max()):
            edges.append(label)
    return {
        "front-up": ", ".join(name_front(main, UP)),
        "front-both": ", ".join(name_front(main, BOTH)),
        "ahead": ", ".join(ahead) or "none",
        "behind": ", ".join(behind) or "none",
        "turn-least": f"{min(turns):.2f}",
        "turn-most": f"{max(turns):.2f}",
        "edge": ", ".join(edges) or "none",
        "parameters": f"{main['parameters'].iloc[0]:,}",
    }


def select_tuning(page: Page) -> pd.DataFrame:
    """All planned runs that search settings, also those that diverged and so have no record."""
    return page.planned[page.planned["group"].str.startswith("tune-")]


def quote_combinations(page: Page, runs: pd.DataFrame) -> dict[str, Any]:
    """Accuracy and savings of each combination and of its parts; runs: group combine, then group main."""
    levels = 8 * runs.get("part.levels", np.nan) / runs["uploads"] / (runs["weights"] + runs["others"])
    counts = {
        run: Counter(client for cohort in own["clients"] for client in cohort) for run, own in each(page.rounds, "run")
    }
    took = [list(counts[run].values()) for run in runs["run"]]
    runs = runs.assign(levels=levels, clients=[len(n) for n in took], again=[sum(k > 1 for k in n) for n in took])
    dense, numbers = where(runs, label="fedavg"), {}
    of = {label: where(runs, label=label) for label in COMBINED}

    def times(label: str, way: str) -> float:
        return float(dense[COLUMNS[way]].mean() / of[label][COLUMNS[way]].mean())

    def tell(value: float, form: str = ".1f") -> str:
        return NOT_RUN if np.isnan(value) else f"{value:{form}}"

    for label in COMBINED:
        numbers[label] = mean(of[label])
        numbers |= {f"{label}-{way}": tell(times(label, way)) for way in COLUMNS}
    coded, packed = (of[label]["uplink_megabytes"].mean() for label in ("masks-coded", "fedmrn"))
    numbers["coding"] = tell(100 * (coded / packed - 1), "+.2f")
    for name, other in (("part-masks", "fedmrn"), ("part-levels", "feddq")):
        numbers[f"{name}-product"] = tell(times("fedpt", "up") * times(other, "up"), ".0f")
    numbers |= {f"{label}-bits": mean(of[label], "levels") for label in ("part-levels", "feddq")}
    numbers |= {name: mean(dense, name, ".0f") for name in ("clients", "again")}
    alone = set(where(runs, group="main")["label"])
    everyone = pd.concat([where(runs, group="main"), where(runs, group="combine")])
    for way, key in ((UP, "up"), (BOTH, "both")):
        front = name_front(everyone, way)
        numbers[f"front-{key}"] = ", ".join(front)
        numbers[f"front-{key}-new"] = ", ".join(name for name in front if name not in alone) or "none"
    return numbers
