"""Pareto fronts, bytes to a target, tuning: by hand, and against the definition."""

import itertools
import re
from typing import Any

import pandas as pd
import pytest
from common import ROOT
from hypothesis import given
from hypothesis import strategies as st
from page_records import written

from fedlib.claims import results
from fedlib.claims import tuning as find
from fedlib.claims.results import rounds, runs
from fedlib.claims.verdicts import mean_interval
from fedlib.pages import comparison, targets, tuning
from fedlib.pages.exhibit import Exhibit
from fedlib.pages.page import NOT_RUN
from fedlib.runs import experiments
from fedlib.runs.record import Record


def ran(label: str, accuracies: list[float | None], up: int = 10**6, down: int = 10**6, **fields: Any) -> Record:
    """A record of rounds that each send so many bytes."""
    sizes = {"uplink_bytes": up, "downlink_bytes": down, "paper_bits": 8 * up}
    return written(label, [{"accuracy": a} | sizes for a in accuracies], **{"momentum": 0.0} | fields)


def front_of(points: list[tuple[float, float]]) -> list[int]:
    """Places of the points (MB, accuracy) on the front."""
    frame = pd.DataFrame(points, columns=["megabytes", "late_accuracy"], dtype=float)
    frame = frame.assign(label=frame.index, split="iid", seed=0, uplink_megabytes=0.0)
    return [int(name) for name in comparison.name_front(frame, comparison.BOTH)]


def test_a_front_by_hand() -> None:
    points = [(4.0, 90.0), (1.0, 70.0), (2.0, 70.0), (2.0, 85.0), (3.0, 80.0), (8.0, 90.0), (1.0, 60.0)]
    assert front_of(points) == [1, 3, 0], "what costs more must gain more; of equal costs the better"
    assert front_of([]) == [] and front_of([(1.0, 1.0), (1.0, 1.0)]) == [0]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_a_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = front_of([(float(c), float(g)) for c, g in points])

    def beaten(i: int) -> bool:
        return any((c <= points[i][0] and g >= points[i][1] and (c, g) != points[i]) for c, g in points)

    assert {points[i] for i in front} == {points[i] for i in range(len(points)) if not beaten(i)}
    assert len({points[i] for i in front}) == len(front)
    assert all(points[a] < points[b] for a, b in itertools.pairwise(front))


def test_bytes_until_a_target() -> None:
    r = ran("fedavg", [None, 0.5, None, 0.8], up=2 * 10**6)
    records = [r, ran("fedavg", [0.1, 0.2], seed=1), ran("topk", [0.1])]
    shown = targets.cost_table(runs(records), rounds(records), [50, 51, 81], "targets")
    assert "≥ 3.00 (1 of 2 missed it)" in shown.body and "≥ 5.00 (1 of 2" in shown.body, "missed: the whole run counts"
    assert ">≥ 5.00<" in shown.body and "not reached" in shown.body
    up = shown.frame[shown.frame["way"] == comparison.UP]
    assert list(up["reached"]) == [True, False, True, False, False, False, False, False, False]
    assert list(up["MB"])[:3] == [4.0, 2.0, 8.0]
    assert list(shown.frame[shown.frame["way"] == comparison.BOTH]["MB"])[:3] == [6.0, 4.0, 12.0]


def test_tables_say_what_was_sent() -> None:
    records = [ran("fedavg", [0.9 + s / 100], seed=s, up=4 * 10**6, down=4 * 10**6) for s in (0, 1)]
    records += [ran("topk", [0.8 + s / 100], seed=s, up=10**6, down=4 * 10**6) for s in (0, 1)]
    records += [ran("worse", [0.7], seed=s, up=2 * 10**6, down=4 * 10**6) for s in (0, 1)]
    shown = comparison.result_table(runs(records), "Results.", "results")
    rows = [row.split("</td>") for row in shown.body.split("<tr>")[1:]]
    cells = {row[0].rpartition(">")[2]: [cell.rpartition(">")[2] for cell in row[1:7]] for row in rows}
    assert cells["topk"] == ["80.5 ± 0.7", "-10.0 [-10.0, -10.0]", "1.00", "4.0*", "5.00", "1.6*"]
    assert cells["fedavg"][1] == "–" and cells["worse"][3] == "2.0" and "seeds 0, 1" in shown.caption
    figure = comparison.front_figure(runs(records), "Front.", "front")
    assert "On the front by MB uploaded: topk, fedavg." in figure.body and len(figure.frame) == 6


