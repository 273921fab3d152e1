"""The pages compare and combine: methods by what they cost, bytes to a target, and which methods go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.conditions import late_gain
from fedlib.claims.results import LATE, MEGABYTE, each, where
from fedlib.claims.verdicts import Interval, mean_interval
from fedlib.errors import SpecError
from fedlib.pages import scorecard
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, draw_point, picture, scale_by_factors, table
from fedlib.pages.page import NOT_RUN, Page, means, tell
from fedlib.pages.tables import Cells, average, deviate, summarize, tell_each
from fedlib.pages.tuning import list_edges
from fedlib.runs.spec import Spec

SKEWED, ALIKE = "dirichlet-0.3", "iid"
UP, BOTH = "uploaded", "both ways"
MEGABYTES = {UP: "uplink_megabytes", BOTH: "megabytes"}
COMBINED = (
    *("part-levels", "part-masks", "masks-levels-down", "masks-clusters-down", "part-masks-levels-down"),
    *("masks-feedback", "topk-feedback"),
)
PARTS = ("fedavg", "fedmrn", "fedpt", "feddq", "topk")  # what the combinations are made of, and what all are held to


def take_skewed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with skewed clients; all, where the profile has none of these."""
    skewed = where(runs, split=SKEWED)
    return skewed if len(skewed) else runs


