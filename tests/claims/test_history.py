"""A criterion must be older than the records that it judges, as Git tells it."""

import subprocess
from pathlib import Path

import pytest

from fedlib.claims import history

CLAIM = """\
claims:
  - {{id: saves, says: "{says}", measure: bits_ratio, at_least: {least}}}
  - {{id: new, measure: final_bits}}
"""


def commit(root: Path, date: str) -> None:
    quiet = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", root, "add", "."], check=True)
    day = f"{date}T12:00:00+00:00"
    subprocess.run(
        ["git", "-C", root, *quiet, "commit", "-qm", "m"],
        check=True,
        env={"GIT_AUTHOR_DATE": day, "GIT_COMMITTER_DATE": day},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A claim with a criterion of 1 March, changed on 3 March, reworded on 5 March; another claim of 1 March."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    file = tmp_path / "published" / "p.yaml"
    file.parent.mkdir()
    for date, says, least in (("2026-03-01", "a", 1), ("2026-03-03", "a", 2), ("2026-03-05", "b", 2)):
        file.write_text(CLAIM.format(says=says, least=least))
        commit(tmp_path, date)
    return tmp_path


def test_a_criterion_dates_from_its_last_change(root: Path) -> None:
    dates = history.date_criteria("p", root)
    assert {claim: date and date.day for claim, date in dates.items()} == {"saves": 3, "new": 1}
    times = {"saves": "2026-03-02T00:00:00+00:00", "new": "2026-03-02T00:00:00+00:00"}
    assert history.name_younger("p", times, root) == ["saves"]
    assert history.name_younger("p", dict.fromkeys(times, "2026-03-04T00:00:00+00:00"), root) == []


def test_a_criterion_that_is_not_committed_is_younger_than_any_record(root: Path) -> None:
    (root / "published" / "p.yaml").write_text(CLAIM.format(says="b", least=3))
    assert history.date_criteria("p", root)["saves"] is None
    assert history.name_younger("p", {"saves": "2027-01-01T00:00:00+00:00"}, root) == ["saves"]


def test_where_history_is_not_there_nothing_is_said(tmp_path: Path, root: Path) -> None:
    other = tmp_path / "no-repository"
    assert history.date_criteria("p", other) == {}
    assert history.date_criteria("absent", root) == {}
    clone = tmp_path / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{root}", clone], check=True)
    assert history.date_criteria("p", clone) == {}
    assert history.name_younger("p", {"saves": "2000-01-01T00:00:00+00:00"}, clone) == []
