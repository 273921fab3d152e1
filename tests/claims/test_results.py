"""Records as tables: a row a run and a row a round, each number where its column's name says."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from common import ROOT

from fedlib.claims import results
from fedlib.runs import record
from fedlib.runs.experiments import specs

Record = dict[str, Any]


def run(seed: int = 0, **hyper: Any) -> Record:
    """Two rounds of two clients; the first is not evaluated, one upload of the second is refused; 10 parameters."""
    rounds: list[Record] = [
        {"round": 1, "accuracy": None, "loss": None, "clients": [3, 5], "refused": []},
        {"round": 2, "accuracy": 0.75, "loss": 0.5, "clients": [4], "refused": [[7, "torn"]]},
    ]
    for entry, sizes in zip(rounds, ((400, 1000, 1600.0), (300, 1200, 800.0)), strict=True):
        entry |= dict(zip(("uplink_bytes", "downlink_bytes", "paper_bits"), sizes, strict=True))
        entry |= {"notes": {"widths": {"a": 8, "b": 4}, "losses": [2.0, 1.0]}, "other_bits": {"entropy": 9.0}}
    final: Record = {
        "accuracy": 0.75,
        "loss": 0.5,
        "uploads": 3,
        "refused": 1,
        "uplink_bytes": 700,
        "downlink_bytes": 2200,
    }
    final |= {"paper_bits": 2400.0, "uplink_parts": {"levels": 500, "refused": 100, "container": 100}}
    final |= {"privacy": {"epsilon": None, "noise_multiplier": 2}}
    spec = {"paper": "p", "profile": "lab", "name": f"x_seed{seed}", "label": "x", "seed": seed, "hyper": hyper}
    made = {"device": "cpu", "seconds": 1.5, "versions": {"torch": "2"}}
    return {"spec": spec, "rounds": rounds, "final": final, "parameters": {"weights": 8, "others": 2}, "made": made}


def test_a_row_a_run() -> None:
    row = results.runs([run()]).iloc[0]
    expected = {"run": "p/lab/x_seed0", "state": results.FRESH, "accuracy": 75.0, "mean_accuracy": 75.0, "loss": 0.5}
    expected |= {"uploads": 3, "downloads": 4, "upload_bytes": 200.0, "measured_bits": 160.0, "bits": 80.0}
    expected |= {"parameters": 10, "weights": 8, "others": 2, "part.levels": 500, "uplink_megabytes": 0.0007}
    expected |= {"megabytes": 0.0029, "privacy.noise_multiplier": 2, "device": "cpu", "torch": "2"}
    expected |= {"first.bits": 80.0, "last.bits": 80.0, "first.uploads": 2, "last.uploads": 1, "last.notes.widths.b": 4}
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_a_row_a_round() -> None:
    table = results.rounds([run()])
    assert table["run"].tolist() == ["p/lab/x_seed0"] * 2 and table["round"].tolist() == [1, 2]
    assert table["accuracy"].isna().tolist() == [True, False] and table["accuracy"].iloc[1] == 75.0
    assert table["uplink_megabytes"].tolist() == [0.0004, 0.0007] and table["megabytes"].tolist() == [0.0014, 0.0029]
    assert table["spent_bits"].tolist() == [1600, 2400] and table["measured_bits"].tolist() == [160, 240]
    assert table["notes.widths.a"].tolist() == [8, 8] and table["other_bits.entropy"].tolist() == [9, 9]
    assert table["notes.losses"].iloc[0] == [2.0, 1.0] and table["clients"].iloc[0] == [3, 5]


def test_settings_keep_their_type_and_have_a_default() -> None:
    table = results.runs([run(0, width=2), run(1)])
    assert table["hyper.width"].tolist() == [2, results.DEFAULT]
    assert results.where(table, {"width": 2})["seed"].tolist() == [0]
    assert results.where(table, seed=[0, 1], label="x")["seed"].tolist() == [0, 1]
    assert len(results.where(table, {"absent": 1})) == 0
    assert list(results.where(table, {"absent": 1})) == list(table), "no row, but all columns"


def test_rounds_beside_their_runs() -> None:
    records = [run(1), run(0)]
    table = results.join_rounds(results.runs(records), results.rounds(records))
    assert table["seed"].tolist() == [1, 1, 0, 0] and table["round"].tolist() == [1, 2, 1, 2]
    assert table["uplink_bytes"].tolist() == [400, 300] * 2, "the round's, not the run's"


def test_states_of_planned_runs(tmp_path: Path) -> None:
    """Fresh, stale and not run; the pattern picks by name."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    assert set(results.read("feddq", "lab", root=tmp_path)[0]["state"]) == {results.NOT_RUN}
    first, second = specs("feddq", "lab", root=tmp_path)[:2]
    for spec in (first, second):
        found = record.load(spec, ROOT)
        assert found
        record.save(found | ({"code": "old"} if spec == second else {}), tmp_path)
    runs, rounds = results.read("feddq", "lab", root=tmp_path)
    states = pd.Series(runs["state"].tolist(), index=runs["name"])
    assert states[first.name] == results.FRESH and states[second.name] == "code has changed"
    assert (states == results.NOT_RUN).sum() == len(states) - 2 and rounds["run"].nunique() == 2
    assert results.read("feddq", "lab", first.name, root=tmp_path)[0]["name"].tolist() == [first.name]
