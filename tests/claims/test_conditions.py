"""Whether runs could decide a claim: local steps, the plateau, room between methods; each against numbers by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedlib.claims import conditions

NEEDS: dict[str, Any] = {"local_steps": None, "plateau": None, "room": None, "reference": "fedavg", "tuned": "accuracy"}
GIVEN = {"labels": ["new"], "groups": ["main"], "against": ["old"]}
# Digits has 1,437 training images: 20 clients hold 71.85, which are 5 batches of 16; twice that in two epochs.
RUN = {"group": "main", "data": "digits", "clients": 20, "epochs": 2, "batch": 16, "validation": 0.0, "held_out": 0.0}


def tables(**late: float) -> dict[str, pd.DataFrame]:
    """A run for each label, with its late accuracy; six evaluated rounds that gain one point each."""
    runs = pd.DataFrame(
        [RUN | {"run": label, "label": label, "seed": 0, "late_accuracy": value} for label, value in late.items()]
    )
    rows = [{"run": run, "round": n, "accuracy": 50.0 + n} for run in late for n in range(6)]
    return {"runs": runs.assign(lr=0.1, accuracy=1.0), "rounds": pd.DataFrame(rows)}


def unmet(found: dict[str, pd.DataFrame], **needs: Any) -> list[str]:
    return list(conditions.find_unmet(NEEDS | needs, GIVEN, found, found["runs"]))


@pytest.mark.parametrize("steps, met", [(10, True), (40, True), (41, False), (2, False), (3, True)])
def test_local_steps_lie_within_a_factor_of_four(steps: int, met: bool) -> None:
    assert (unmet(tables(new=60, fedavg=60), local_steps=steps) == []) == met
    if not met:
        assert unmet(tables(new=60), local_steps=steps) == [f"main: 10 local steps a round, the source has {steps}"]


def test_samples_that_are_set_aside_are_not_trained_on() -> None:
    runs = tables(new=60)["runs"].assign(validation=0.5, held_out=0.5)
    assert conditions.count_local_steps(runs).tolist() == [4.0], "17.96 samples are 2 batches"


@pytest.mark.parametrize("points, met", [(2.0, True), (1.9, False)])
def test_a_plateau_is_the_gain_of_the_last_third(points: float, met: bool) -> None:
    """Rounds 54 and 55 against 52 and 53: two points."""
    assert (unmet(tables(new=60, fedavg=60), plateau=points) == []) == met
    assert unmet(tables(new=60), plateau=points) == [], "no reference, no plateau"


def test_too_few_evaluations_show_no_plateau() -> None:
    found = tables(fedavg=60)
    found["rounds"].loc[1:, "accuracy"] = np.nan
    assert unmet(found, plateau=2.0) == ["main: in the last third fedavg is evaluated too rarely to tell"]


@pytest.mark.parametrize("room, met", [(1.0, True), (1.1, False)])
def test_where_nothing_is_lost_nobody_can_be_faster(room: float, met: bool) -> None:
    assert (unmet(tables(new=60, fedavg=61, old=60), room=room) == []) == met
