"""Verdicts on claims: by the criteria of `published/`, never on fewer than three seeds, from fresh records alone."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from projects import HERE, MAIN, RUN, Edit, cut, edit, put, write
from ruamel.yaml import YAML

from fedlib.__main__ import main
from fedlib.claims import benchmarks, score
from fedlib.errors import SpecError

CLAIM = {"holds": [-2, 100], "part": [-5, 100]}
THREE = {"a": [-1.0, 0.0, 1.0], "b": [-1.5, -2.0, -2.5]}


@pytest.mark.parametrize(
    "claim, values, verdict",
    [
        (CLAIM, THREE, "holds"),  # b lies on the bound
        (CLAIM, THREE | {"b": [-2.1, -2.1, -2.1]}, "holds in part"),
        (CLAIM, THREE | {"b": [-5.0, -5.0, -5.0]}, "holds in part"),
        (CLAIM, THREE | {"b": [-5.1, -5.1, -5.1]}, "does not hold"),
        (CLAIM, {"a": [101.0] * 3}, "does not hold"),
        ({"holds": [-2, 100]}, THREE | {"b": [-2.1, -2.1, -2.1]}, "does not hold"),
        (CLAIM, THREE | {"b": [0.0, 0.0]}, "not tested at this scale"),
        (CLAIM, THREE | {"b": []}, "not tested at this scale"),
        (CLAIM, {}, "not tested at this scale"),
        (CLAIM, {"a": [-9.0, 0.0, 9.0, 0.0]}, "holds"),  # the mean is judged
        (CLAIM, {"a": [math.nan, 0.0, 0.0]}, "does not hold"),
    ],
)
def test_verdicts(claim: dict[str, Any], values: benchmarks.Values, verdict: str) -> None:
    found, note = score.judge(claim, values)
    assert found == verdict
    assert (note == "") == (found == "holds")


def test_a_verdict_names_the_cases_that_miss_or_lack_seeds() -> None:
    note = score.judge(CLAIM, THREE | {"b": [-3.0] * 3})[1]
    assert note == "outside -2 to 100: b -3.00"
    assert score.judge(CLAIM, THREE | {"b": [-2.0001] * 3})[1].endswith("b -2.0001"), "as many places as tell it apart"
    note = score.judge(CLAIM, THREE | {"b": [0.0]})[1]
    assert "3 seeds" in note and "b" in note


GIVEN = {"labels": ["masked"], "groups": ["main"]}
SAID = {"says": "", "source": "test", "unit": "", "why": "", "holds": [0, 1]}
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
    (put("claims/0/tolerance", 1), ["claims", "'tolerance'", "holds"]),
    (put("claims/0/measure", "bits"), ["one-bit", "measure", "'bits'", "bits_per_weight"]),
    *[(cut(f"claims/0/{name}"), ["one-bit", name]) for name in ("holds", "unit", "why", "measure", "arguments")],
    (cut("claims/0/id"), ["id"]),
    (put("claims/0/arguments", {"label": []}), ["one-bit", "arguments", "label"]),
    (cut("claims/0/arguments/groups"), ["one-bit", "arguments", "groups", "given"]),
    (put("claims/0/arguments/labels", "plain"), ["one-bit", "labels", "'plain'", "list"]),
    (put("claims/0/arguments/groups", "main"), ["one-bit", "groups", "'main'", "list"]),
    (put("claims/1/arguments/against", "plain"), ["small-upload", "against", "'plain'", "list"]),
    (put("claims/0/holds", 1), ["one-bit", "holds", "1"]),
    (put("claims/0/holds", [2, 1]), ["one-bit", "holds", "[2, 1]"]),
    *[
        (put(f"claims/1/arguments/{name}", ["plane"]), ["small-upload", name, "'plane'"])
        for name in ("labels", "groups", "against")
    ],
    (put("claims/1/id", "one-bit"), ["one-bit", "id", "twice"]),
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
    kept = json.loads((digits / "scores.json").read_text())
    assert kept.keys() == set(score.scored()) - {"fedmrn"}
    assert main(["status", "--profile", "smoke"]) == 0
    said = capsys.readouterr().out
    assert "feddq/smoke/" in said and "fedmrn/smoke/" not in said
    assert score.scores("fedmrn", "lab")


def test_scores_rest_on_fresh_records_alone(digits: Path) -> None:
    edit(digits, put(f"{MAIN}/seeds", [0, 1, 2]))
    edit(digits, put(f"{HERE}/rounds", 1))
    assert main(list(RUN)) == 0
    fresh = {s.claim["id"]: s for s in score.scores("fedmrn", "smoke")}
    assert fresh["one-bit"].verdict == "holds"
    assert {case: len(values) for case, values in fresh["one-bit"].values.items()} == {"fedmrn-binary, main, iid": 3}
    edit(digits, put("methods/fedmrn-binary/lr", 0.2))
    stale = {s.claim["id"]: s for s in score.scores("fedmrn", "smoke")}
    assert stale["one-bit"].verdict == "not tested at this scale"
