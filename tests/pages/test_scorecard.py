"""The scorecard of all papers: counts, profiles that have runs, and the records behind a claim."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from common import ROOT

from fedlib.claims import results, score, scorecard
from fedlib.claims.score import Score
from fedlib.claims.verdicts import SUPPORTED, UNTESTED, Finding, Interval
from fedlib.pages.scorecard import card, overview, tell
from fedlib.runs import record
from fedlib.runs.experiments import specs

CLAIM: dict[str, Any] = {
    "id": "traffic",
    "says": "Half the bytes.",
    "source": "Table 1",
    "measure": "upload_ratio",
    "arguments": {"labels": ["new"], "groups": ["main"], "against": ["fedavg"]},
    "unit": "times",
    "quantifier": "mean",
    "at_least": 2,
}
FRESH = pd.DataFrame(
    [
        ("new", "main", "main_new_iid_seed0"),
        ("fedavg", "main", "main_fedavg_iid_seed0"),
        ("fedavg", "other", "other_fedavg_iid_seed0"),
        ("newer", "main", "main_newer_iid_seed0"),
    ],
    columns=["label", "group", "name"],
).assign(state=results.FRESH)


def scored(verdict: str = SUPPORTED, **claim: Any) -> Score:
    case = Interval(2.5, 2.1, 2.9, 3)
    finding = None if verdict == UNTESTED else Finding(verdict, (case,), {"new, main, iid": (case,)}, pd.DataFrame())
    return Score("paper", "lab", CLAIM | claim, verdict, finding, "")


def test_counts_name_every_verdict() -> None:
    assert scorecard.count([scored(), scored(), scored(UNTESTED)]) == {
        "supported": 2,
        "contradicted": 0,
        "undecided": 0,
        "not tested at this scale": 1,
    }


def test_records_behind_a_claim() -> None:
    assert scorecard.evidence(scored(), FRESH, "records/paper/lab") == [
        "records/paper/lab/main_new_iid_seed0.json",
        "records/paper/lab/main_fedavg_iid_seed0.json",
    ]
    assert scorecard.evidence(scored(UNTESTED), FRESH, "records/paper/lab") == []
    timed = scored(measure="step_time", arguments={"networks": ["transformer"]})
    assert scorecard.evidence(timed, FRESH, "records/paper/lab") == ["bench/results"]


def test_the_target_of_a_saving_is_fedavgs() -> None:
    claim: dict[str, Any] = {
        "measure": "saving_to_target",
        "arguments": {"labels": ["new"], "groups": ["main"], "against": ["newer"]},
    }
    names = [Path(name).stem for name in scorecard.evidence(scored(**claim), FRESH, "records")]
    assert names == ["main_new_iid_seed0", "main_fedavg_iid_seed0", "main_newer_iid_seed0"]


def test_profiles_are_those_with_a_record(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    assert scorecard.list_profiles("fedmrn", otherwise="lab", root=tmp_path) == ["lab"]
    record.write(record.path(specs("fedmrn", "night", "tune-*")[0], tmp_path), b"{}")
    assert scorecard.list_profiles("fedmrn", otherwise="lab", root=tmp_path) == ["lab"], "a search reports nothing"
    record.write(record.path(specs("fedmrn", "smoke")[0], tmp_path), b"{}")
    assert scorecard.list_profiles("fedmrn", otherwise="lab", root=tmp_path) == ["smoke"]


@pytest.mark.parametrize("paper", score.scored())
def test_a_card_has_a_row_a_claim_and_its_records_in_the_csv(paper: str) -> None:
    content = score.read_published(paper)
    stated = [*content["claims"], *(content.get("observations") or [])]
    numbers = card(paper, "lab").frame
    assert list(numbers["id"]) == [claim["id"] for claim in stated]
    for effect, records, cases in zip(
        numbers["effect (95 % interval)"], numbers["records"], numbers["cases"], strict=True
    ):
        assert (effect == "–") == (records == "") == (cases == "")
    drawn = overview(paper, ["lab"]).frame
    assert list(drawn["claim"]) == [claim["id"] for claim in content["claims"]]
    assert list(drawn["verdict"]) == list(numbers["verdict"][: len(drawn)])


@pytest.mark.parametrize(
    "interval, words",
    [
        (Interval(0.123456, 0.1, 0.2, 3), "0.12 [0.10, 0.20]"),
        (Interval(80.7, 60.1, 101.3, 3), "81 [60, 101]"),
        (Interval(31.5, 31.5, 31.5, 3), "31.5 [31.5, 31.5]"),
        (Interval(1.0, -math.inf, math.inf, 1), "1.00 [-inf, inf]"),
    ],
)
def test_an_effect_is_told_with_the_places_that_its_interval_calls_for(interval: Interval, words: str) -> None:
    assert tell(interval) == words
