"""A network and data of a caller's own: the same loop, the same bytes, the same record whatever else draws."""

import copy
import doctest
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

import fedlib
from fedlib.data import sets, sources
from fedlib.engines import select
from fedlib.errors import DataError, SpecError
from fedlib.methods.registry import METHODS
from fedlib.models import registry
from fedlib.own import federate
from fedlib.rng import Rng
from fedlib.runs import build, record, rounds
from fedlib.runs.spec import Spec

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
TRAIN, TEST = (X[:600], Y[:600]), (X[600:900], Y[600:900])
IMAGES, TEST_IMAGES = ((x.reshape(-1, 1, 8, 8), y) for x, y in (TRAIN, TEST))
QUICK: dict[str, Any] = {"clients": 5, "rounds": 2, "lr": 0.2, "engine": "process"}


class Tuned(nn.Module):
    """Whatever a network may hold: BatchNorm of vectors, dropout, an integer table, tied weights, no bias."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 24, bias=False)
        self.norm, self.drop = nn.BatchNorm1d(24), nn.Dropout(0.3)
        self.middle, self.again = nn.Linear(24, 24), nn.Linear(24, 24)
        self.again.weight = self.middle.weight
        self.last = nn.Linear(24, 10)
        self.register_buffer("order", torch.arange(24).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.relu(self.norm(self.first(x))))[:, self.order]
        found: Tensor = self.last(torch.relu(self.again(torch.relu(self.middle(hidden)))))
        return found


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def stable(run: fedlib.Run) -> Any:
    return json.loads(json.dumps(record.stable(run.record)))


# The same numbers


@pytest.mark.parametrize("engine", ["process", "pool"])
def test_equal_seeds_give_equal_records_whatever_is_drawn_in_between(engine: str) -> None:
    """With dropout, and initial values that torch draws by itself."""
    found = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002
        torch.rand(disturbance)
        found.append(stable(fedlib.federate(Tuned, TRAIN, TEST, **QUICK | {"engine": engine})))
    assert found[0] == found[1]
    assert found[0] == stable(fedlib.federate(Tuned, TRAIN, TEST, **QUICK)), "in process"
    assert found[0] != stable(fedlib.federate(Tuned, TRAIN, TEST, seed=1, **QUICK))


def test_a_call_disturbs_no_generator_and_no_module() -> None:
    network = Tuned()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    run = fedlib.federate(network, TRAIN, TEST, **QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    assert not torch.equal(run.model.state_dict()["first.weight"], before["first.weight"])
    assert isinstance(run.model, Tuned) and run.model.again.weight is run.model.middle.weight


def test_named_entries_are_the_book_s_own_runs(tmp_path: Path) -> None:
    """And the same network and arrays, given as one's own, give the same rounds to the byte."""
    run = fedlib.federate("mlp", "digits", method="fedmrn", settings={"magnitude": 0.1}, **QUICK)
    spec = Spec.from_dict(run.record["spec"])
    with select.open_engine("process", "cpu") as engine:
        assert stable(run) == json.loads(json.dumps(record.stable(rounds.run(spec, engine, root=tmp_path))))
    data = sources.load("digits")
    network = registry.build("mlp", 1, 8, 10, Rng(0))
    again = fedlib.federate(
        network, (data.train_x, data.train_y), (data.test_x, data.test_y), method="fedmrn",
        settings={"magnitude": 0.1}, **QUICK,
    )  # fmt: skip
    drawn = [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.record["rounds"]]
    assert drawn == [{k: v for k, v in entry.items() if k != "seconds"} for entry in again.record["rounds"]]


def test_the_model_that_comes_back_is_the_one_that_was_judged() -> None:
    run = fedlib.federate(Tuned, TRAIN, TEST, method="topk", **QUICK | {"rounds": 6})
    with torch.no_grad():
        right = (run.model(torch.from_numpy(TEST[0])).argmax(1).numpy() == TEST[1]).mean()
    assert run.accuracy == pytest.approx(right) and run.accuracy > 0.2
    assert run.table["accuracy"].iloc[-1] == run.accuracy and len(run.table) == 6
    assert run.uplink_bytes == run.table["uplink_bytes"].sum()


# Every method, and other tasks than labels of vectors