def list_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a run: method, partition, seed, accuracy (%, over the last quarter), MB uploaded and both ways."""
    names = {"label": "method", "split": "partition", "seed": "seed", LATE: "accuracy"}
    names |= {column: way for way, column in MEGABYTES.items()}
    return runs[list(names)].rename(columns=names)


def subtract(runs: pd.DataFrame, label: str, against: str, column: str = LATE) -> Interval:
    """How far a method lies above another in a column, paired by seed, with its 95 % interval."""
    own, other = (where(runs, label=name).set_index("seed")[column] for name in (label, against))
    return mean_interval((own - other).dropna().tolist())


def count_seeds(gap: Interval, width: float) -> str:
    """How many seeds it takes for a difference of this spread to be known within `width` on either side."""
    if gap.n < 2:
        return NOT_RUN
    each_way = stats.t.ppf(0.975, np.arange(1, 1000)) / np.sqrt(np.arange(2, 1001))  # by the seeds, from 2
    deviation = (gap.high - gap.mean) / each_way[gap.n - 2]
    return str(2 + int(np.argmax(each_way * deviation <= width)))


def find_front(runs: pd.DataFrame, way: str) -> pd.DataFrame:
    """Mean accuracy and MB of a way of the methods that no other beats, in ascending order of MB.

    None of the others costs as little or less and is more accurate, or costs less and is as accurate.
    """
    average = list_costs(runs).groupby("method", sort=False)[[way, "accuracy"]].mean()
    average = average.sort_values([way, "accuracy"], ascending=[True, False])
    return average[average["accuracy"] > average["accuracy"].cummax().shift(fill_value=-np.inf)]


def name_front(runs: pd.DataFrame, way: str) -> list[str]:
    """The methods of `find_front`."""
    return [str(name) for name in find_front(runs, way).index]


def front_figure(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """Accuracy against MB, a panel for the way up and one for both; the front of the means drawn through them.

    One partition. Combinations have open marks.
    """
    frame = list_costs(runs)
    combined = set(where(runs, group="combine")["label"])
    figure, axes = canvas(2, height=4.6)
    facts = []
    for ax, way in zip(axes, MEGABYTES, strict=True):
        for index, (method, own) in enumerate(each(frame, "method")):
            draw_point(ax, own[way], own["accuracy"], index, method, filled=method not in combined)
        front = find_front(runs, way)
        ax.plot(front[way], front["accuracy"], color="grey", linewidth=1, zorder=0)
        ax.set(xlabel=f"MB of a run, {way} (logarithmic)")
        scale_by_factors(ax)
        facts.append(f"On the front by MB {way}: {', '.join(map(str, front.index))}.")
    axes[0].set_ylabel("test accuracy (%)")
    add_legend(figure, axes, 5)
    alt = f"Two scatter plots of test accuracy against megabytes sent. {' '.join(facts)}"
    how = "Mean over seeds; bars: minimum to maximum over seeds; the line joins what no other method beats."
    return picture(figure, alt, f"{caption} {how}", frame, name, runs)


def result_table(runs: pd.DataFrame, caption: str, name: str, against: str = "fedavg") -> Exhibit:
    """A row a method: accuracy, also less that of `against` seed by seed, MB each way, and how many times less than
    `against` that is, with an asterisk on the front."""
    base = where(runs, label=against)

    def more(own: pd.DataFrame) -> str:
        label = own["label"].iloc[0]
        return scorecard.tell(subtract(runs, label, against)) if label != against else "–"

    cells: Cells = {"accuracy (%)": deviate(LATE), f"over {against} (points)": more}
    for way, column in MEGABYTES.items():
        front, dense = name_front(runs, way), base[column].mean()

        def less(own: pd.DataFrame, column: str = column, dense: float = dense, front: list[str] = front) -> str:
            return f"{dense / own[column].mean():.1f}" + "*" * (own["label"].iloc[0] in front)

        cells |= {f"MB {way}": average(column, ".2f"), f"times less {way}": less}
    caption = (
        f"{caption} Accuracy: mean ± sample deviation over seeds; over {against}: seed by seed, with the 95 % interval "
        f"of the mean; MB of the whole run; times less: than {against}; an asterisk: on the front."
    )
    return summarize(runs, {"label": "method"}, cells, caption, name, list_costs(runs))


def skew_table(runs: pd.DataFrame, plain: str, skewed: str, name: str) -> Exhibit:
    """A row a method: accuracy on two partitions, and what the skew costs, seed by seed."""

    def lose(own: pd.DataFrame) -> str:
        by_seed = own.pivot_table(index="seed", columns="split", values=LATE)
        return scorecard.tell(mean_interval((by_seed[plain] - by_seed[skewed]).dropna().tolist()))

    caption = (
        f"Test accuracy (%) with clients alike ({plain}) and skewed ({skewed}), mean ± sample deviation over seeds; "
        "what is lost: seed by seed, with its 95 % interval."
    )
    runs = where(runs, label=set(where(runs, split=plain)["label"]))
    told = tell_each(runs, "split", deviate(LATE))
    cells = {plain: told[plain], skewed: told[skewed], "lost by the skew (points)": lose}
    return summarize(runs, {"label": "method"}, cells, caption, name, list_costs(runs))


def work_table(name: str) -> Exhibit:
    """A client's time and memory under each method, over FedAvg's, from the benchmark."""
    made = benchmark("compare")
    rows = [
        {
            "method": row["method"],
            "time, fedavg = 1": f"{row['time_ratio']:.2f}",
            "peak memory, fedavg = 1": f"{row['memory_ratio']:.2f}",
            "time (ms)": f"{row['ms']:.0f}",
            "peak memory (MB)": f"{row['peak_bytes'] / MEGABYTE:.1f}",
        }
        for row in made["rows"]
    ]
    caption = (
        "A client's round, from the bytes that it receives to those that it sends. Times are medians over "
        f"{made['turns']} turns, ratios medians of each turn's ratio. {made['samples']} images; "
        f"{made['cpu']}, one thread."
    )
    return table(pd.DataFrame(rows), caption, name)


WITH: dict[str, dict[str, Any]] = {
    "a part frozen": {"frozen": "emnist/dense1", "model": "emnist-narrow"},
    "sent down by FedDQ": {
        "downlink": {"method": "feddq", "hyper": {"schedule": "fixed", "width": 8, "quantizer": "affine_nearest"}}
    },
    "sent down by FedCompress": {
        "downlink": {"method": "fedcompress", "hyper": {"least": 16, "most": 16, "layers": "all"}}
    },
    "error feedback": {"feedback": True},
}


def pair_table(like: Spec, names: Sequence[str], name: str) -> Exhibit:
    """A row a method, a column what it may be combined with: "yes", or why the specification is refused."""
    rows = []
    for method in names:
        hyper = {"least": 8, "most": 8} if method == "fedcompress" else {}  # which then needs no samples held out
        own = dataclasses.replace(like, method=method, hyper=hyper)
        rows.append({"method": method} | {with_: _refusal(own, change) or "yes" for with_, change in WITH.items()})
    caption = "Which combinations a specification may ask for; else why it is refused."
    return table(pd.DataFrame(rows), caption, name)


def _refusal(own: Spec, change: dict[str, Any]) -> str:
    try:
        dataclasses.replace(own, **change)
    except SpecError as error:
        return str(error).partition(": ")[2].partition(";")[0]  # without field and remedy
    return ""


def quote_comparison(page: Page, main: pd.DataFrame) -> dict[str, Any]:
    """Of each method accuracy, its difference from FedAvg's and how much less it sends; fronts, edges of the search."""
    labels = list(map(str, page.experiments["profiles"]["paper"]["main"]["methods"]))
    numbers = _quote_each(main, labels)
    gaps = {label: subtract(main, label, "fedavg") for label in main["label"].unique() if label != "fedavg"}
    numbers["ahead"] = ", ".join(label for label, gap in gaps.items() if gap.low > 0) or "none"
    numbers["behind"] = ", ".join(label for label, gap in gaps.items() if gap.high < 0) or "none"
    numbers["undecided"] = ", ".join(label for label, gap in gaps.items() if gap.low <= 0 <= gap.high) or "none"
    numbers |= {f"front-{key}": ", ".join(name_front(main, way)) for way, key in ((UP, "up"), (BOTH, "both"))}
    numbers |= means(main.assign(gain=late_gain(main, page.rounds)), labels, "{}-gain", "gain")
    if "fedmrn" in gaps:
        numbers["seeds"] = count_seeds(gaps["fedmrn"], 1.0)
    turns = next(row["time_ratios"] for row in benchmark("compare")["rows"] if row["method"] == "eden")
    numbers |= {name: str(main[name].iloc[0]) for name in ("clients", "rounds")} | {"n": str(main["seed"].nunique())}
    return numbers | {
        "turn-least": f"{min(turns):.2f}",
        "turn-most": f"{max(turns):.2f}",
        "edge": ", ".join(list_edges(page.planned, "main")) or "none",
        "parameters": f"{int(main['parameters'].iloc[0]):,}",
    }


