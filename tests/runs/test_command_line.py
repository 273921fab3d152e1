"""The command line: what is wrong is named with what is allowed, the status is 2, and nothing is written."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT
from jobs import MakeSpec
from projects import HERE, MAIN, RUN, Edit, Refused, edit, files, group, put

from fedlib.__main__ import main
from fedlib.claims import results
from fedlib.data import sets, sources
from fedlib.errors import DataError, SpecError
from fedlib.models.registry import MODELS
from fedlib.pages import tables
from fedlib.pages.page import open_page
from fedlib.runs import experiments, fitting, record, rounds
from fedlib.runs.spec import Spec

# Unknown names

SMOKE = ("--profile", "smoke")
UNKNOWN: list[tuple[tuple[str, ...], list[str]]] = [
    *[((command, "fedmrm"), ["paper", "'fedmrm'", "allowed: ", "fedmrn"]) for command in ("run", "page")],
    *[
        ((*command, "--profile", "laptop"), ["profile", "laptop", "smoke", "lab", "paper"])
        for command in (("run", "fedmrn"), ("page", "fedmrn"), ("score",), ("status",))
    ],
    *[(("data", action, "mnist"), ["data", "'mnist'", "fashion-mnist", "digits"]) for action in ("get", "check")],
    ((*RUN, "--only", "*feddq*"), ["only", "'*feddq*'"]),
    (("run", "fedmrn", *SMOKE, "--engine", "cluster"), ["engine", "'cluster'", "allowed: auto"]),
    (("run", "fedmrn", *SMOKE, "--device", "tpu"), ["device", "'tpu'", "allowed: auto"]),
    *[((*RUN, "--engine", "auto", "--processes", value), ["processes", value]) for value in ("-1", "0", "two")],
    (("page", *RUN[1:], "-p", "colour", "red"), ["parameter", "'colour'", "notebooks/fedmrn.md", "profile"]),
    (("page", *RUN[1:], "-p", "profile", "lab"), ["'profile' is given by --profile"]),
]


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize("command, words", UNKNOWN, ids=[" ".join(command) for command, _ in UNKNOWN])
def test_what_is_unknown_is_named(refused: Refused, command: tuple[str, ...], words: list[str]) -> None:
    said = refused(*command)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    "folder, change, command, words",
    [
        ("experiments", put(f"{HERE}/rounds", 0), RUN, "rounds: 0 must be an integer from 1"),
        ("experiments", put(f"{HERE}/model", "cnn4"), RUN, "cnn4"),  # told when its network is built
        ("published", put("claims/0/margin", -1), ("score", "--profile", "smoke"), "margin: -1 must be"),
    ],
    ids=["a run", "a network", "a claim"],
)
def test_what_a_file_asks_for_in_vain(
    digits: Path, refused: Refused, folder: str, change: Edit, command: tuple[str, ...], words: str
) -> None:
    edit(digits, change, folder)
    assert words in refused(*command)


@pytest.mark.parametrize(
    "data, expected",
    [
        ("digits", {"mlp", "pooled4"}),
        ("fashion-mnist", {"mlp", "cnn4", "vanilla"}),
        ("shakespeare", {"transformer"}),
        ("spoken-digits", {"mobilenet-short"}),
    ],
)
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_network_takes_a_data_set_or_is_refused(tiny: MakeSpec, data: str, expected: set[str]) -> None:
    try:
        sources.verify(data)
    except DataError:
        pytest.skip(f"{data} is not here")
    taken = set()
    few = ("transformer", "mobilenet-short", "mlp", "emnist")  # these data sets take long to read
    for model in MODELS if sets.ENTRIES[data].folder == "data" or data == "digits" else few:
        try:
            fitting.check([tiny(model=model, data=data, clients=2, cohort=1)])
            taken.add(model)
        except SpecError as error:
            assert "model" in str(error)
    assert expected <= taken
    assert ("transformer" in taken) == (data == "shakespeare") == (taken == {"transformer"})


def test_a_network_that_does_not_fit_is_refused_before_the_grid(digits: Path, refused: Refused) -> None:
    edit(digits, put(f"{HERE}/model", "transformer"))
    said = refused(*RUN)
    assert "model 'transformer' does not fit data set 'digits' (index out of range" in said


def test_a_folder_that_cannot_be_written_is_named(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a disk that is not mounted."""
    (digits / "records").symlink_to(digits / "nowhere" / "scratch")
    assert main(list(RUN)) == 2
    assert "records/fedmrn" in (said := capsys.readouterr().err) and "cannot be written" in said


