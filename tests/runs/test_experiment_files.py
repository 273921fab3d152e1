"""Experiment files: an unknown, missing or misplaced key, and what cannot be computed, are named before any run."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from projects import HERE, MAIN, RUN, Edit, Refused, cut, edit, put

from fedlib.claims import score
from fedlib.runs import validation

UNKNOWN_KEYS: list[tuple[Edit, list[str]]] = [
    (put("titles", {}), ["fedmrn.yaml", "'titles'", "profiles, settings"]),
    (put("settings/rounds/units", "x"), ["settings.rounds", "'units'", "unit"]),
    (put("profiles/huge", {}), ["profiles", "'huge'", "lab, paper, smoke"]),
    (put(f"{MAIN}/seed", 1), ["profiles.smoke.main", "'seed'", "seeds"]),
    (put(f"{HERE}/round", 1), ["settings", "'round'", "rounds"]),
    (put(f"{MAIN}/methods", ["fedavgg"]), ["methods", "'fedavgg'", "allowed: ", "fedavg"]),
    (put(f"{MAIN}/partitions", ["dir"]), ["partitions", "'dir'", "allowed: ", "dirichlet-0.3"]),
    (put("methods/fedavg/dampening", 0.9), ["'dampening'", "allowed: ", "lr"]),
    (put("methods/fedavg/hyper", {"mask": "binary"}), ["hyper", "mask", "allowed: none"]),
    (put("methods/fedmrn-binary/hyper/masks", 1), ["hyper", "masks", "mask", "noise", "magnitude"]),
    (put("partitions/iid/beta", 0.3), ["partition", "iid", "beta"]),
    (put("partitions/iid", {"kind": "dirichlet"}), ["fedmrn.yaml: partitions.iid.beta not given"]),
    (cut("methods/fedavg/lr"), ["lr", "not given"]),
    (cut("methods/fedavg/hyper"), ["hyper"]),
    (put("settings", {}), ["settings", "unknown key"]),
    (cut("partitions/iid/kind"), ["partition", "kind"]),
    (cut("settings"), ["fedmrn.yaml", "settings"]),
    (cut("profiles"), ["fedmrn.yaml", "profiles"]),
    (cut(f"{MAIN}/seeds"), ["seeds"]),
    (cut(f"{MAIN}/methods"), ["methods"]),
    (put("settings/rounds", 3), ["settings.rounds", "3", "mapping"]),
    (put("methods/fedavg", "fedavg"), ["methods", "fedavg"]),
    (put("partitions/iid", "iid"), ["partition", "iid"]),
    (put("profiles/smoke", None), ["smoke"]),
    (put(MAIN, None), ["profiles.smoke.main", "None"]),
]
IMPOSSIBLE: list[tuple[Edit, list[str]]] = [
    (put(f"{HERE}/cohort", 11), ["cohort: 11", "clients: 10"]),
    (put("profiles/smoke", {}), ["experiments/fedmrn.yaml: profiles.smoke: no runs"]),
    (cut("settings/epochs/smoke"), ["experiments/fedmrn.yaml: settings.epochs: no value for profile smoke"]),
    (put(f"{HERE}/model", "cnn4"), ["cnn4", "8"]),  # four poolings of 8 x 8 pixels leave none
]


@pytest.mark.parametrize(
    "change, words", UNKNOWN_KEYS + IMPOSSIBLE, ids=[" ".join(words) for _, words in UNKNOWN_KEYS + IMPOSSIBLE]
)
def test_what_cannot_be_meant_is_named(digits: Path, refused: Refused, change: Edit, words: list[str]) -> None:
    edit(digits, change)
    said = refused(*RUN)
    assert [word for word in words if word not in said] == [], said


def test_more_labels_than_can_be_dealt_out(digits: Path, refused: Refused) -> None:
    edit(digits, put("partitions/iid", {"kind": "labels", "count": 2}))
    edit(digits, put(f"{HERE}/clients", 3))
    assert "leave class 6 to nobody" in refused(*RUN)


@pytest.mark.parametrize("beta", [1e-6, math.inf])
def test_a_dirichlet_draw_that_never_comes_ends(digits: Path, refused: Refused, beta: float) -> None:
    edit(digits, put("partitions/iid", {"kind": "dirichlet", "beta": beta}))
    said = refused(*RUN)
    assert "partition" in said and ("1,000 tries" in said or "beta" in said)


@pytest.mark.parametrize("text", ["settings: [1", "", "- a list", "settings: {a: b}\n\tx"])
def test_a_file_that_cannot_be_read(digits: Path, refused: Refused, text: str) -> None:
    (digits / "experiments" / "fedmrn.yaml").write_text(text)
    assert "fedmrn.yaml" in refused(*RUN)


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("  lab:\n    main:", "  lab:\n    main: {methods: [], partitions: [], seeds: []}\n    main:", "main"),
        ("partitions:", "partitions:\n  iid: {kind: iid}", "iid"),
        ("methods:", "methods:\n  fedavg: {method: fedavg, hyper: {}}", "fedavg"),
        ("  lr: {", "  lr: {unit: x, ", "unit"),
    ],
)
def test_a_key_given_twice_is_named_with_its_line(
    project: Path, refused: Refused, old: str, new: str, key: str
) -> None:
    file = project / "experiments" / "feddq.yaml"
    text, count = re.subn(f"^{old}", new, file.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1
    file.write_text(text)
    said = refused("run", "feddq", "--profile", "smoke")
    line = re.search(rf"experiments/feddq.yaml: line (\d+): '{key}' is given twice", said)
    assert line and key in text.splitlines()[int(line[1]) - 1]


def test_a_key_that_is_merged_in_may_be_given_again(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("payload: &a {b: {c: 1}}\nclaims: []\npaper: {title: t, citation: c, read: r}\n")
    assert validation.read(file, score.Published)["payload"] == {"b": {"c": 1}}
    file.write_text(file.read_text().replace("{c: 1}}", "&b {c: 1}, d: {<<: *b, c: 2}}"))
    assert validation.read(file, score.Published)["payload"]["d"] == {"c": 2}


NO_NAMES: list[tuple[Any, str]] = [
    *[(value, f"{value} must be text; put it in quotes") for value in (2026, 0.3, True)],
    (None, "None must be text"),
    *[(name, "must be made of letters, digits") for name in ("../x", "a/b", "", ".hidden", "Größe", "a b", "a\n")],
    ("x" * 121, "at most 120"),
]


@pytest.mark.parametrize("name, words", NO_NAMES, ids=[repr(name)[:20] for name, _ in NO_NAMES])
@pytest.mark.parametrize("folder", ["methods", "partitions", "profiles/smoke"])
def test_no_name(digits: Path, refused: Refused, folder: str, name: Any, words: str) -> None:
    def change(content: dict[Any, Any]) -> None:
        for step in folder.split("/"):
            content = content[step]
        content[name] = next(iter(content.values()))

    edit(digits, change)
    said = refused(*RUN)
    assert words in said and folder.replace("/", ".") in said