def quote_combinations(page: Page, runs: pd.DataFrame) -> dict[str, Any]:
    """Accuracy and savings of each combination and of its parts; runs: group main, then group combine."""
    labels = (*COMBINED, *PARTS)
    levels = 8 * runs.get("part.levels", np.nan) / runs["uploads"] / (runs["weights"] + runs["others"])
    numbers = _quote_each(runs, labels)
    for label in COMBINED:
        part = "topk" if label.startswith("topk") else "feddq" if label == "part-levels" else "fedmrn"
        numbers[f"{label}-over-part"] = _tell_gap(runs, label, part)
    sent = runs.groupby("label")["uplink_megabytes"].mean().reindex(labels)
    for name, other in (("part-masks", "fedmrn"), ("part-levels", "feddq")):
        numbers[f"{name}-product"] = tell(sent["fedavg"] ** 2 / sent["fedpt"] / sent[other], ".0f")
    numbers |= means(runs.assign(levels=levels), ("part-levels", "feddq"), "{}-bits", "levels")
    alone = set(where(runs, group="main")["label"])
    for way, key in ((UP, "up"), (BOTH, "both")):
        front = name_front(runs, way)
        numbers[f"front-{key}"] = ", ".join(front)
        numbers[f"front-{key}-new"] = ", ".join(name for name in front if name not in alone) or "none"
    return numbers


def _quote_each(runs: pd.DataFrame, labels: Sequence[str]) -> dict[str, Any]:
    """By label: accuracy, what it lies above FedAvg's (`-gap`), times less uploaded (`-up`) and both ways (`-both`)."""
    numbers: dict[str, Any] = means(runs, labels, column=LATE)
    numbers |= {f"{label}-gap": _tell_gap(runs, label, "fedavg") for label in labels}
    for way, key in ((UP, "up"), (BOTH, "both")):
        sent = runs.groupby("label")[MEGABYTES[way]].mean().reindex(["fedavg", *labels])
        numbers |= {f"{label}-{key}": tell(sent["fedavg"].max() / sent[label]) for label in labels if label != "fedavg"}
    return numbers


def _tell_gap(runs: pd.DataFrame, label: str, against: str) -> str:
    gap = subtract(runs, label, against)
    return scorecard.tell(gap) if gap.n else NOT_RUN