def test_a_run_with_a_fault_of_its_own_does_not_end_the_others(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(digits, put(f"{MAIN}/seeds", [0, 1, 2]))
    ordinary = rounds.run

    def faulty(spec: Spec, *arguments: Any, **options: Any) -> Any:
        if spec.seed == 1:
            raise KeyError("gone")
        return ordinary(spec, *arguments, **options)

    monkeypatch.setattr(rounds, "run", faulty)
    assert main(list(RUN)) == 2
    said = capsys.readouterr()
    assert "seed1: KeyError: 'gone'" in said.out and "the others are kept" in said.err
    kept = [path.name for path in (digits / "records").rglob("*.json")]
    assert len(kept) == 4 and not [name for name in kept if "seed1" in name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("command", ["run", "page"])
def test_absent_cuda_is_told_before_the_data_is_missed(refused: Refused, command: str) -> None:
    said = refused(command, "fedmrn", "--profile", "smoke", "--device", "cuda")
    assert "cuda" in said and "data" not in said


@pytest.mark.parametrize("command", [("run", "fedmrn"), ("page", "fedmrn"), ("score",), ("status",), ("labs",)])
def test_outside_a_project(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    command: tuple[str, ...],
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    monkeypatch.setenv("FEDLIB_HOME", str(outside))
    said = refused(*command)
    assert str(outside) in said and "FEDLIB_HOME" in said
    assert files(outside) == {}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_page_that_trains_nothing_and_finds_no_record(refused: Refused) -> None:
    said = refused("page", "combine", "--profile", "smoke")
    assert "notebooks/combine.md: there are no records of compare at profile smoke" in said
    assert "python -m fedlib run compare --profile smoke" in said and "KeyError" not in said
    with pytest.raises(DataError, match="compare at profile lab"):  # which stands in for profile paper
        open_page("compare", "paper", train=False)


# Data


@pytest.mark.parametrize("command", [RUN, ("data", "check", "fashion-mnist")])
def test_missing_data(project: Path, refused: Refused, command: tuple[str, ...]) -> None:
    said = refused(*command)
    for name, expected in sets.ENTRIES["fashion-mnist"].files:
        assert str(project / "data" / name) in said and expected in said
    assert "missing" in said and "python -m fedlib data get fashion-mnist" in said


def test_data_that_a_later_run_needs_is_missed_before_the_first_is_trained(digits: Path, refused: Refused) -> None:
    edit(digits, put("profiles/smoke/later", group(data="fashion-mnist")))
    assert "python -m fedlib data get fashion-mnist" in refused(*RUN)


@pytest.mark.skipif(not (ROOT / "data" / "FashionMNIST").exists(), reason="Fashion-MNIST is not here")
def test_altered_data(project: Path, refused: Refused) -> None:
    shutil.copytree(ROOT / "data", project / "data")
    assert main(["data", "check", "fashion-mnist"]) == 0
    name = "FashionMNIST/raw/t10k-labels-idx1-ubyte"
    file = project / "data" / name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    said = refused(*RUN)
    expected, found = dict(sets.ENTRIES["fashion-mnist"].files)[name], hashlib.sha256(raw).hexdigest()
    assert all(words in said for words in (str(file), expected, found, "python -m fedlib data get fashion-mnist"))
    assert "train-images" not in said


# Records


def status(capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["status", "--profile", "smoke"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if "fedmrn/smoke/" in line]


@pytest.mark.slow
def test_a_stale_record_shows_in_status_and_on_the_page(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(line.startswith("-") and "not run" in line for line in status(capsys))
    assert main(list(RUN)) == 0
    assert [line.split()[0] for line in status(capsys)] == ["fresh", "fresh"]
    edit(digits, put("methods/fedavg/lr", 0.04))
    first, second = status(capsys)
    assert first.startswith("STALE") and "spec differs in lr" in first and "main_fedavg_iid_seed0" in first
    assert second.startswith("fresh")
    exhibit = tables.record_table(results.read("fedmrn", "smoke")[0], "caption")
    assert dict(zip(exhibit.frame["run"], exhibit.frame["state"], strict=True)) == {
        "fedmrn/smoke/main_fedavg_iid_seed0": "STALE: spec differs in lr",
        "fedmrn/smoke/main_fedmrn-binary_iid_seed0": "fresh",
    }
    assert "STALE: spec differs in lr" in exhibit._repr_html_()
    capsys.readouterr()
    assert main(list(RUN)) == 0
    said = capsys.readouterr().out
    assert "2 runs, 1 to train" in said and "(trained: spec differs in lr)" in said
    assert [line.split()[0] for line in status(capsys)] == ["fresh", "fresh"]


def test_an_edited_record_and_a_folder_in_its_place_are_named(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(RUN)) == 0
    first, second = (record.path(spec) for spec in experiments.specs("fedmrn", "smoke"))
    first.write_text(re.sub('"seconds": [0-9.]+', '"seconds": "long"', first.read_text()))
    assert [line.split()[0] for line in status(capsys)] == ["STALE", "fresh"]
    second.unlink()
    second.mkdir()
    assert main(["status", "--profile", "smoke"]) == 2
    assert f"record {second} cannot be read" in capsys.readouterr().err


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize(
    "text", ["", "<<<<<<< HEAD\n{}", '{"format": 1', "[]", "null", "{}", '{"format": 1, "spec": null}']
)
def test_what_is_no_record_is_named(capsys: pytest.CaptureFixture[str], text: str) -> None:
    file = record.path(experiments.specs("fedmrn", "smoke")[0])
    file.parent.mkdir(parents=True)
    file.write_text(text)
    code = main(["status", "--profile", "smoke"])
    shown = capsys.readouterr()
    assert "main_fedavg_iid_seed0" in shown.out + shown.err
    assert code == 2 or shown.out.startswith("STALE")
