"""The pages compare and combine: methods by what they cost, bytes to a target, and which methods go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.results import MEGABYTE, each, where
from fedlib.errors import SpecError
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, draw_point, picture, scale_by_factors, spread, table
from fedlib.pages.page import Page, means, tell
from fedlib.pages.tables import Cells, average, deviate, summarize, tell_each
from fedlib.pages.tuning import list_edges, select_tuning
from fedlib.runs.spec import Spec

SKEWED, ALIKE = "dirichlet-0.3", "iid"
UP, BOTH = "uploaded", "both ways"
MEGABYTES = {UP: "uplink_megabytes", BOTH: "megabytes"}
COMBINED = (
    *("masks-coded", "part-levels", "part-masks", "part-eden", "masks-levels-down", "masks-clusters-down"),
    *("masks-student-down", "part-masks-levels-down", "part-eden-levels-down"),
    *("masks-feedback", "eden-feedback", "topk-feedback", "fedavg", "fedmrn", "fedpt", "feddq", "eden", "topk"),
)


def take_skewed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with skewed clients; all, where the profile has none of these."""
    skewed = where(runs, split=SKEWED)
    return skewed if len(skewed) else runs


def list_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a run: method, partition, seed, accuracy (%), MB uploaded and both ways."""
    names = {"label": "method", "split": "partition", "seed": "seed", "accuracy": "accuracy"}
    names |= {column: way for way, column in MEGABYTES.items()}
    return runs[list(names)].rename(columns=names)


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
    """Final accuracy against MB, a panel for the way up and one for both; the front of the means drawn through them.

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
        for method, place in front.iterrows() if not combined else ():  # combinations have long names, and lie close
            ax.annotate(method, tuple(place), (-4, 6), textcoords="offset points", ha="right", fontsize="small")
        ax.set(xlabel=f"MB of a run, {way} (logarithmic)")
        scale_by_factors(ax)
        ax.margins(x=0.2)  # room for names
        facts.append(f"On the front by MB {way}: {', '.join(map(str, front.index))}.")
    axes[0].set_ylabel("test accuracy (%)")
    add_legend(figure, axes, 5)
    alt = f"Two scatter plots of final test accuracy against megabytes sent. {' '.join(facts)}"
    how = "Mean over seeds; bars: minimum to maximum over seeds; the line joins what no other method beats."
    return picture(figure, alt, f"{caption} {how}", frame, name, runs)


def result_table(runs: pd.DataFrame, caption: str, name: str, against: str = "fedavg") -> Exhibit:
    """A row a method: accuracy, also less that of `against` seed by seed, MB each way, and how many times less than
    `against` that is, with an asterisk on the front."""
    base = where(runs, label=against).set_index("seed")
    gap = runs["accuracy"] - base["accuracy"].reindex(runs["seed"]).to_numpy()

    def more(own: pd.DataFrame) -> str:
        return spread(own["gap"].dropna()) if own["label"].iloc[0] != against else "–"

    cells: Cells = {"accuracy (%)": deviate("accuracy"), f"over {against} (points)": more}
    for way, column in MEGABYTES.items():
        front, dense = name_front(runs, way), base[column].mean()

        def less(own: pd.DataFrame, column: str = column, dense: float = dense, front: list[str] = front) -> str:
            return f"{dense / own[column].mean():.1f}" + "*" * (own["label"].iloc[0] in front)

        cells |= {f"MB {way}": average(column, ".2f"), f"times less {way}": less}
    caption = f"{caption} An asterisk: on the front."
    return summarize(runs.assign(gap=gap), {"label": "method"}, cells, caption, name, list_costs(runs))


def skew_table(runs: pd.DataFrame, plain: str, skewed: str, name: str) -> Exhibit:
    """A row a method: accuracy on two partitions, and what the skew costs, seed by seed."""

    def lose(own: pd.DataFrame) -> str:
        by_seed = own.pivot_table(index="seed", columns="split", values="accuracy")
        return spread(by_seed[plain] - by_seed[skewed])

    caption = (
        f"Final test accuracy (%) with clients alike ({plain}) and skewed ({skewed}): mean ± sample deviation over "
        "seeds."
    )
    told = tell_each(runs, "split", deviate("accuracy"))
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
    """Fronts, who is ahead in every seed, turns of the benchmark, and rates at an end of their grid."""
    accuracy = main.pivot_table(index="seed", columns="label", values="accuracy", sort=False)
    gaps = accuracy.sub(accuracy["fedavg"], axis=0)[main["label"].unique()]
    ahead = [str(name) for name in gaps if (gaps[name].dropna() > 0).all()]
    behind = [str(name) for name in gaps if (gaps[name].dropna() < 0).all()]
    turns = next(row["time_ratios"] for row in benchmark("compare")["rows"] if row["method"] == "eden")
    return {
        "front-up": ", ".join(name_front(main, UP)),
        "front-both": ", ".join(name_front(main, BOTH)),
        "ahead": ", ".join(ahead) or "none",
        "behind": ", ".join(behind) or "none",
        "turn-least": f"{min(turns):.2f}",
        "turn-most": f"{max(turns):.2f}",
        "edge": ", ".join(list_edges(select_tuning(page))) or "none",
        "parameters": f"{main['parameters'].iloc[0]:,}",
    }


def quote_combinations(page: Page, runs: pd.DataFrame) -> dict[str, Any]:
    """Accuracy and savings of each combination and of its parts; runs: group combine, then group main."""
    levels = 8 * runs.get("part.levels", np.nan) / runs["uploads"] / (runs["weights"] + runs["others"])
    sent = runs.groupby("label")[list(MEGABYTES.values())].mean().reindex(COMBINED)
    times = sent.loc["fedavg"] / sent
    numbers = means(runs, COMBINED)
    coded, packed = sent.loc[["masks-coded", "fedmrn"], "uplink_megabytes"]
    numbers["coding"] = tell(100 * (coded / packed - 1), "+.2f")
    for name, other in (("part-masks", "fedmrn"), ("part-levels", "feddq")):
        numbers[f"{name}-product"] = tell(times.loc[["fedpt", other], "uplink_megabytes"].prod(skipna=False), ".0f")
    numbers |= means(runs.assign(levels=levels), ("part-levels", "feddq"), "{}-bits", "levels")
    dense = page.rounds[page.rounds["run"].isin(where(runs, label="fedavg")["run"])]
    times_drawn = dense.explode("clients").groupby("run")["clients"].value_counts()
    numbers["clients"] = tell(times_drawn.groupby("run").size().mean(), ".0f")
    numbers["again"] = tell((times_drawn > 1).groupby("run").sum().mean(), ".0f")
    alone = set(where(runs, group="main")["label"])
    everyone = pd.concat([where(runs, group="main"), where(runs, group="combine")])
    for way, key in ((UP, "up"), (BOTH, "both")):
        numbers |= {f"{label}-{key}": tell(times.loc[label, MEGABYTES[way]]) for label in COMBINED}
        front = name_front(everyone, way)
        numbers[f"front-{key}"] = ", ".join(front)
        numbers[f"front-{key}-new"] = ", ".join(name for name in front if name not in alone) or "none"
    return numbers
