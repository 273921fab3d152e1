"""The scorecard of all papers: counts, profiles that have runs, and the records behind a claim."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from common import ROOT

from fedlib.claims import results, score, scorecard
from fedlib.claims.score import Score
from fedlib.pages import tables
from fedlib.runs import record
from fedlib.runs.experiments import specs

CLAIM: dict[str, Any] = {
    "id": "traffic",
    "says": "Half the bytes.",
    "source": "Table 1",
    "measure": "upload_ratio",
    "arguments": {"labels": ["new"], "groups": ["main"], "against": ["fedavg"]},
    "unit": "times",
    "holds": [2, 100],
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


def scored(verdict: str = score.HOLDS, **claim: Any) -> Score:
    values = {} if verdict == score.UNTESTED else {"new, main, iid": [2.0, 2.5, 3.0]}
    return Score("paper", CLAIM | claim, verdict, values, "")


def test_counts_name_every_verdict() -> None:
    assert scorecard.count([scored(), scored(), scored(score.UNTESTED)]) == {
        "holds": 2,
        "holds in part": 0,
        "does not hold": 0,
        "not tested at this scale": 1,
    }


def test_records_behind_a_claim() -> None:
    assert scorecard.evidence(scored(), FRESH, "records/paper/lab") == [
        "records/paper/lab/main_new_iid_seed0.json",
        "records/paper/lab/main_fedavg_iid_seed0.json",
    ]
    assert scorecard.evidence(scored(score.UNTESTED), FRESH, "records/paper/lab") == []
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
    record.write(record.path(specs("fedmrn", "smoke")[0], tmp_path), b"{}")
    assert scorecard.list_profiles("fedmrn", otherwise="lab", root=tmp_path) == ["smoke"]


@pytest.mark.parametrize("paper", score.scored())
def test_a_card_has_a_row_a_claim_and_its_records_in_the_csv(paper: str) -> None:
    claims = score.read_published(paper)["claims"]
    frame = tables.score_card(paper, "lab").frame
    assert list(frame["id"]) == [claim["id"] for claim in claims]
    assert list(tables.verdict_table(paper, ["lab"]).frame["profile lab"]) == list(frame["verdict"].str.lower())
    shown = tables.score_table(score.scores(paper, "lab"), "caption").frame
    assert [*shown.columns, "id", "profile", "records"] == list(frame.columns)
    for measured, files in zip(frame["measured"], frame["records"], strict=True):
        assert (measured == "–") == (files == "")