SETTINGS: dict[str, dict[str, Any]] = {
    "fedcompress": {"settings": {"distil_epochs": 1, "images": 64, "distil_batch": 32}, "held_out": 0.1},
    "fedpm": {"optimizer": "adam", "settings": {"lam": 0.0}},
    "fedpt": {"settings": {"policy": "random/0.5"}},
}


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_a_network_of_one_s_own(method: str) -> None:
    run = fedlib.federate(convolutions, IMAGES, TEST_IMAGES, method=method, **QUICK | SETTINGS.get(method, {}))
    assert 0 < run.accuracy <= 1 and run.uplink_bytes > 0


def test_numbers_in_place_of_labels() -> None:
    x, y = load_diabetes(return_X_y=True)
    x, y = (20 * x).astype(np.float32), ((y - 150) / 77).astype(np.float32)[:, None]
    network = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))

    def off(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().mean()

    run = fedlib.federate(
        network, (x[:350], y[:350]), (x[350:], y[350:]), loss=nn.functional.mse_loss, metrics={"off": off}, **QUICK
    )
    assert math.isnan(run.accuracy) and run.loss < 1 and "accuracy" not in run.table
    with torch.no_grad():
        output = run.model(torch.from_numpy(x[350:]))
    assert run.loss == pytest.approx(float((output - torch.from_numpy(y[350:])).square().mean()), rel=1e-4)
    assert run.table["off"].iloc[-1] == pytest.approx(float(off(output, torch.from_numpy(y[350:]))), rel=1e-4)


class Next(nn.Module):
    """A token from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.recur, self.out = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.recur(self.norm(self.embed(x)))[0])
        return found


def test_sequences_with_padding() -> None:
    tokens = np.random.default_rng(0).integers(0, 12, (200, 9))
    y = np.where(np.arange(8) < 6, tokens[:, 1:], -100)
    run = fedlib.federate(Next, (tokens[:150, :-1], y[:150]), (tokens[150:, :-1], y[150:]), **QUICK)
    assert 0 <= run.accuracy < 0.5 and run.loss < 4


@pytest.mark.parametrize("how", ["lists", "owners", "kind"])
def test_clients_by_lists_owners_or_a_kind(how: str) -> None:
    shares = [np.arange(0, 100), np.arange(100, 150), np.arange(150, 600)]
    names = np.repeat(["ann", "bob", "cat"], [100, 50, 450])
    ways: dict[str, dict[str, Any]] = {
        "lists": {"partition": shares},
        "owners": {"owners": names},
        "kind": {"partition": {"kind": "dirichlet", "beta": 0.5}, "clients": 3},
    }
    given = ways[how]
    run = fedlib.federate(small, TRAIN, TEST, **{k: v for k, v in QUICK.items() if k != "clients"} | given)
    assert run.record["spec"]["clients"] == 3 and run.record["final"]["uploads"] == 6
    if how == "owners":
        again = fedlib.federate(small, TRAIN, TEST, partition=shares, rounds=2, lr=0.2, engine="process")
        assert run.record["rounds"][-1]["accuracy"] == again.record["rounds"][-1]["accuracy"]


def test_a_data_set_of_torch() -> None:
    sets = [torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y)) for x, y in (TRAIN, TEST)]
    run, arrays = fedlib.federate(small, *sets, **QUICK), fedlib.federate(small, TRAIN, TEST, **QUICK)
    assert run.accuracy == arrays.accuracy


# Side by side, and kept


def test_methods_side_by_side() -> None:
    methods: dict[str, dict[str, Any]] = {
        "FedAvg": {"method": "fedavg"},
        "FedMRN": {"method": "fedmrn", "settings": {"magnitude": 0.1}},
    }
    found = fedlib.compare(small, TRAIN, TEST, methods=methods, seeds=(0, 1), **QUICK)
    assert list(found.table.index) == ["FedAvg", "FedMRN"] and found.table["times less up"].iloc[1] > 5
    ends = [run.accuracy for run in found.runs["FedMRN"]]
    assert found.table["accuracy"].iloc[1] == pytest.approx(np.mean(ends))
    assert found.table["deviation"].iloc[1] == pytest.approx(np.std(ends, ddof=1))
    axes = found.plot()
    assert [line.get_label() for line in axes.lines] == ["FedAvg", "FedMRN"]
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(found.runs["FedAvg"][0].table["megabytes"].iloc[-1])
    up = found.plot(against="up")
    assert up.lines[1].get_xdata()[-1] == pytest.approx(found.runs["FedMRN"][0].uplink_bytes / 1e6)
    assert up.get_xlabel() == "megabytes sent, up (logarithmic)"
    with pytest.raises(SpecError, match="against: 'sideways' is unknown; allowed: both, down, up"):
        found.plot(against="sideways")


def test_a_method_may_be_called_anything(tmp_path: Path) -> None:
    names = ("EDEN, one bit", "EDEN one bit", "läuft/../gut", "…", "long" * 100)
    methods = {name: {"method": "eden", "lr": 0.1 + 0.1 * number} for number, name in enumerate(names)}
    found = fedlib.compare(small, TRAIN, TEST, methods=methods, folder=tmp_path, **QUICK)
    assert list(found.table.index) == list(names)
    assert len(list((tmp_path / "records" / "own" / "lab").iterdir())) == len(names)


def test_what_is_kept_is_not_trained_again(tmp_path: Path) -> None:
    first = fedlib.federate(small, TRAIN, TEST, folder=tmp_path, **QUICK)
    second = fedlib.federate(small, TRAIN, TEST, folder=tmp_path, **QUICK)
    assert first.record["made"] == second.record["made"]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    (kept,) = (tmp_path / "models").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"is not the model of this run .*; remove it, and train again"):
        fedlib.federate(small, TRAIN, TEST, folder=tmp_path, **QUICK)
    third = fedlib.federate(small, (TRAIN[0] + 1, TRAIN[1]), TEST, folder=tmp_path, **QUICK)
    assert third.record["data"] != first.record["data"] and third.accuracy != first.accuracy


NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x){}
"""


def module(folder: Path, text: str) -> ModuleType:
    file = folder / f"net{len(list(folder.glob('net*.py')))}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    found = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_code_of_one_s_own_is_part_of_the_digest(tmp_path: Path) -> None:
    one, other, same = (module(tmp_path, NETWORK.format(end)) for end in ("", " * 2", ""))
    codes = [fedlib.federate(m.Net, TRAIN, TEST, **QUICK).record["code"] for m in (one, other, same)]
    assert codes[0] != codes[1] and codes[0] == codes[2]
    hidden: dict[str, Any] = {}
    exec(NETWORK.format(""), hidden)
    run = fedlib.federate(hidden["Net"], TRAIN, TEST, folder=tmp_path, **QUICK)
    assert run.record["code"].endswith("?")
    (file,) = tmp_path.glob("records/own/lab/*.json")
    written = file.stat().st_mtime_ns
    fedlib.federate(hidden["Net"], TRAIN, TEST, folder=tmp_path, **QUICK)
    assert file.stat().st_mtime_ns > written, "whether it is fresh cannot be known"


def smoothed(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y, label_smoothing=0.1)


def test_a_loss_of_one_s_own_is_part_of_the_digest_whichever_the_network_is() -> None:
    """And beside integers there is an accuracy, also where a data set of torch gives them."""
    plain = fedlib.federate("mlp256", IMAGES, TEST_IMAGES, **QUICK)
    own = fedlib.federate("mlp256", IMAGES, TEST_IMAGES, loss=smoothed, **QUICK)
    assert plain.record["data"] != own.record["data"] and plain.record["code"] == own.record["code"]
    sets = [torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y)) for x, y in (TRAIN, TEST)]
    assert 0 < fedlib.federate(small, *sets, loss=smoothed, **QUICK).accuracy < 1


def test_the_tables_are_left_as_they_were() -> None:
    before = set(registry.MODELS), set(sets.ENTRIES)
    fedlib.federate("mlp256", (IMAGES[0], IMAGES[1]), TEST_IMAGES, **QUICK)
    with pytest.raises(SpecError):
        fedlib.federate(small, TRAIN, TEST, method="nothing")
    assert (set(registry.MODELS), set(sets.ENTRIES)) == before and not build.CARRIED


def test_the_example_of_the_docstring() -> None:
    found = doctest.testmod(federate, extraglobs={"torch": torch})
    assert found.attempted > 4 and not found.failed
