"""Bad input, row by row of section 12 of the design: the wrong thing is named, status 2, and nothing is written."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedlib.__main__ import main
from fedlib.claims import benchmarks, measures, score
from fedlib.core import task
from fedlib.data import sets
from fedlib.engines import in_process
from fedlib.engines.in_process import InProcess, Memories
from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.methods import registry
from fedlib.runs import experiments, record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
Edit = Callable[[dict[str, Any]], Any]

DIGITS = {"data": "digits", "model": "mlp", "clients": 10, "cohort": 3, "rounds": 2, "batch": 64, "evaluate_every": 1}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the real settings, claims and pages, but no data and no records."""
    for folder in ("experiments", "published", "notebooks", "bench/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    in_process.task_of.cache_clear()
    task._load.cache_clear()
    return tmp_path


@pytest.fixture
def digits(home: Path) -> Path:
    """The same, profile smoke cut down to two runs of two rounds on digits."""
    edit(home, lambda content: content["profiles"].update(smoke={"main": grid()}))
    return home


def grid(**settings: Any) -> dict[str, Any]:
    labels = ["fedavg", "fedmrn-binary"]
    return {"methods": labels, "partitions": ["iid"], "seeds": [0], "settings": DIGITS | settings}


def edit(home: Path, change: Edit, folder: str = "experiments") -> None:
    file = home / folder / "fedmrn.yaml"
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard error of a command that must end with status 2 and write nothing."""
    before = files(home)
    try:
        status: Any = main(list(arguments))
    except SystemExit as end:  # argparse
        status = end.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.strip() and "Traceback" not in said
    assert files(home) == before
    return said


RUN = ("run", "fedmrn", "--profile", "smoke", "--engine", "process", "--device", "cpu")


# Unknown names


@pytest.mark.parametrize("command", ["run", "page"])
def test_an_unknown_paper(home: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    said = refused(home, capsys, command, "fedmrm")
    assert all(words in said for words in ("paper", "'fedmrm'", "allowed: ", "fedmrn"))


@pytest.mark.parametrize("command", [("run", "fedmrn"), ("page", "fedmrn"), ("score",), ("status",)])
def test_an_unknown_profile(home: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    said = refused(home, capsys, *command, "--profile", "laptop")
    assert all(words in said for words in ("profile", "laptop", "smoke", "lab", "paper"))


def test_a_pattern_that_matches_no_run(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(digits, capsys, *RUN, "--only", "*feddq*")
    assert "only" in said and "'*feddq*'" in said


@pytest.mark.parametrize("name", ["get", "check"])
def test_an_unknown_data_set(home: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    said = refused(home, capsys, "data", name, "mnist")
    assert all(words in said for words in ("data", "'mnist'", "fashion-mnist", "digits"))


@pytest.mark.parametrize("option, value", [("--engine", "cluster"), ("--device", "tpu")])
def test_an_unknown_engine_or_device(digits: Path, capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    said = refused(digits, capsys, "run", "fedmrn", "--profile", "smoke", option, value)
    assert all(words in said for words in (option[2:], repr(value), "allowed: auto"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("value", ["-1", "0", "two"])
def test_a_number_of_processes_that_cannot_be(digits: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    command = ("run", "fedmrn", "--profile", "smoke", "--device", "cpu", "--engine", "auto", "--processes", value)
    said = refused(digits, capsys, *command)
    assert "processes" in said and value in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("command", ["run", "page"])
def test_cuda_asked_for_and_absent_is_told_before_the_data_is_missed(
    home: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    said = refused(home, capsys, command, "fedmrn", "--profile", "smoke", "--device", "cuda")
    assert "cuda" in said and "data" not in said


def test_a_page_parameter_that_the_notebook_does_not_know(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("page", "fedmrn", "--profile", "smoke", "--engine", "process", "--device", "cpu")
    said = refused(digits, capsys, *command, "-p", "colour", "red")
    assert all(words in said for words in ("parameter", "'colour'", "notebooks/fedmrn.md", "profile"))


# Keys and values of an experiment file


def put(path: str, value: Any) -> Edit:
    """Set one value in the nested mapping; `path` is separated by slashes."""
    *folders, last = path.split("/")

    def change(content: dict[str, Any]) -> None:
        for name in folders:
            content = content[name]
        content[last] = value

    return change


def cut(path: str) -> Edit:
    *folders, last = path.split("/")

    def change(content: dict[str, Any]) -> None:
        for name in folders:
            content = content[name]
        del content[last]

    return change


MAIN = "profiles/smoke/main"
HERE = f"{MAIN}/settings"
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
    (put("partitions/iid", {"kind": "dirichlet"}), ["partition", "dirichlet", "beta"]),
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


@pytest.mark.parametrize("change, words", UNKNOWN_KEYS, ids=[" ".join(words) for _, words in UNKNOWN_KEYS])
def test_an_unknown_missing_or_misplaced_key(
    digits: Path, capsys: pytest.CaptureFixture[str], change: Edit, words: list[str]
) -> None:
    edit(digits, change)
    said = refused(digits, capsys, *RUN)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("text", ["settings: [1", "", "- a list", "settings: {a: b}\n\tx"])
def test_an_experiment_file_that_cannot_be_read(digits: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (digits / "experiments" / "fedmrn.yaml").write_text(text)
    assert "fedmrn.yaml" in refused(digits, capsys, *RUN)


def with_hyper(method: str, **hyper: Any) -> dict[str, Any]:
    return {"method": method, "lr": 0.1, "hyper": hyper}


def private(field: str, value: Any) -> dict[str, Any]:
    """A private method of which one setting, the last, is wrong."""
    return with_hyper("fedpt", **{name: right for name, right in PRIVATE.items() if name != field}, **{field: value})


COUNTS = ("clients", "cohort", "rounds", "epochs", "batch", "evaluate_every")
PRIVATE = {"weighting": "clients", "mechanism": "dp_fedavg", "clip_norm": 0.1, "noise_multiplier": 1.0, "delta": 1e-3}
FEDPT_NAMES = [  # settings of fedpt, and the names that each allows
    ("law", "allowed: glorot he torch"),
    ("optimizer", "allowed: adam sgd yogi"),
    ("weighting", "allowed: clients samples"),
    ("mechanism", "allowed: dp_fedavg dp_ftrl none"),
]
FEDDQ_NAMES = [  # settings of feddq, and the names that each allows
    ("schedule", "allowed: ascending fixed loss range"),
    ("quantizer", "allowed: affine_nearest affine_stochastic buckets norm symmetric_nearest"),
    ("biases", "allowed: kept sent"),
    ("coding", "allowed: entropy packed"),
]
FEDCOMPRESS_NAMES = [  # settings of fedcompress, and the names that each allows
    ("variant", "allowed: code none paper"),
    ("foreign", "allowed: clients leaves noise spectrum stripes"),
    ("norms", "allowed: frozen recalibrate train"),
    ("layers", "allowed: all convolutions"),
    ("augment", "allowed: corner none random"),
]
NAMES = [  # settings of fedpm, and the names that each allows
    ("penalty", "allowed: mean_entropy mean_prob pooled_entropy"),
    ("masking", "allowed: bernoulli threshold top"),
    ("ste", "allowed: identity prob"),
    ("weight_scale", "allowed: critical fedpm kaiming"),
    ("aggregation", "allowed: bayes mean"),
    ("weighting", "allowed: clients samples"),
    ("coding", "allowed: global layers pooled"),
    ("downlink", "allowed: full levels"),
    ("evaluated", "allowed: mean sampled threshold"),
]
VALUES: list[tuple[str, str, Any, str]] = [  # where, field, value, words on what is allowed
    *[(f"{HERE}/{name}", name, value, "integer 1") for name in COUNTS for value in (0, -1, 2.5)],
    *[(f"{HERE}/rounds", "rounds", value, "integer 1") for value in ("ten", True, None, [3])],
    *[("methods/fedavg/lr", "lr", value, "number") for value in (0, -0.1, math.inf, math.nan, "x", None)],
    *[(f"{MAIN}/seeds", "seed", [value], "integer 0") for value in (-1, 2**32, 1.5)],
    (f"{MAIN}/seeds", "seed", ["one"], "integer"),
    (f"{HERE}/data", "data", "mnist", "allowed: cifar10 cifar10-jpeg digits fashion-mnist"),
    (f"{HERE}/model", "model", "resnet", "allowed: cnn2 cnn4 cnn8 mlp"),
    ("methods/fedavg/method", "method", "fedprox", "allowed: fedavg fedmrn"),
    (f"{HERE}/data", "data", ["digits"], "allowed: "),
    ("methods/fedmrn-binary/hyper/mask", "hyper.mask", "ternary", "allowed: binary signed"),
    ("methods/fedmrn-binary/hyper/noise", "hyper.noise", "laplace", "allowed: uniform gauss bernoulli"),
    ("methods/fedmrn-binary/hyper/noise", "hyper.noise", ["gauss"], "allowed: "),
    *[("methods/fedmrn-binary/hyper/magnitude", "hyper.magnitude", v, "1e") for v in (0, -1, 1e7, math.nan)],
    ("methods/fedmrn-binary/hyper/magnitude", "hyper.magnitude", "big", ""),
    *[("methods/fedmrn-binary/hyper/decay", "hyper.decay", v, "number 0.001 1") for v in (0, 1.5, math.nan, "x")],
    *[(f"{HERE}/feedback", "feedback", value, "true false") for value in (1, "yes", None)],
    (f"{HERE}/feedback", "feedback", True, "fedavg use false"),
    ("methods/fedmrn-binary/hyper/masking", "hyper.masking", "before", "allowed: after pm psm sm"),
    ("methods/fedmrn-binary/hyper/weighting", "hyper.weighting", "clients", "allowed: batches samples"),
    ("methods/fedmrn-binary/hyper/coding", "hyper.coding", "zip", "allowed: entropy packed"),
    *[
        (f"methods/fedmrn-binary/hyper/{f}", f"hyper.{f}", None, "allowed: ")
        for f in ("masking", "weighting", "coding")
    ],
    ("methods/fedavg", "hyper.budget", with_hyper("topk", budget="bits"), "allowed: values indices"),
    *[("methods/fedavg", "hyper.keep", with_hyper("fedsparsify", keep=v), "number 0.001 1") for v in (0, 1.5, "x")],
    *[("methods/fedavg", "hyper.density", with_hyper("fedsparsify", density=v), "1e-06 1") for v in (0, 2, math.nan)],
    (f"{MAIN}/grid", "optimizer", {"optimizer": ["adagrad"]}, "allowed: adam sgd"),
    (f"{MAIN}/grid", "optimizer", {"optimizer": [None]}, "allowed: adam sgd"),
    *[(f"{MAIN}/grid", "persistent", {"persistent": [value]}, "true false") for value in (1, "yes", None)],
    (f"{MAIN}/grid", "persistent", {"persistent": [True]}, "needs optimizer adam use false"),
    *[("methods/fedavg", "hyper.lam", with_hyper("fedpm", lam=v), "number 0 1e+06") for v in (-0.1, 1e7, math.nan)],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedpm", **{f: v}), words)
        for f, words in NAMES
        for v in ("x", None)
    ],
    *[("methods/fedavg", "hyper.keep", with_hyper("fedpm", keep=v), "number 1e-06 1") for v in (0, 1.5, "x")],
    *[("methods/fedavg", "hyper.prior", with_hyper("fedpm", prior=v), "number 1 1e+06") for v in (0.5, -1, math.nan)],
    *[("methods/fedavg", "hyper.reset_period", with_hyper("fedpm", reset_period=v), "integer 1") for v in (0, 1.5)],
    *[("methods/fedavg", "hyper.delta", with_hyper("fedpm", delta=v), "number 0.49") for v in (0, 0.5, math.nan)],
    *[("methods/fedavg", "hyper.vote", with_hyper("signvote", vote=v), "allowed: majority mean") for v in ("x", None)],
    *[
        ("methods/fedavg", "hyper.step", with_hyper("signvote", step=v), "number 1e-09 1000")
        for v in (0, 1e4, math.nan)
    ],
    *[(f"{MAIN}/grid", "sampling", {"sampling": [value]}, "allowed: fixed poisson spaced") for value in ("x", None)],
    *[(f"{MAIN}/grid", "frozen", {"frozen": [v]}, "allowed for this network") for v in ("emnist/dense1", "x", None)],
    ("methods/fedavg/downlink", "downlink.method", {"method": "zip"}, "allowed: fedcompress feddq"),
    ("methods/fedavg/downlink", "downlink", "feddq", "mapping"),
    *[("methods/fedavg", "hyper.augment", with_hyper("fedzip", augment=v), "corner none random") for v in ("x", None)],
    *[(f"{MAIN}/grid", "held_out", {"held_out": [value]}, "number 0 0.9") for value in (-0.1, 1, math.nan, "x")],
    *[(f"{MAIN}/grid", "momentum", {"momentum": [value]}, "number 0") for value in (-0.1, 1, math.nan, "x", None)],
    (f"{MAIN}/grid", "momentum", {"optimizer": ["adam"], "momentum": [0.5]}, "optimizer sgd adam"),
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("feddq", **{f: v}), words)
        for f, words in FEDDQ_NAMES
        for v in ("x", None)
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("feddq", **{f: v}), "integer 1")
        for f in ("width", "least", "most", "first")
        for v in (0, 1.5, 70000, None)
    ],
    *[("methods/fedavg", "hyper.resolution", with_hyper("feddq", resolution=v), "number") for v in (0, math.nan, "x")],
    *[("methods/fedavg", "hyper.downlink", with_hyper("feddq", downlink=v), "number") for v in (-1, 1e-13, math.nan)],
    *[("methods/fedavg", "hyper.report", with_hyper("feddq", report=v), "true false") for v in (1, "yes", None)],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedpt", **{f: v}), words)
        for f, words in FEDPT_NAMES
        for v in ("x", None)
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedpt", **{f: v}), "number")
        for f in ("server_lr", "epsilon", "momentum", "beta1", "beta2", "scale")
        for v in (-1, 1e9, math.nan, "x")
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", private(f, v), words)
        for f, words in (("clip_norm", "number"), ("noise_multiplier", "number"), ("delta", ""))
        for v in (-1, 1e10, math.nan, "x")
    ],
    ("methods/fedavg", "hyper.delta", private("delta", 0.5), "below 1 / clients"),
    *[("methods/fedavg", "hyper.correction", with_hyper("fedpt", correction=v), "true false") for v in (1, None)],
    *[
        ("methods/fedavg", "hyper.policy", with_hyper("fedpt", policy=v), "allowed for this network")
        for v in ("emnist/dense1", "all", "random/2", "random/x", None)
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedcompress", **{f: v}), words)
        for f, words in FEDCOMPRESS_NAMES
        for v in ("x", None)
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedcompress", **{f: v}), "integer 1")
        for f in ("images", "distil_epochs", "distil_batch", "clustered_epochs", "step", "window", "patience", "first")
        for v in (0, 1.5, None)
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedcompress", **{f: v}), "number")
        for f in ("distil_lr", "temperature", "clustered_lr", "beta", "decay", "limit")
        for v in (-1, math.nan, "x")
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedcompress", **{f: v}), "integer 2 256")
        for f in ("least", "most")
        for v in (1, 257)
    ],
    ("methods/fedavg", "hyper.most", with_hyper("fedcompress", most=7), "hyper.least: 8 exceeds fewer"),
    ("methods/fedavg", "hyper.images", with_hyper("fedcompress", images=255), "no batch hyper.distil_batch: 256"),
    *[
        ("methods/fedavg", "hyper.compare_every", with_hyper("fedcompress", compare_every=v), "integer 0")
        for v in (-1, 0.5)
    ],
    *[
        ("methods/fedavg", "hyper.self_compression", with_hyper("fedcompress", self_compression=v), "true false")
        for v in (1, None)
    ],
    *[
        ("methods/fedavg", f"hyper.{f}", with_hyper("fedzip", **{f: v}), words)
        for f, words in (("clusters", "integer 2 256"), ("steps", "integer 0 1000"), ("keep", "number 1e-06 1"))
        for v in (-1, 0.5 if f != "keep" else 2, "x")
    ],
    *[("methods/fedavg", "hyper.decay", with_hyper("fedzip", decay=v), "number 0") for v in (-1, math.nan, "x")],
    ("methods/fedavg/hyper", "hyper", None, ""),
    (
        "partitions/iid",
        "partition.kind",
        {"kind": "equal", "seed": 1},
        "allowed: iid dirichlet quota labels natural resampled",
    ),
    *[("partitions/iid", "partition.beta", {"kind": "dirichlet", "beta": v}, "") for v in (0, -1.0, math.nan)],
    ("partitions/iid", "partition.beta", {"kind": "dirichlet", "beta": "x"}, ""),
    ("partitions/iid", "partition.count", {"kind": "labels", "count": 0}, ""),
    ("partitions/iid", "partition.count", {"kind": "labels", "count": 11}, "1 10"),
    ("partitions/iid", "partition.count", {"kind": "labels", "count": 2.5}, "integer"),
    ("partitions/iid", "partition.size", {"kind": "resampled", "size": 0.5}, "integer"),
    ("partitions/iid", "partition.seed", {"kind": "iid", "seed": -5}, ""),
    ("partitions/iid", "partition.seed", {"kind": "iid", "seed": "x"}, ""),
]


@pytest.mark.parametrize("where, field, value, allowed", VALUES, ids=[f"{v[1]}={v[2]}" for v in VALUES])
def test_a_value_out_of_range(
    digits: Path, capsys: pytest.CaptureFixture[str], where: str, field: str, value: Any, allowed: str
) -> None:
    edit(digits, put(where, value))
    said = refused(digits, capsys, *RUN)
    assert field in said
    assert [word for word in allowed.split() if word not in said] == [], said
    plain = value
    while isinstance(plain, dict | list):
        plain = list(plain.values() if isinstance(plain, dict) else plain)[-1 if field != "partition.kind" else 0]
    assert repr(plain) in said, said


def test_every_field_of_a_spec_and_of_a_method_is_tried_above() -> None:
    """Labels aside: whoever adds a field adds a bad value of it. One that methods share counts where it is defined."""
    tried = {field.split(".")[0] for _, field, _, _ in VALUES} | {"profile"}
    labels = {"paper", "name", "group", "label", "split"}
    assert tried == {field.name for field in dataclasses.fields(Spec)} - labels
    hyper = {
        defined(m, field.name) for m in registry.METHODS for field in dataclasses.fields(registry.METHODS[m].Hyper)
    }
    bad = {
        defined(v["method"] if where.count("/") == 1 else "fedmrn", f.removeprefix("hyper."))
        for where, f, v, _ in VALUES
        if f.startswith("hyper.")
    }
    assert bad == hyper, "add a bad value of it to VALUES"


def defined(method: str, field: str) -> tuple[str, str]:
    """The class that a field of a method's Hyper comes from, and the field."""
    classes = [c for c in registry.METHODS[method].Hyper.__mro__ if field in vars(c).get("__annotations__", {})]
    return f"{classes[0].__module__}.{classes[0].__qualname__}", field


def test_a_cohort_larger_than_the_clients(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(digits, put(f"{HERE}/cohort", 11))
    said = refused(digits, capsys, *RUN)
    assert "cohort: 11" in said and "clients: 10" in said


def test_a_profile_without_runs_and_a_setting_without_a_value(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = digits / "experiments" / "fedmrn.yaml"
    whole = file.read_text()
    edit(digits, put("profiles/smoke", {}))
    assert "experiments/fedmrn.yaml: profiles.smoke: no runs" in refused(digits, capsys, *RUN)
    file.write_text(whole)
    edit(digits, cut("settings/epochs/smoke"))
    assert "experiments/fedmrn.yaml: settings.epochs: no value for profile smoke" in refused(digits, capsys, *RUN)


def test_a_network_too_deep_for_the_images(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(digits, put(f"{HERE}/model", "cnn4"))  # four poolings of 8 x 8 pixels leave none
    said = refused(digits, capsys, *RUN)
    assert "cnn4" in said and "8" in said


def test_more_labels_than_can_be_dealt_out(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(digits, put("partitions/iid", {"kind": "labels", "count": 2}))
    edit(digits, put(f"{HERE}/clients", 3))
    assert "leave class 6 to nobody" in refused(digits, capsys, *RUN)


@pytest.mark.parametrize("beta", [1e-6, math.inf])
def test_a_dirichlet_draw_that_never_comes_ends(digits: Path, capsys: pytest.CaptureFixture[str], beta: float) -> None:
    edit(digits, put("partitions/iid", {"kind": "dirichlet", "beta": beta}))
    said = refused(digits, capsys, *RUN)
    assert "partition" in said and ("1,000 tries" in said or "beta" in said)


# Data


def test_missing_data(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (RUN, ("data", "check", "fashion-mnist")):
        said = refused(home, capsys, *command)
        for name, expected in sets.ENTRIES["fashion-mnist"].files:
            assert str(home / "data" / name) in said and expected in said
        assert "missing" in said and "python -m fedlib data get fashion-mnist" in said


def test_data_that_a_later_run_needs_is_missed_before_the_first_is_trained(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = {"methods": ["fedavg"], "partitions": ["iid"], "seeds": [0], "settings": DIGITS | {"data": "fashion-mnist"}}
    edit(digits, put("profiles/smoke/later", later))
    assert "python -m fedlib data get fashion-mnist" in refused(digits, capsys, *RUN)


def test_altered_data(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / "data" / "FashionMNIST").exists():
        pytest.skip("Fashion-MNIST is not here")
    shutil.copytree(ROOT / "data", home / "data")
    assert main(["data", "check", "fashion-mnist"]) == 0
    capsys.readouterr()
    file = home / "data" / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    said = refused(home, capsys, *RUN)
    expected = dict(sets.ENTRIES["fashion-mnist"].files)["FashionMNIST/raw/t10k-labels-idx1-ubyte"]
    found = hashlib.sha256(raw).hexdigest()
    assert all(words in said for words in (str(file), expected, found, "python -m fedlib data get fashion-mnist"))
    assert "train-images" not in said


# Updates that cannot be used


class Tampered(InProcess):
    """The reference engine; `change(upload, round, attempt, position)` may replace what arrives."""

    def __init__(self, change: Callable[..., Any]) -> None:
        super().__init__(CPU)
        self.change = change
        self.broadcasts: list[tuple[int, bytes, list[int]]] = []

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Any, memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        attempt = sum(number == round for number, _, _ in self.broadcasts)
        self.broadcasts.append((round, message, list(cohort)))
        for position, (client, upload) in enumerate(super().train(spec, message, round, cohort, memories)):
            yield client, self.change(upload, round, attempt, position)


def repacked(upload: bytes, change: Callable[[list[bytearray]], Any], kind: str | None = None) -> bytes:
    """The same message with other sections and a right checksum."""
    length = upload[4]
    name = upload[5 : 5 + length].rstrip(b"\0").decode()
    fingerprint, start = upload[5 + length : 13 + length], len(upload) - 4
    sizes = container.section_sizes(upload)
    sections: list[bytearray] = []
    for size in reversed(sizes):
        sections.insert(0, bytearray(upload[start - size : start]))
        start -= size
    change(sections)
    samples = int.from_bytes(upload[13 + length : 17 + length], "little")
    return container.pack(kind or name, fingerprint, samples, sections)


def floats(value: float) -> Callable[[list[bytearray]], None]:
    def change(sections: list[bytearray]) -> None:
        sections[-1][-4:] = np.float32(value).tobytes()

    return change


def drop_last_four(sections: list[bytearray]) -> None:
    del sections[-1][-4:]


def add_four(sections: list[bytearray]) -> None:
    sections[-1] += bytes(4)


def leave(sections: list[bytearray]) -> None:
    pass


def flipped(upload: bytes, at: int) -> bytes:
    return upload[:at] + bytes([upload[at] ^ 1]) + upload[at + 1 :]


BAD: dict[str, tuple[Callable[[bytes], Any], str]] = {
    "NaN": (lambda u: repacked(u, floats(math.nan)), "nan"),
    "infinity": (lambda u: repacked(u, floats(-math.inf)), "inf"),
    "too short": (lambda u: repacked(u, drop_last_four), "expected"),
    "too long": (lambda u: repacked(u, add_four), "at most"),
    "a section more": (lambda u: repacked(u, lambda sections: sections.append(bytearray(4))), "sections"),
    "another kind": (lambda u: repacked(u, leave, "other.up"), "'other.up'"),
    "another method": (lambda u: container.pack("else.up", bytes(8), 1, [b"1234", b"5678"]), "else.up"),
    "altered in the middle": (lambda u: flipped(u, len(u) // 2), "altered"),
    "altered at the end": (lambda u: flipped(u, len(u) - 1), "altered"),
    "altered at the start": (lambda u: flipped(u, 0), "not a fedlib message"),
    "altered version": (lambda u: flipped(u, 3), "version"),
    "truncated": (lambda u: u[: len(u) // 2], "truncated"),
    "trailing bytes": (lambda u: u + b"x", "trailing"),
    "nothing": (lambda u: b"", "not a fedlib message"),
    "not finite at the client": (lambda u: PayloadError("u is not finite"), "u is not finite"),
}
RUNS: list[dict[str, Any]] = [
    {"method": "fedavg", "model": "mlp"},
    {"method": "fedmrn", "model": "cnn2", "hyper": {"mask": "signed"}},  # with a section in full precision
]


@pytest.mark.parametrize("run", RUNS, ids=["fedavg", "fedmrn"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_update_is_refused_logged_and_counted_and_the_round_goes_on(
    tiny: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, run: dict[str, Any], bad: str
) -> None:
    def second(make: Callable[[bytes], Any]) -> Tampered:
        return Tampered(lambda upload, round, attempt, position: make(upload) if position == 1 else upload)

    spoil, words = BAD[bad]
    spec = tiny(**run, rounds=1, cohort=3, clients=40)
    engine = second(spoil)
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = rounds.run(spec, engine, root=tmp_path)
    (_, _, cohort), (entry,) = engine.broadcasts[0], found["rounds"]
    ((client, reason),) = entry["refused"]
    assert client == cohort[1] and words in reason
    assert entry["clients"] == [cohort[0], cohort[2]]
    assert found["final"]["refused"] == 1
    (line,) = [r.getMessage() for r in caplog.records if r.name == "fedlib"]
    assert str(client) in line and reason in line
    # What is left is what an engine gives in which that client could not send at all.
    without = rounds.run(spec, second(lambda upload: PayloadError("absent")), root=tmp_path)
    for name in ("accuracy", "loss"):
        assert found["final"][name] == without["final"][name]
    arrived = spoil(bytes(engine.client(spec, engine.broadcasts[0][1], 1, cohort[1])))  # type: ignore[arg-type]
    size = len(arrived) if isinstance(arrived, bytes) else 0
    assert entry["uplink_bytes"] == without["rounds"][0]["uplink_bytes"] + size
    assert json.loads(record.text(found)) == json.loads(json.dumps(found))


def test_refused_bytes_do_not_make_an_upload_look_smaller(tiny: MakeSpec, tmp_path: Path) -> None:
    """Bits per weight are measured on uploads; that some were refused changes their number, not their size."""
    spec = tiny(method="fedmrn", label="signed", rounds=1)
    clean = rounds.run(spec, InProcess(CPU), root=tmp_path)
    engine = Tampered(lambda u, round, attempt, position: flipped(u, len(u) // 2) if position else u)
    spoilt = rounds.run(spec, engine, root=tmp_path)
    assert spoilt["final"]["uplink_bytes"] == clean["final"]["uplink_bytes"] and spoilt["final"]["refused"] == 3
    bits = [measures.bits_per_weight([r], ["signed"], ["main"], "mask")["signed, main, iid"] for r in (clean, spoilt)]
    assert bits == [[1.0], [1.0]]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_round_without_an_update_is_repeated_from_the_old_state(
    tiny: MakeSpec, tmp_path: Path, failures: int
) -> None:
    def change(upload: bytes, round: int, attempt: int, position: int) -> bytes:
        return flipped(upload, len(upload) // 2) if round == 2 and attempt < failures else upload

    engine, spec = Tampered(change), tiny(cohort=3)
    found = rounds.run(spec, engine, root=tmp_path)
    second = [(message, cohort) for number, message, cohort in engine.broadcasts if number == 2]
    assert len(second) == failures + 1
    assert len({message for message, _ in second}) == 1  # the old state, to the byte
    assert second[0][0] != engine.broadcasts[0][1]
    assert second[0][1] != second[1][1]  # another cohort
    entry, normal = found["rounds"][1], found["rounds"][0]
    assert [client for client, _ in entry["refused"]] == [c for _, cohort in second[:-1] for c in cohort]
    assert entry["clients"] == second[-1][1]
    assert len(entry["clients"]) == 3 and len(entry["refused"]) == 3 * failures
    assert entry["uplink_bytes"] == (failures + 1) * normal["uplink_bytes"]  # what was passed is paid for
    assert entry["downlink_bytes"] == (failures + 1) * normal["downlink_bytes"]
    assert [e["round"] for e in found["rounds"]] == [1, 2, 3]


def test_three_rounds_without_an_update_end_the_run(tiny: MakeSpec, tmp_path: Path) -> None:
    engine = Tampered(lambda upload, round, attempt, position: b"" if round == 2 else upload)
    with pytest.raises(RunError, match=r"round 2 got no usable update in 3 attempts.*not a fedlib message"):
        rounds.load_or_run(tiny(), engine, root=tmp_path)
    assert [number for number, _, _ in engine.broadcasts] == [1, 2, 2, 2]
    assert not record.path(tiny(), tmp_path).exists()


def test_training_that_diverges_ends_with_the_reason(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(digits, put("methods/fedavg/lr", 1e12))
    edit(digits, put(f"{HERE}/batch", 8))
    assert main([*RUN, "--only", "main_fedavg_*"]) == 2
    said = capsys.readouterr().err
    assert "no usable update in 3 attempts" in said and "finite" in said
    assert not (digits / "records").exists()


def test_a_record_never_holds_what_json_does_not_know(tiny: MakeSpec, tmp_path: Path) -> None:
    """After some steps of 1e12 weights are still finite, but outputs are not, and the loss is no number."""

    def no_number(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    for epochs in range(1, 7):
        with contextlib.suppress(RunError):
            found = rounds.run(tiny(lr=1e12, batch=1000, rounds=1, epochs=epochs), InProcess(CPU), root=tmp_path)
            json.loads(record.text(found), parse_constant=no_number)


# Clients without samples


@pytest.mark.parametrize("method", ["fedavg", "fedmrn"])
def test_clients_without_samples_are_skipped(tiny: MakeSpec, tmp_path: Path, method: str) -> None:
    spec = tiny(method=method, clients=2000, cohort=20, rounds=2)  # for 1,437 samples
    engine = Tampered(lambda upload, round, attempt, position: upload)
    found = rounds.run(spec, engine, root=tmp_path)
    partition = in_process.task_of(spec.key(), CPU).partition
    for entry, (_, message, cohort) in zip(found["rounds"], engine.broadcasts, strict=True):
        assert 0 < len(cohort) < 20 and all(len(partition.indices(client)) for client in cohort)
        assert entry["clients"] == cohort and entry["refused"] == []
        assert entry["downlink_bytes"] == len(cohort) * len(message)


def test_cohorts_of_clients_without_samples_only_end_the_run(tiny: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no usable update"):
        rounds.run(tiny(clients=10**6, cohort=1, rounds=50), InProcess(CPU), root=tmp_path)


# Records


def status(capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["status", "--profile", "smoke"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if "fedmrn/smoke/" in line]


@pytest.mark.slow
def test_a_stale_record_shows_in_status_and_on_the_page(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedlib.pages import figures

    assert all(line.startswith("-") and "not run" in line for line in status(capsys))
    assert main(list(RUN)) == 0
    assert [line.split()[0] for line in status(capsys)] == ["fresh", "fresh"]
    edit(digits, put("methods/fedavg/lr", 0.04))
    lines = status(capsys)
    assert lines[0].startswith("STALE") and "spec differs in lr" in lines[0] and "main_fedavg_iid_seed0" in lines[0]
    assert lines[1].startswith("fresh")
    exhibit = figures.record_table(list(record.fresh(experiments.specs("fedmrn", "smoke"))), "caption")
    states = dict(zip(exhibit.frame["run"], exhibit.frame["state"], strict=True))
    assert states == {
        "fedmrn/smoke/main_fedavg_iid_seed0": "STALE: spec differs in lr",
        "fedmrn/smoke/main_fedmrn-binary_iid_seed0": "fresh",
    }
    assert "STALE: spec differs in lr" in exhibit._repr_html_()
    # A stale record supports no verdict.
    capsys.readouterr()
    assert main([*RUN]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 1 to train" in said and "(trained: spec differs in lr)" in said
    assert [line.split()[0] for line in status(capsys)] == ["fresh", "fresh"]


@pytest.mark.parametrize("text", ["", "<<<<<<< HEAD\n{}", '{"format": 1'])
def test_a_record_that_is_not_json_is_named(digits: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file = record.path(experiments.specs("fedmrn", "smoke")[0])
    file.parent.mkdir(parents=True)
    file.write_text(text)
    code = main(["status", "--profile", "smoke"])
    shown = capsys.readouterr()
    assert "main_fedavg_iid_seed0" in shown.out + shown.err
    assert code == 2 or shown.out.startswith("STALE")


# Scores

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


CLAIMS: list[tuple[Edit, list[str]]] = [
    (put("claim", []), ["fedmrn.yaml", "'claim'", "claims"]),
    (lambda c: c["claims"][0].update(tolerance=1), ["claims", "'tolerance'", "holds"]),
    (lambda c: c["claims"][0].update(measure="bits"), ["one-bit", "measure", "'bits'", "bits_per_weight"]),
    (lambda c: c["claims"][0].pop("holds"), ["one-bit", "holds"]),
    (lambda c: c["claims"][0].pop("unit"), ["one-bit", "unit"]),
    (lambda c: c["claims"][0].pop("why"), ["one-bit", "why"]),
    (lambda c: c["claims"][0].pop("measure"), ["one-bit", "measure"]),
    (lambda c: c["claims"][0].pop("arguments"), ["one-bit", "arguments"]),
    (lambda c: c["claims"][0].update(arguments={"label": []}), ["one-bit", "arguments", "label"]),
    (lambda c: c["claims"][0]["arguments"].pop("groups"), ["one-bit", "arguments", "groups", "given"]),
    (lambda c: c["claims"][0]["arguments"].update(labels="fedavg"), ["one-bit", "labels", "'fedavg'", "list"]),
    (lambda c: c["claims"][0]["arguments"].update(groups="main"), ["one-bit", "groups", "'main'", "list"]),
    (lambda c: c["claims"][1]["arguments"].update(against="fedavg"), ["small-upload", "against", "'fedavg'", "list"]),
    (lambda c: c["claims"][0].pop("id"), ["id"]),
    (lambda c: c["claims"][0].update(holds=1), ["one-bit", "holds", "1"]),
    (lambda c: c["claims"][0].update(holds=[2, 1]), ["one-bit", "holds", "[2, 1]"]),
    (lambda c: c["claims"].__setitem__(0, "one bit"), ["claims", "one bit"]),
    (cut("claims"), ["published/fedmrn.yaml", "claims"]),
    *[
        (
            lambda c, n=name: c["claims"][1]["arguments"][n].append("fedmrn-singed"),
            ["small-upload", name, "'fedmrn-singed'"],
        )
        for name in ("labels", "groups", "against")
    ],
    (lambda c: c["claims"][1].update(id="one-bit"), ["one-bit", "id", "twice"]),
]


@pytest.mark.parametrize("change, words", CLAIMS, ids=[" ".join(words) for _, words in CLAIMS])
def test_a_bad_published_file(digits: Path, capsys: pytest.CaptureFixture[str], change: Edit, words: list[str]) -> None:
    edit(digits, change, "published")
    said = refused(digits, capsys, "score", "--profile", "smoke")
    assert [word for word in words if word not in said] == [], said
    assert not (digits / "scores.json").exists()


def test_scores_rest_on_fresh_records_alone(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(digits, put(f"{MAIN}/seeds", [0, 1, 2]))
    edit(digits, put(f"{MAIN}/settings", DIGITS | {"rounds": 1}))
    assert main(list(RUN)) == 0
    fresh = {s.claim["id"]: s for s in score.scores("fedmrn", "smoke")}
    assert fresh["one-bit"].verdict == "holds"
    assert {case: len(values) for case, values in fresh["one-bit"].values.items()} == {"fedmrn-binary, main, iid": 3}
    edit(digits, put("methods/fedmrn-binary/lr", 0.2))
    stale = {s.claim["id"]: s for s in score.scores("fedmrn", "smoke")}
    assert stale["one-bit"].verdict == "not tested at this scale"


def test_spec_errors_are_value_errors_and_specs_cannot_be_made_wrong_in_code(tiny: MakeSpec) -> None:
    values = tiny().as_dict()
    with pytest.raises(SpecError, match="run: unknown key 'dampening'"):
        Spec.from_dict(values | {"dampening": 0.9})
    with pytest.raises(SpecError, match="run: lr not given"):
        Spec.from_dict({k: v for k, v in copy.deepcopy(values).items() if k != "lr"})
    with pytest.raises(ValueError, match="profile: 'laptop' is unknown; allowed: lab, paper, smoke"):
        tiny(profile="laptop")
