"""What a search found, whether the reported runs use it, and whether it could be trusted."""

from typing import Any

import pandas as pd
import pytest

from fedlib.claims import tuning

GRID = [0.01, 0.1, 1.0]


def runs(reported: float = 0.1, **accuracies: list[float | None]) -> pd.DataFrame:
    """A search over learning rates for each label (accuracy by rate), and the reported run of each."""
    search, report = (
        {"group": "tune-main", "seed": 100, "validation": 0.1},
        {"group": "main", "seed": 0, "validation": 0.0},
    )
    rows: list[dict[str, Any]] = []
    for label, found in accuracies.items():
        own = {"label": label}
        rows += [own | search | {"lr": lr, "late_accuracy": at} for lr, at in zip(GRID, found, strict=False)]
        rows.append(own | report | {"lr": reported, "late_accuracy": 50.0})
    return pd.DataFrame(rows).astype({"late_accuracy": float})


def test_the_best_mean_wins_and_a_run_that_diverged_never_does() -> None:
    table = runs(a=[60.0, 70.0, 65.0], b=[60.0, 61.0, None])
    found = tuning.take_winners(table, "main").set_index("label")
    assert found["value"].to_dict() == {"a": 0.1, "b": 0.1} and not found["edge"].any()
    assert list(tuning.find_faults(table, "main")) == []
    assert list(tuning.find_faults(table, "other")) == [], "no search, no fault"


def test_a_search_of_two_settings_with_two_seeds() -> None:
    points = [(0.01, 1, [60, 60]), (0.1, 1, [80, 50]), (0.1, 2, [66, 66]), (1.0, 3, [10, 10])]
    rows = [
        {"group": "tune-main-a", "label": "a", "lr": lr, "hyper.x": x, "seed": 100 + i, "late_accuracy": float(value)}
        for lr, x, values in points
        for i, value in enumerate(values)
    ]
    rows.append({"group": "main", "label": "a", "lr": 0.1, "hyper.x": 2, "seed": 0, "late_accuracy": 1.0})
    found = tuning.take_winners(pd.DataFrame(rows), "main")
    assert found[["axis", "value", "edge", "runs"]].to_numpy().tolist() == [
        ["lr", 0.1, False, 8],
        ["hyper.x", 2, False, 8],
    ]


@pytest.mark.parametrize(
    "table, words",
    [
        (runs(a=[60.0, 65.0, 70.0], reported=1.0), "a: lr 1.0 lies at an edge"),
        (runs(a=[60.0, 70.0, 65.0], reported=0.01), "a runs with another lr than its search found (0.1)"),
        (runs(a=[60.0, 70.0, 65.0], b=[60.0, 70.0]), "budgets of the search differ: b has 2 runs"),
        (runs(a=[60.0, 70.0, 65.0]).assign(seed=0), "seed 0 serves the search and the report"),
        (runs(a=[60.0, 70.0, 65.0]).assign(validation=0.0), "judged by the test images"),
        (runs(a=[60.0, 70.0, 65.0], b=[]), "no search was made for b"),
    ],
)
def test_faults_of_a_search(table: pd.DataFrame, words: str) -> None:
    assert any(words in fault for fault in tuning.find_faults(table, "main"))


def saving(target_met_by: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A search of three widths beside FedAvg, whose best is 80 %: 1, 2 and 4 bits in each of two rounds."""
    rows: list[dict[str, Any]] = [{"label": "fedavg", "lr": lr, "run": f"fedavg {lr}"} for lr in GRID]
    rows += [{"label": "a", "lr": 0.1, "hyper.x": x, "run": f"a {x}"} for x in (1, 2, 4)]
    ends = {"fedavg 0.01": 70.0, "fedavg 0.1": 80.0, "fedavg 1.0": 75.0}
    found = pd.DataFrame(rows).assign(group="tune-main", split="iid", seed=100, validation=0.1)
    found["late_accuracy"] = [ends.get(run, 79.5 if run in target_met_by else 79.0) for run in found["run"]]
    courses = [
        {"run": row["run"], "round": n, "accuracy": row["late_accuracy"] - (n == 1), "spent_bits": n * row["hyper.x"]}
        for row in found.to_dict("records")
        for n in (1, 2)
    ]
    more = {"uplink_megabytes": 0.0, "megabytes": 0.0}
    return found.astype({"hyper.x": object}), pd.DataFrame(courses).assign(**more)


@pytest.mark.parametrize("meeting, value", [(["a 1", "a 2", "a 4"], 1), (["a 2", "a 4"], 2), (["a 4"], 4), ([], 1)])
def test_a_search_for_bits_takes_the_cheapest_that_reaches_the_target(meeting: list[str], value: int) -> None:
    """The target is 99 % of 80 %, so 79.5 reaches it in round 2, and 79.0 never. FedAvg is judged by its accuracy."""
    found = tuning.take_winners(*(saving(meeting)[:1]), "main", saving(meeting)[1]).set_index("label")
    assert found["value"].to_dict() == {"fedavg": 0.1, "a": value}
    assert found["edge"].to_dict() == {"fedavg": False, "a": value in (1, 4)}


def test_the_least_that_a_setting_may_be_is_no_edge() -> None:
    points = [(1, 70.0), (2, 60.0), (4, 50.0)]
    rows = [{"hyper.first": x, "hyper.resolution": float(x), "late_accuracy": accuracy} for x, accuracy in points]
    found = pd.DataFrame(rows).assign(group="tune-main", label="a", method="feddq", seed=100)
    edges = tuning.take_winners(found.astype({"hyper.first": object}), "main").set_index("axis")["edge"]
    assert edges.to_dict() == {"hyper.resolution": True, "hyper.first": False}
