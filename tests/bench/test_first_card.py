"""The script for the first minutes on a GPU works where there is none: cheap stages, and the end of a slow one."""

import json
import subprocess
import sys
from pathlib import Path

import card_rows
import card_stages
import first_card
import pytest
from common import ROOT


def test_two_stages_run_and_are_kept(tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--device", "cpu", "--stages", "draws", "versions"]
    command = [sys.executable, str(ROOT / "bench" / "first_card.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["stage"] for row in summary["stages"]] == ["versions", "draws"], "in the script's order"
    assert all(row["ended"] == "ran" for row in summary["stages"])
    versions, draws = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("versions", "draws"))
    assert versions["versions"]["pydantic"] != "absent"
    assert all(row["as_stored"] for row in draws.values() if "as_stored" in row)
    assert draws["100003 draws"]["equal"] is True
    assert "100003 draws" in (tmp_path / "draws.log").read_text()


def test_a_stage_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(first_card.STAGES, "steps", 0.05)  # before torch is loaded
    row = first_card.child("steps", "cpu", tmp_path)
    assert row["ended"] == "ended at its limit of 0.05 s" and row["rows"] == 0


def test_rows_are_kept_one_by_one_and_a_fault_is_one_of_them(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    rows = card_rows.Rows(target)
    rows.add("first", number=1)
    with rows.attempt("second"):
        raise ValueError("broken")
    assert json.loads(target.read_text()) == {"first": {"number": 1}, "second": {"error": "ValueError: broken"}}


def test_every_stage_is_there() -> None:
    assert card_stages.STAGES.keys() == first_card.STAGES.keys()
    assert sum(first_card.STAGES.values()) <= 9 * 60