def test_how_many_seeds_a_difference_takes() -> None:
    """Deviation 1: with t = 2.571 over the root of 6 the half width is 1.05, with 2.447 over that of 7 it is 0.92."""
    gap = mean_interval([-1.0, 0.0, 1.0])
    assert comparison.count_seeds(gap, 1.0) == "7" and comparison.count_seeds(gap, gap.high + 1e-9) == "3"
    assert comparison.count_seeds(mean_interval([1.0]), 1.0) == NOT_RUN


def test_what_tuning_takes() -> None:
    """By hand: two values of a setting at two rates, and a method that has rates alone."""
    points = ((0.3, 1, 0.6), (0.1, 1, 0.7), (0.1, 2, 0.5), (0.3, 2, 0.4))
    planned = runs(
        [
            *(ran("own", [a], group="tune-main-own", lr=lr, seed=100, hyper={"size": size}) for lr, size, a in points),
            *(ran("plain", [a], group="tune-main", lr=lr, seed=100) for lr, a in ((0.1, 0.2), (0.2, 0.8), (0.3, 0.1))),
            ran("plain", [0.9], lr=0.2),
        ]
    )
    shown = tuning.tuning_table(planned, "main", "tuning")
    assert cells(shown) == [
        ["own", "4", "size", "1", "0.1:", "70.0*,", "0.3:", "60.0"],
        ["own", "4", "size", "2", "0.1:", "50.0,", "0.3:", "40.0"],
        ["plain", "3", "–", "0.1:", "20.0,", "0.2:", "80.0*,", "0.3:", "10.0"],
    ]
    assert len(shown.frame) == 7
    assert tuning.list_edges(planned, "main") == ["own (lr 0.1)", "own (size 1)"]
    diverged = planned.assign(late_accuracy=planned["late_accuracy"].where(planned["late_accuracy"] != 70))
    assert "0.1: –, 0.3: 60.0*" in tuning.tuning_table(diverged, "main", "tuning").body


def cells(shown: Exhibit) -> list[list[str]]:
    return [re.sub("<.*?>", " ", row).split() for row in shown.body.split("<tr>")[1:]]


def test_what_a_skew_costs() -> None:
    records = [
        ran("fedavg", [a], split=split, seed=s)
        for split, values in (("iid", (0.9, 0.8)), ("skew", (0.7, 0.7)))
        for s, a in enumerate(values)
    ]
    records.append(ran("topk", [0.5], split="skew"))
    shown = cells(comparison.skew_table(runs(records), "iid", "skew", "skew"))
    assert shown == [["fedavg", "85.0", "±", "7.1", "70.0", "±", "0.0", "15", "[-49,", "79]"]]


def test_pairs_are_what_a_specification_allows() -> None:
    like = experiments.specs("compare", "smoke", "main_fedavg*")[0]
    shown = comparison.pair_table(like, ["fedavg", "fedpt", "fedmrn", "fedpm"], "pairs")
    cells = {row["method"]: row for row in shown.frame.to_dict("records")}
    assert set(cells["fedmrn"].values()) == {"fedmrn", "yes"}
    assert cells["fedavg"]["error feedback"].startswith("True cannot go with fedavg")
    assert "is for methods that train all" in cells["fedpt"]["a part frozen"]
    assert "broadcast of its own" in cells["fedpm"]["sent down by FedDQ"] and cells["fedpm"]["a part frozen"] == "yes"


# The experiment file says what tuning found


def test_the_settings_compared_are_those_that_tuning_took() -> None:
    runs = results.read("compare", "lab")[0]
    if not len(results.where(find.searched(runs, "main"), state=results.FRESH)):
        pytest.skip("no fresh records of tuning")
    faults = list(find.find_faults(runs, "main"))
    assert not faults, faults


def test_combinations_run_at_the_settings_of_their_parts() -> None:
    runs = {s.label: s for s in experiments.specs("compare", "lab", "*dirichlet-0.3_seed0")}
    for label, one in runs.items():
        if one.group != "combine":
            continue
        base = runs[one.method]
        assert one.lr == base.lr and one.momentum == base.momentum and one.method == base.method, label
        assert one.hyper == base.hyper, label


def test_pages_of_no_paper_have_a_folder_of_their_own() -> None:
    root = ROOT
    papers = {path.stem for path in (root / "published").glob("*.yaml")}
    assert {path.stem for path in (root / "notebooks").glob("*.md")} - papers == {
        "compare",
        "combine",
        "one-client-lies",
    }
