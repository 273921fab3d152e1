"""Verdicts on claims: by the criteria of `published/`, never on fewer than three seeds, from fresh records alone."""

import copy
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from common import ROOT
from projects import HERE, MAIN, RUN, Edit, cut, edit, put, write
from ruamel.yaml import YAML

from fedlib.__main__ import main
from fedlib.claims import score
from fedlib.errors import SpecError
from fedlib.runs import record

INFINITE = math.inf


@pytest.mark.parametrize(
    "criterion, band",
    [
        ({"at_least": 0}, (0, INFINITE)),
        ({"at_least": 0, "margin": 2}, (-2, INFINITE)),
        ({"at_most": 1, "margin": 0.5}, (-INFINITE, 1.5)),
        ({"at_least": 1, "at_most": 2, "margin": 1}, (0, 3)),
    ],
)
def test_a_margin_widens_the_band(criterion: dict[str, float], band: tuple[float, float]) -> None:
    found = score.bands(criterion | {"joint": criterion})
    assert [(b.low, b.high) for b in found] == [band, band]


GIVEN = {"labels": ["masked"], "groups": ["main"]}
SAID = {"says": "", "source": "test", "unit": "", "why": "", "quantifier": "all", "at_least": 0, "at_most": 1}
PUBLISHED: dict[str, Any] = {
    "paper": {"title": "t", "citation": "c", "read": "r"},
    "payload": {},
    "claims": [
        {"id": "one-bit", "measure": "bits_per_weight", "arguments": GIVEN | {"part": "mask"}} | SAID,
        {"id": "small-upload", "measure": "upload_ratio", "arguments": GIVEN | {"against": ["plain"]}} | SAID,
    ],
}
BAD: list[tuple[Edit, list[str]]] = [
    (put("claim", []), ["tiny.yaml", "'claim'", "claims"]),
    (cut("claims"), ["published/tiny.yaml", "claims"]),
    (put("claims/0", "one bit"), ["claims", "one bit"]),
    (put("claims/0/tolerance", 1), ["claims", "'tolerance'", "margin"]),
    (put("claims/0/measure", "bits"), ["one-bit", "measure", "'bits'", "bits_per_weight"]),
    *[(cut(f"claims/0/{name}"), ["one-bit", name]) for name in ("quantifier", "unit", "why", "measure", "arguments")],
    (cut("claims/0/id"), ["id"]),
    (put("claims/0/arguments", {"label": []}), ["one-bit", "arguments", "label"]),
    (cut("claims/0/arguments/groups"), ["one-bit", "arguments", "groups", "given"]),
    (put("claims/0/arguments/labels", "plain"), ["one-bit", "labels", "'plain'", "list"]),
    (put("claims/0/arguments/groups", "main"), ["one-bit", "groups", "'main'", "list"]),
    (put("claims/1/arguments/against", "plain"), ["small-upload", "against", "'plain'", "list"]),
    (put("claims/0/quantifier", "most"), ["one-bit", "quantifier", "'most'", "up to"]),
    (put("claims/0/at_least", 2), ["one-bit", "at_least 2 exceeds at_most 1"]),
    (put("claims/0/margin", -1), ["one-bit", "margin", "-1"]),
    (put("claims/0/joint", {"at_least": 0}), ["one-bit", "joint", "measure", "not given"]),
    (put("claims/0/joint", {"measure": "accuracy_gap"}), ["one-bit", "joint", "at_least or at_most must be given"]),
    (put("claims/0/joint", {"measure": "accuracy_gap", "at_least": 0}), ["one-bit", "joint: against", "arguments"]),
    (put("claims/0/needs", {"seeds": 1}), ["one-bit", "needs", "seeds", "1"]),
    (put("claims/0/needs", {"steps": 1}), ["one-bit", "needs", "'steps'", "local_steps"]),
    *[
        (put(f"claims/1/arguments/{name}", ["plane"]), ["small-upload", name, "'plane'"])
        for name in ("labels", "groups", "against")
    ],
    (put("claims/1/id", "one-bit"), ["one-bit", "id", "twice"]),
    (put("observations", [{"id": "one-bit"}]), ["observations", "one-bit", "says", "not given"]),
]


