"""What cannot be federated is answered in one sentence, before training starts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedlib
from fedlib.errors import FedlibError

X, Y = np.zeros((40, 6), np.float32), np.arange(40) % 3
X[:] = np.random.default_rng(0).normal(size=X.shape)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3))


def changed(array: np.ndarray, place: Any, value: Any) -> np.ndarray:
    found = array.astype(type(value)) if isinstance(value, float) else array.copy()
    found[place] = value
    return found


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class Counting(Pair):
    """Changes a buffer that nobody sends."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.seen += 1
        found: Tensor = self.layer(x)
        return found


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3), nn.Dropout())


def frozen() -> nn.Module:
    return small().requires_grad_(False)


def fails(output: Tensor, y: Tensor) -> Tensor:
    raise KeyError("nothing")


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"train": (X[:-1], Y)}, "train: 39 samples in x and 40 in y"),
    "no sample": ({"test": (X[:0], Y[:0])}, "test: no sample"),
    "no test": ({"test": None}, "test: NoneType given; expected a pair (x, y)"),
    "nan": ({"train": (changed(X, (7, 2), np.nan), Y)}, "train x: nan at [7, 2]"),
    "infinite": ({"test": (changed(X, (0, 1), np.inf), Y)}, "test x: inf at [0, 1]"),
    "labels as floats": ({"train": (X, changed(Y, 5, 0.9))}, "train y: 0.9 at [5], no integer labels"),
    "whole floats": ({"train": (X, Y.astype(float))}, "train y: floats, no integer labels; cast them"),
    "labels as words": ({"train": (X, np.array(["a", "b"] * 20))}, "train y: no numbers"),
    "labels from 1": ({"train": (X, Y + 1)}, "labels: 3 occurs, but the network has 3 outputs, for labels 0 to 2"),
    "negative": ({"train": (X, changed(Y, 3, -1))}, "train y: -1 at [3]; labels count from 0"),
    "padding": ({"train": (X, changed(Y, 3, -100))}, "train y: -100 at [3]; labels count from 0; -100, for padding"),
    "flat x": ({"train": (X[:, 0], Y)}, "train x: shape [40]"),
    "other shape": ({"test": (X[:, :5], Y)}, "test x: [5] of float32 a sample, where train has [6] of float32"),
    "other width": ({"network": nn.Linear(5, 3)}, "network: it cannot take samples of shape [6]"),
    "integer images": ({"train": (np.ones((40, 6), int), Y), "test": (np.ones((4, 6), int), Y[:4])}, "make it float"),
    "no module": ({"network": 3}, "network: 3 is no torch.nn.Module"),
    "no such name": ({"network": "resnet"}, "network: 'resnet' is unknown; allowed: cnn2"),
    "no module made": ({"network": lambda: 5}, "network: the function gives int"),
    "half": ({"network": small().half()}, "network: 0.weight is torch.float16; call float()"),
    "elsewhere": ({"network": small().to("meta")}, "network: 0.weight is on meta; move the module to the CPU"),
    "nothing to train": ({"network": frozen}, "network: no parameter to train"),
    "a tuple": ({"network": Pair}, "network: gives tuple; expected one tensor"),
    "a changing buffer": ({"network": Counting}, "network: buffer seen changes in training"),
    "loss that is no scalar": ({"loss": lambda o, y: o.sum(1)}, "loss: gives [2]; expected one number"),
    "loss that is no number": ({"loss": lambda o, y: "a"}, "loss: gives str; expected one number"),
    "metric that raises": ({"metrics": {"odd": fails}}, "odd: raises KeyError on an output of shape [2, 3]"),
    "empty client": ({"partition": [np.arange(40), []]}, "partition[1]: expected at least one place"),
    "far place": ({"partition": [[0, 40]]}, "partition[0]: 40; train has places 0 to 39"),
    "count and lists": ({"partition": [[0], [1]], "clients": 3}, "clients: 3, but partition or owners name 2"),
    "owners and lists": ({"partition": [[0]], "owners": Y}, "owners: given with a partition; give one of them"),
    "few owners": ({"owners": Y[:5]}, "owners: shape [5]; expected one for each of 40"),
    "no such partition": ({"partition": "fair"}, "partition: 'fair' is unknown; allowed: dirichlet, iid"),
    "partition without kind": ({"partition": {"beta": 0.3}}, "partition: {'beta': 0.3} has no \"kind\"; one of"),
    "no partition": ({"partition": 5}, "partition: 5; give a kind, or for each client"),
    "no clients": ({"clients": 0}, "clients: 0 must be"),
    "ranks": ({"engine": "ranks"}, "engine: ranks is for python -m fedlib run"),
    "too many clients": ({"clients": 50}, "clients: 50 are too many for the 40 training samples"),
    "no such method": ({"method": "sgd"}, "method: 'sgd' is unknown; allowed: drive"),
    "no such setting": ({"method": "fedmrn", "settings": {"mass": 1}}, "unknown key 'mass'; allowed: coding"),
    "no such argument": ({"batch": 5}, "batch: unknown argument; allowed: network, train"),
    "no such data": ({"train": "mnist", "test": None}, "data: unknown data set 'mnist'"),
    "data with a test": ({"train": "digits"}, "test: given beside the data set 'digits'"),
    "named data with a loss": (
        {"train": "digits", "test": None, "loss": nn.functional.cross_entropy},
        "loss: given beside",
    ),
    "rate": ({"lr": 0}, "lr: 0 must be a number"),
    "engine": (
        {"network": lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout()), "engine": "stacked"},
        "engine: stacked",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_answered_in_one_sentence(name: str) -> None:
    given, words = CASES[name]
    arguments: dict[str, Any] = {"network": small, "train": (X, Y), "test": (X, Y), "clients": 4, "rounds": 1} | given
    if "partition" in given and "clients" not in given:
        arguments.pop("clients")
    with pytest.raises(FedlibError) as raised:
        fedlib.federate(**arguments)
    assert words in str(raised.value), raised.value
    assert "\n" not in str(raised.value)


COMPARED: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"methods": "fedavg"}, "methods: 'fedavg'; give names in a list"),
    "none": ({"methods": {}}, "methods: {}; give names in a list"),
    "no arguments": ({"methods": {"FedAvg": "fedavg"}}, "methods: 'FedAvg' has 'fedavg'; give arguments"),
    "no seeds": ({"methods": ["fedavg"], "seeds": ()}, "seeds: none; give at least one"),
    "one seed": ({"methods": ["fedavg"], "seed": 3}, "seed: the same for all in a comparison"),
    "a label of its own": ({"methods": {"a": {"method": "fedavg", "label": "b"}}}, "label: the same for all"),
}


@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_that_cannot_be_made(name: str) -> None:
    given, words = COMPARED[name]
    with pytest.raises(FedlibError) as raised:
        fedlib.compare(small, (X, Y), (X, Y), **{"clients": 4, "rounds": 1, **given})
    assert words in str(raised.value), raised.value


def test_good_input_is_not_refused() -> None:
    assert 0 <= fedlib.federate(small, (X, Y), (X, Y), clients=4, rounds=1, engine="process").accuracy <= 1
