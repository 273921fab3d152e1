"""Values out of range: each field of a run and each setting of a method is named, with what is allowed."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from jobs import MakeSpec
from projects import HERE, MAIN, objection, put

from fedlib.errors import SpecError
from fedlib.methods import registry
from fedlib.runs.spec import Spec

COUNTS = ("clients", "cohort", "rounds", "epochs", "batch", "evaluate_every")
NO_NAME = ("x", None)
NO_SWITCH = (1, "yes", None)
PLACES: list[tuple[str, str, tuple[Any, ...], str]] = [  # where, field, values, words on what is allowed
    *[(f"{HERE}/{name}", name, (0, -1, 2.5), "integer 1") for name in COUNTS],
    (f"{HERE}/rounds", "rounds", ("ten", True, None, [3]), "integer 1"),
    ("methods/plain/lr", "lr", (0, -0.1, math.inf, math.nan, "x", None), "number"),
    (f"{MAIN}/seeds", "seed", ([-1], [2**32], [1.5]), "integer 0"),
    (f"{MAIN}/seeds", "seed", (["one"],), "integer"),
    (f"{HERE}/data", "data", ("mnist",), "allowed: cifar10 cifar10-jpeg digits fashion-mnist"),
    (f"{HERE}/data", "data", (["digits"],), "allowed: "),
    (f"{HERE}/model", "model", ("resnet",), "allowed: cnn2 cnn4 cnn8 mlp"),
    ("methods/plain/method", "method", ("fedprox",), "allowed: fedavg fedmrn"),
    ("methods/plain/hyper", "hyper", (None,), ""),
    ("methods/plain/downlink", "downlink.method", ({"method": "zip"},), "allowed: fedcompress feddq"),
    ("methods/plain/downlink", "downlink", ("feddq",), "mapping"),
    (f"{MAIN}/grid", "momentum", ({"optimizer": ["adam"], "momentum": [0.5]},), "optimizer sgd adam"),
    (
        *("partitions/iid", "partitions.iid.kind", ({"seed": 1, "kind": "equal"},)),
        "allowed: iid dirichlet quota labels natural resampled",
    ),
    *[
        ("partitions/iid", f"partitions.iid.{name}", tuple({"kind": kind, name: value} for value in values), words)
        for kind, name, values, words in (
            ("dirichlet", "beta", (0, -1.0, math.nan, "x"), ""),
            ("labels", "count", (0,), ""),
            ("labels", "count", (2.5,), "integer"),
            ("resampled", "size", (0.5,), "integer"),
            ("iid", "seed", (-5, "x"), ""),
        )
    ],
    ("partitions/iid", "partition.count", ({"kind": "labels", "count": 11},), "1 10"),
]
GRID: list[tuple[str, tuple[Any, ...], str]] = [  # fields that the file leaves at their defaults
    ("optimizer", ("adagrad", None), "allowed: adam sgd"),
    ("feedback", NO_SWITCH, "true false"),
    ("feedback", (True,), "fedavg use false"),
    ("persistent", NO_SWITCH, "true false"),
    ("persistent", (True,), "needs optimizer adam use false"),
    ("sampling", NO_NAME, "allowed: fixed poisson spaced"),
    ("precision", ("float16", None), "allowed: bfloat16 float32"),
    ("frozen", ("emnist/dense1", "x"), "allowed for this network"),
    ("frozen", (None,), "text"),
    ("held_out", (-0.1, 1, math.nan, "x"), "number 0 0.9"),
    ("validation", (-0.1, 1, math.nan, "x"), "number 0 0.9"),
    ("most_change", (-1, 2e12, math.nan, "x"), "number from 0 to 1e+12"),
    ("robust", ("mean", 1, None), "allowed: clipped, median, none, trimmed"),
    ("attackers", (-1, 1.5, "x"), "integer 0"),
    ("attackers", (1,), "attack give both"),
    ("attack", (-2e6, math.nan, "x"), "number -1e+06"),
    ("attack", (-10,), "attackers give both"),
    ("momentum", (-0.1, 1, math.nan, "x", None), "number 0"),
]
PRIVATE = {"weighting": "clients", "mechanism": "dp_fedavg", "clip_norm": 0.1, "noise_multiplier": 1.0, "delta": 1e-3}
SETTINGS: list[tuple[str, str, tuple[Any, ...], str]] = [  # method, its settings, values, words on what is allowed
    ("fedmrn", "mask", ("ternary",), "allowed: binary signed"),
    ("fedmrn", "noise", ("laplace", ["gauss"]), "allowed: uniform gauss bernoulli"),
    ("fedmrn", "magnitude", (0, -1, 1e7, math.nan, "big"), "1e"),
    ("fedmrn", "decay", (0, 1.5, math.nan, "x"), "number 0.001 1"),
    ("fedmrn", "masking", ("before", None), "allowed: after pm psm sm"),
    ("fedmrn", "weighting", ("clients", None), "allowed: batches samples"),
    ("fedmrn", "coding", ("zip", None), "allowed: entropy packed"),
    ("topk", "budget", ("bits",), "allowed: values indices"),
    ("signvote", "vote", NO_NAME, "allowed: majority mean"),
    ("signvote", "step", (0, 1e4, math.nan), "number 1e-09 1000"),
    ("fedsparsify", "keep", (0, 1.5, "x"), "number 0.001 1"),
    ("fedsparsify", "density", (0, 2, math.nan), "1e-06 1"),
    ("fedzip", "augment", NO_NAME, "corner none random"),
    ("fedzip", "clusters", (-1, 0.5, "x"), "integer 2 256"),
    ("fedzip", "steps", (-1, 0.5, "x"), "integer 0 1000"),
    ("fedzip", "keep", (-1, 2, "x"), "number 1e-06 1"),
    ("fedzip", "decay", (-1, math.nan, "x"), "number 0"),
    ("fedpm", "lam", (-0.1, 1e7, math.nan), "number 0 1e+06"),
    ("fedpm", "penalty", NO_NAME, "allowed: mean_entropy mean_prob pooled_entropy"),
    ("fedpm", "masking", NO_NAME, "allowed: bernoulli threshold top"),
    ("fedpm", "ste", NO_NAME, "allowed: identity prob"),
    ("fedpm", "weight_scale", NO_NAME, "allowed: critical fedpm kaiming"),
    ("fedpm", "aggregation", NO_NAME, "allowed: bayes mean"),
    ("fedpm", "weighting", NO_NAME, "allowed: clients samples"),
    ("fedpm", "coding", NO_NAME, "allowed: global layers pooled"),
    ("fedpm", "downlink", NO_NAME, "allowed: full levels"),
    ("fedpm", "evaluated", NO_NAME, "allowed: mean sampled threshold"),
    ("fedpm", "keep", (0, 1.5, "x"), "number 1e-06 1"),
    ("fedpm", "prior", (0.5, -1, math.nan), "number 1 1e+06"),
    ("fedpm", "reset_period", (0, 1.5), "integer 1"),
    ("fedpm", "delta", (0, 0.5, math.nan), "number 0.49"),
    ("fedpm", "soften", (-0.1, 0.5, math.nan), "number from 0 to 0.49"),
    ("feddq", "schedule", NO_NAME, "allowed: ascending fixed loss range"),
    ("feddq", "quantizer", NO_NAME, "allowed: affine_nearest affine_stochastic buckets norm symmetric_nearest"),
    ("feddq", "biases", NO_NAME, "allowed: kept sent"),
    ("feddq", "coding", NO_NAME, "allowed: entropy packed"),
    ("feddq", "width least most first", (0, 1.5, 70000, None), "integer 1"),
    ("feddq", "resolution", (0, math.nan, "x"), "number"),
    ("feddq", "downlink", (-1, 1e-13, math.nan), "number"),
    ("feddq", "report", NO_SWITCH, "true false"),
    ("fedpt", "law", NO_NAME, "allowed: glorot he torch"),
    ("fedpt", "optimizer", NO_NAME, "allowed: adam sgd yogi"),
    ("fedpt", "weighting", NO_NAME, "allowed: clients samples"),
    ("fedpt", "mechanism", NO_NAME, "allowed: dp_fedavg dp_ftrl none"),
    ("fedpt", "server_lr epsilon momentum beta1 beta2 scale", (-1, 1e9, math.nan, "x"), "number"),
    ("fedpt", "clip_norm noise_multiplier", (-1, 1e10, math.nan, "x"), "number"),
    ("fedpt", "delta", (-1, 1e10, math.nan, "x"), ""),
    ("fedpt", "delta", (0.5,), "below 1 / clients"),
    ("fedpt", "correction", (1, None), "true false"),
    ("fedpt", "policy", ("emnist/dense1", "all", "random/2", "random/x", None), "allowed for this network"),
    ("fedcompress", "variant", NO_NAME, "allowed: code none paper"),
    ("fedcompress", "foreign", NO_NAME, "allowed: clients leaves noise spectrum stripes"),
    ("fedcompress", "norms", NO_NAME, "allowed: frozen recalibrate train"),
    ("fedcompress", "layers", NO_NAME, "allowed: all convolutions"),
    ("fedcompress", "augment", NO_NAME, "allowed: corner none random"),
    ("fedcompress", "images distil_epochs distil_batch clustered_epochs", (0, 1.5, None), "integer 1"),
    ("fedcompress", "step window patience first", (0, 1.5, None), "integer 1"),
    ("fedcompress", "distil_lr temperature clustered_lr beta decay limit", (-1, math.nan, "x"), "number"),
    ("fedcompress", "least most", (1, 257), "integer 2 256"),
    ("fedcompress", "most", (7,), "hyper.least: 8 exceeds fewer"),
    ("fedcompress", "images", (255,), "no batch hyper.distil_batch: 256"),
    ("fedcompress", "compare_every", (-1, 0.5), "integer 0"),
    ("fedcompress", "self_compression", (1, None), "true false"),
]


def with_setting(method: str, field: str, value: Any) -> dict[str, Any]:
    """A method of which one setting, the last, is wrong."""
    right = PRIVATE if method == "fedpt" and field in ("clip_norm", "noise_multiplier", "delta") else {}
    hyper = {name: other for name, other in right.items() if name != field} | {field: value}
    return {"method": method, "lr": 0.1, "hyper": hyper}


VALUES: list[tuple[str, str, Any, str]] = [
    *[(where, field, value, words) for where, field, values, words in PLACES for value in values],
    *[(f"{MAIN}/grid", field, {field: [value]}, words) for field, values, words in GRID for value in values],
    *[
        ("methods/plain", f"hyper.{field}", with_setting(method, field, value), words)
        for method, fields, values, words in SETTINGS
        for field in fields.split()
        for value in values
    ],
]


@pytest.mark.parametrize("where, field, value, allowed", VALUES, ids=[f"{v[1]}={v[2]}" for v in VALUES])
def test_a_value_out_of_range(tmp_path: Path, where: str, field: str, value: Any, allowed: str) -> None:
    said = objection(tmp_path, put(where, value))
    assert field in said
    assert [word for word in allowed.split() if word not in said] == [], said
    while isinstance(value, dict | list):  # what is wrong stands last
        value = list(value.values() if isinstance(value, dict) else value)[-1]
    assert repr(value) in said, said


def test_every_field_of_a_run_and_every_setting_of_a_method_is_tried_above() -> None:
    """Labels aside: whoever adds a field adds a bad value of it. One that methods share counts where it is defined."""
    tried = {field.split(".")[0].replace("partitions", "partition") for _, field, _, _ in VALUES} | {"profile"}
    labels = {"paper", "name", "group", "label", "split"}
    assert tried == {field.name for field in dataclasses.fields(Spec)} - labels
    bad = {defined(method, field) for method, fields, _, _ in SETTINGS for field in fields.split()}
    settings = {defined(name, field) for name, method in registry.METHODS.items() for field in method.defaults()}
    assert bad == settings, "add a bad value of it to SETTINGS"


def defined(method: str, field: str) -> tuple[str, str]:
    """The class that a setting comes from, and the setting."""
    classes = [c for c in registry.METHODS[method].__mro__ if field in vars(c).get("__annotations__", {})]
    return f"{classes[0].__module__}.{classes[0].__qualname__}", field


# Specs made in code


def test_no_name_of_a_run_leads_elsewhere(tiny: MakeSpec) -> None:
    for field in ("paper", "name", "group", "label", "split"):
        with pytest.raises(SpecError, match=f"^{field}: '../x' must be made of"):
            tiny(**{field: "../x"})


def test_what_is_right_stays_as_it_is_written(tiny: MakeSpec) -> None:
    assert '"lr": 1,' in tiny(lr=1).key() and '"lr": 1.0,' in tiny(lr=1.0).key()
    spec = dataclasses.replace(tiny(), momentum=0)
    assert type(spec.momentum) is int and pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(SpecError, match=r"^lr: '1e-2' must be a number .*without quotes"):
        dataclasses.replace(spec, lr="1e-2")  # type: ignore[arg-type]


def test_spec_errors_are_value_errors_and_specs_cannot_be_made_wrong_in_code(tiny: MakeSpec) -> None:
    values = tiny().as_dict()
    with pytest.raises(SpecError, match="run: unknown key 'dampening'"):
        Spec.from_dict(values | {"dampening": 0.9})
    with pytest.raises(SpecError, match=r"^lr not given"):
        Spec.from_dict({k: v for k, v in values.items() if k != "lr"})
    with pytest.raises(ValueError, match="profile: 'laptop' is unknown; allowed: lab, night, paper, smoke"):
        tiny(profile="laptop")