@pytest.mark.parametrize("change, words", BAD, ids=[" ".join(words) for _, words in BAD])
def test_a_bad_published_file(tmp_path: Path, change: Edit, words: list[str]) -> None:
    content = copy.deepcopy(PUBLISHED)
    change(content)
    write(tmp_path, methods=["plain", "masked"])
    (tmp_path / "published").mkdir()
    YAML().dump(content, tmp_path / "published" / "tiny.yaml")
    with pytest.raises(SpecError) as refusal:
        score.read_published("tiny", tmp_path)
    said = str(refusal.value)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("change", [cut("profiles/smoke"), put("profiles/smoke", {})], ids=["absent", "empty"])
def test_a_paper_without_runs_at_a_profile_is_left_out(
    digits: Path, capsys: pytest.CaptureFixture[str], change: Edit
) -> None:
    edit(digits, change)
    assert main(["score", "--profile", "smoke"]) == 0
    assert "fedmrn  left out: it has no runs at profile smoke" in capsys.readouterr().out
    assert {path.parent.name for path in (digits / "scores").rglob("*.json")} == set(score.scored()) - {"fedmrn"}
    assert main(["status", "--profile", "smoke"]) == 0
    said = capsys.readouterr().out
    assert "feddq/smoke/" in said and "fedmrn/smoke/" not in said
    assert score.scores("fedmrn", "lab")


def test_scores_rest_on_fresh_records_alone(digits: Path) -> None:
    edit(digits, put(f"{MAIN}/seeds", [0, 1, 2]))
    edit(digits, put(f"{HERE}/rounds", 1))
    assert main(list(RUN)) == 0
    judged = {s.claim["id"]: s for s in score.scores("fedmrn", "smoke")}
    bits = judged["one-bit"]
    assert bits.verdict == "supported" and bits.finding and bits.finding.effects[0].n == 3
    assert list(bits.finding.cases) == ["fedmrn-binary, main, iid"]
    assert judged["small-upload"].verdict == "", "an observation"
    near = judged["close-to-fedavg"]
    assert near.verdict == "not tested at this scale" and "main: 3 local steps a round, the source has 100" in near.note
    old = digits / "scores" / "fedmrn" / "of-another-day.json"
    record.write(old, b"{}")
    assert main(["score", "--profile", "smoke"]) == 0
    kept = json.loads((digits / "scores" / "fedmrn" / "one-bit.json").read_text())
    assert kept == {"scale": "smoke", "verdict": "supported", "effect": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    assert not old.exists()
    edit(digits, put("methods/fedmrn-binary/lr", 0.2))
    stale = {s.claim["id"]: s for s in score.scores("fedmrn", "smoke")}
    assert (stale["one-bit"].verdict, stale["one-bit"].note) == ("not tested at this scale", "no fresh record")


def test_too_few_seeds_are_named_by_case(digits: Path) -> None:
    assert main(list(RUN)) == 0
    bits = score.scores("fedmrn", "smoke")[0]
    assert bits.verdict == "not tested at this scale"
    assert bits.note == "a verdict needs 3 seeds a case; fewer: fedmrn-binary, main, iid"


def test_a_criterion_younger_than_its_records_decides_nothing(digits: Path) -> None:
    edit(digits, put(f"{MAIN}/seeds", [0, 1, 2]))
    edit(digits, put(f"{HERE}/rounds", 1))
    assert main(list(RUN)) == 0
    git = ["git", "-C", str(digits), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "published"], ["commit", "-qm", "m", "--date", "@4000000000 +0000"]):
        subprocess.run([*git, *command], check=True)
    bits = score.scores("fedmrn", "smoke")[0]
    assert (bits.verdict, bits.note) == ("not tested at this scale", "its criterion is younger than its records")


@pytest.mark.parametrize("paper", score.scored(ROOT))
def test_no_criterion_here_is_younger_than_its_records(paper: str) -> None:
    """As far as Git is there to tell."""
    young = [s.claim["id"] for s in score.scores(paper, "lab", ROOT) if "younger" in s.note]
    assert not young, "train anew what was run before its criterion was committed"
