"""The runs that an experiment file asks for: every combination, its name, and what cannot be meant or computed."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from common import ROOT
from projects import HERE, MAIN, MASKED, Edit, cut, objection, put, write

from fedlib.claims import published
from fedlib.errors import SpecError
from fedlib.runs import validation
from fedlib.runs.experiments import papers, profiles, specs
from fedlib.runs.spec import Spec


def runs_of(root: Path, **main_group: Any) -> list[Spec]:
    write(root, **main_group)
    return specs("tiny", "smoke", root=root)


def test_every_combination_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = runs_of(
        tmp_path,
        methods=["plain", "masked"],
        partitions=["iid", "skew"],
        seeds=[0, 3],
        grid={"lr": [0.5, 0.25], "batch": [8]},
    )
    assert [spec.name for spec in found] == [
        f"main_{label}_{split}_lr-{lr}_batch-8_seed{seed}"
        for split in ("iid", "skew")
        for label in ("plain", "masked")
        for lr in (0.5, 0.25)
        for seed in (0, 3)
    ]
    last = found[-1]
    assert (last.label, last.split, last.method, last.lr, last.batch, last.seed) == (
        *("masked", "skew", "fedmrn"),
        *(0.25, 8, 3),
    )
    assert last.hyper == MASKED and last.partition == {"kind": "dirichlet", "beta": 0.3, "seed": 3}
    assert found[0].partition == {"kind": "iid", "seed": 5}
    assert len({spec.key() for spec in found}) == 16


def test_without_axes_names_are_as_before(tmp_path: Path) -> None:
    (spec,) = runs_of(tmp_path)
    assert spec.name == "main_plain_iid_seed0" and (spec.lr, spec.batch) == (0.1, 64)
    assert runs_of(tmp_path, grid={}) == [spec]


def test_an_axis_of_the_method_s_own_settings(tmp_path: Path) -> None:
    found = runs_of(tmp_path, methods=["masked"], grid={"hyper.masking": ["sm", "pm"], "hyper.magnitude": [0.1, 1]})
    assert [spec.name for spec in found] == [
        f"main_masked_iid_masking-{masking}_magnitude-{size}_seed0" for masking in ("sm", "pm") for size in (0.1, 1)
    ]
    assert [spec.hyper for spec in found] == [
        MASKED | {"masking": masking, "magnitude": size} for masking in ("sm", "pm") for size in (0.1, 1)
    ]
    assert {spec.lr for spec in found} == {0.2}


def test_a_group_s_own_settings_and_its_axes_come_before_the_file_s(tmp_path: Path) -> None:
    found = runs_of(
        tmp_path, settings={"rounds": 7, "batch": 3}, grid={"batch": [4, 5], "method": ["fedavg", "signsgd"]}
    )
    assert {spec.rounds for spec in found} == {7}
    assert [(spec.batch, spec.method) for spec in found] == [
        *((4, "fedavg"), (4, "signsgd")),
        *((5, "fedavg"), (5, "signsgd")),
    ]


def test_a_method_by_another_label(tmp_path: Path) -> None:
    """The label tells groups' methods together, and is what a claim names; the settings are the key's."""
    first, second, third = runs_of(tmp_path, methods=["plain", {"other": "masked"}, {"third": "plain"}])
    assert [spec.label for spec in (first, second, third)] == ["plain", "other", "third"]
    assert second.name == "main_other_iid_seed0"
    assert (second.method, second.lr, second.hyper) == ("fedmrn", 0.2, MASKED)
    assert (third.method, third.hyper) == ("fedavg", {})


def test_a_name_that_is_an_integer_in_one_axis_and_a_float_in_another_run(tmp_path: Path) -> None:
    assert [spec.name for spec in runs_of(tmp_path, grid={"lr": [1, 0.1]})] == [
        "main_plain_iid_lr-1_seed0",
        "main_plain_iid_lr-0.1_seed0",
    ]


BAD_GROUPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "axis not a list": ({"grid": {"lr": 0.1}}, ["main", "grid.lr", "0.1", "list"]),
    "axis a text": ({"grid": {"hyper.masking": "sm"}}, ["grid.hyper.masking", "'sm'", "list"]),
    "axes not a mapping": ({"grid": ["lr"]}, ["main.grid", "['lr']", "mapping"]),
    "no axes": ({"grid": None}, ["main.grid", "None", "mapping"]),
    "unknown field": ({"grid": {"rate": [0.1]}}, ["'rate'", "lr"]),
    "unknown field of the method": ({"grid": {"hyper.masking": ["sm"]}}, ["hyper", "'masking'", "none"]),
    "field of no part": ({"grid": {"partition.beta": [0.1]}}, ["partition.beta"]),
    "value out of range": ({"grid": {"lr": [0.1, -1]}}, ["lr", "-1"]),
    "value of the method out of range": (
        {"methods": ["masked"], "grid": {"hyper.noise": ["gauss", "laplace"]}},
        ["hyper.noise", "'laplace'", "gauss"],
    ),
    "value a list": ({"grid": {"lr": [[0.1]]}}, ["lr", "[0.1]"]),
    "axis without values": ({"grid": {"lr": []}}, ["matches no run"]),
    "axis a number": ({"grid": {1: [2]}}, ["1"]),
    "unknown method": ({"methods": ["plane"]}, ["methods", "'plane'", "plain"]),
    "unknown method behind a label": ({"methods": [{"x": "plane"}]}, ["methods", "'plane'", "plain"]),
    "label of many": ({"methods": [{"x": ["plain"]}]}, ["methods", "['plain']"]),
    "label of none": ({"methods": [{}]}, ["methods", "{}"]),
    "two labels": ({"methods": [{"x": "plain", "y": "plain"}]}, ["methods", "'x'"]),
    "label a number": ({"methods": [{1: "plain"}]}, ["methods", "1"]),
    "label a path": ({"methods": [{"../x": "plain"}]}, ["methods", "../x"]),
    "label with a folder": ({"methods": [{"a/b": "plain"}]}, ["methods", "a/b"]),
    # Two runs of one name would write one record, which is then stale for one of them for ever.
    "value twice": ({"grid": {"lr": [0.1, 0.1]}}, ["main_plain_iid_lr-0.1_seed0"]),
    "seed twice": ({"seeds": [0, 1, 0]}, ["main_plain_iid_seed0"]),
    "label twice": ({"methods": ["plain", {"plain": "masked"}]}, ["main_plain_iid_seed0"]),
    # These are made from what the group says besides; an axis of them would change the name and nothing else.
    **{
        f"axis without effect: {name}": ({"grid": {name: values}}, [name])
        for name, values in {
            "seed": [5, 6],
            "label": ["x", "y"],
            "split": ["x"],
            "name": ["x"],
            "group": ["x"],
            "paper": ["x"],
            "profile": ["lab"],
            "partition": [{"kind": "resampled", "size": 40}],
            "hyper": [{"mask": "signed"}],
        }.items()
    },
}


@pytest.mark.parametrize("group, words", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_a_group_that_cannot_be_is_named(tmp_path: Path, group: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        runs_of(tmp_path, **group)
    assert [word for word in words if word not in str(error.value)] == []


# Files: unknown, missing or misplaced keys, and what cannot be computed


UNKNOWN_KEYS: list[tuple[Edit, list[str]]] = [
    (put("titles", {}), ["tiny.yaml", "'titles'", "profiles, settings"]),
    (put("settings/rounds/units", "x"), ["settings.rounds", "'units'", "unit"]),
    (put("profiles/huge", {}), ["profiles", "'huge'", "lab, night, paper, smoke"]),
    (put(f"{MAIN}/seed", 1), ["profiles.smoke.main", "'seed'", "seeds"]),
    (put(f"{HERE}/round", 1), ["settings", "'round'", "rounds"]),
    (put(f"{MAIN}/methods", ["fedavgg"]), ["methods", "'fedavgg'", "allowed: ", "plain"]),
    (put(f"{MAIN}/partitions", ["dir"]), ["partitions", "'dir'", "allowed: ", "skew"]),
    (put("methods/plain/dampening", 0.9), ["'dampening'", "allowed: ", "lr"]),
    (put("methods/plain/hyper", {"mask": "binary"}), ["hyper", "mask", "allowed: none"]),
    (put("methods/masked/hyper/masks", 1), ["hyper", "masks", "mask", "noise", "magnitude"]),
    (put("partitions/iid/beta", 0.3), ["partition", "iid", "beta"]),
    (put("partitions/iid", {"kind": "dirichlet"}), ["tiny.yaml: partitions.iid.beta not given"]),
    (cut("methods/plain/lr"), ["lr", "not given"]),
    (cut("methods/plain/hyper"), ["hyper"]),
    (put("settings", {}), ["settings", "unknown key"]),
    (cut("partitions/iid/kind"), ["partition", "kind"]),
    (cut("settings"), ["tiny.yaml", "settings"]),
    (cut("profiles"), ["tiny.yaml", "profiles"]),
    (cut(f"{MAIN}/seeds"), ["seeds"]),
    (cut(f"{MAIN}/methods"), ["methods"]),
    (put("settings/rounds", 3), ["settings.rounds", "3", "mapping"]),
    (put("methods/plain", "fedavg"), ["methods", "fedavg"]),
    (put("partitions/iid", "iid"), ["partition", "iid"]),
    (put("profiles/smoke", None), ["smoke"]),
    (put(MAIN, None), ["profiles.smoke.main", "None"]),
]
IMPOSSIBLE: list[tuple[Edit, list[str]]] = [
    (put(f"{HERE}/cohort", 11), ["cohort: 11", "clients: 10"]),
    (put("profiles/smoke", {}), ["experiments/tiny.yaml: profiles.smoke: no runs"]),
    (cut("settings/epochs/smoke"), ["experiments/tiny.yaml: settings.epochs: no value for profile smoke"]),
    (put(f"{HERE}/model", "cnn4"), ["cnn4", "8"]),  # four poolings of 8 x 8 pixels leave none
]


@pytest.mark.parametrize(
    "change, words", UNKNOWN_KEYS + IMPOSSIBLE, ids=[" ".join(words) for _, words in UNKNOWN_KEYS + IMPOSSIBLE]
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, change: Edit, words: list[str]) -> None:
    said = objection(tmp_path, change)
    assert [word for word in words if word not in said] == [], said


def test_more_labels_than_can_be_dealt_out(tmp_path: Path) -> None:
    few = put("partitions/iid", {"kind": "labels", "count": 2}), put(f"{HERE}/clients", 3)
    assert "leave class 6 to nobody" in objection(tmp_path, *few)


@pytest.mark.parametrize("beta", [1e-6, math.inf])
def test_a_dirichlet_draw_that_never_comes_ends(tmp_path: Path, beta: float) -> None:
    said = objection(tmp_path, put("partitions/iid", {"kind": "dirichlet", "beta": beta}))
    assert "partition" in said and ("1,000 tries" in said or "beta" in said)


@pytest.mark.parametrize("text", ["settings: [1", "", "- a list", "settings: {a: b}\n\tx"])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "experiments" / "tiny.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"^experiments/tiny\.yaml"):
        specs("tiny", "smoke", root=tmp_path)


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("  lab:\n    main:", "  lab:\n    main: {methods: [], partitions: [], seeds: []}\n    main:", "main"),
        ("partitions:", "partitions:\n  iid: {kind: iid}", "iid"),
        ("methods:", "methods:\n  fedavg: {method: fedavg, hyper: {}}", "fedavg"),
        ("  lr: {", "  lr: {unit: x, ", "unit"),
    ],
)
def test_a_key_given_twice_is_named_with_its_line(tmp_path: Path, old: str, new: str, key: str) -> None:
    real = (ROOT / "experiments" / "feddq.yaml").read_text()
    text, count = re.subn(f"^{old}", new, real, count=1, flags=re.MULTILINE)
    assert count == 1
    write(tmp_path)
    (tmp_path / "experiments" / "feddq.yaml").write_text(text)
    with pytest.raises(SpecError, match=rf"^experiments/feddq\.yaml: line \d+: '{key}' is given twice") as error:
        specs("feddq", "smoke", root=tmp_path)
    (line,) = re.findall(r"line (\d+)", str(error.value))
    assert key in text.splitlines()[int(line) - 1]


def test_a_key_that_is_merged_in_may_be_given_again(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("payload: &a {b: {c: 1}}\nclaims: []\npaper: {title: t, citation: c, read: r}\n")
    assert validation.read(file, published.Published)["payload"] == {"b": {"c": 1}}
    file.write_text(file.read_text().replace("{c: 1}}", "&b {c: 1}, d: {<<: *b, c: 2}}"))
    assert validation.read(file, published.Published)["payload"]["d"] == {"c": 2}


NO_NAMES: list[tuple[Any, str]] = [
    *[(value, f"{value} must be text; put it in quotes") for value in (2026, 0.3, True)],
    (None, "None must be text"),
    *[(name, "must be made of letters, digits") for name in ("../x", "a/b", "", ".hidden", "Größe", "a b", "a\n")],
    ("x" * 121, "at most 120"),
]


@pytest.mark.parametrize("name, words", NO_NAMES, ids=[repr(name)[:20] for name, _ in NO_NAMES])
@pytest.mark.parametrize("folder", ["methods", "partitions", "profiles/smoke"])
def test_no_name(tmp_path: Path, folder: str, name: Any, words: str) -> None:
    def change(content: dict[Any, Any]) -> None:
        for step in folder.split("/"):
            content = content[step]
        content[name] = next(iter(content.values()))

    said = objection(tmp_path, change)
    assert words in said and folder.replace("/", ".") in said


def test_names_of_the_real_grids_are_unique_and_legal_everywhere() -> None:
    for paper in papers():
        for profile in profiles(paper):
            names = [spec.name for spec in specs(paper, profile)]
            assert len({name.lower() for name in names}) == len(names), "also where case does not count"
            assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name) for name in names)
