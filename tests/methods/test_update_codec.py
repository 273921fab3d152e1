"""What all methods share that compress an update after local training (fedlib.methods.update_codec), mostly on SignSGD.

The oracle is FedAvg's local training written with a plain torch optimizer.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_task import (
    NONE,
    begun,
    convolutional,
    images,
    layers_task,
    make_task,
    plain_training,
    served,
    state_of,
    train,
    uploaded,
)
from torch import Tensor, nn
from typing_extensions import override

from fedlib.core.method import Local
from fedlib.core.plan import Plan, layers
from fedlib.core.uploads import Buffer, NoUpdate, Update, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.baselines.drive import Drive, Eden
from fedlib.methods.baselines.signsgd import SignSGD
from fedlib.methods.baselines.terngrad import TernGrad
from fedlib.methods.baselines.topk import TopK
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, kw_only=True)
class Told(UpdateCodec[None]):
    """An upload is one byte, the place of what it says."""

    name = "told"
    sections = ("place", "full precision")

    updates: tuple[Any, ...] = ()
    by_batches: bool = False

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> Sequence[Section]:
        raise NotImplementedError

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        raise NotImplementedError

    @override
    def read(self, upload: Buffer, own: None) -> Update:
        if isinstance(found := self.updates[upload[0]], PayloadError):
            raise found
        tensors: Update = found
        return tensors

    @override
    def weight(self, samples: int) -> int:
        return -(-samples // self.task.plan.batch) if self.by_batches else samples


@pytest.mark.parametrize("seed", [0, 1])
def test_local_training_of_u_is_fedavg_s_of_w(seed: int) -> None:
    method = SignSGD().bind(make_task(network := convolutional(), plan := Plan(epochs=3, batch=5, lr=0.1)))
    local = begun(method, images(23), Rng(seed))
    assert not local.trainable["u"].any() and len(local.trainable["u"]) == 72 + 192
    w = local.frozen["w"].clone()
    train(method, local, images(23), Rng(seed))
    assert torch.equal(local.frozen["w"], w), "w is frozen"
    expected = plain_training(network, images(23), plan, Rng(seed))
    found = layers(w + local.trainable["u"].detach(), method.task.weights)
    here = local.trainable | local.frozen
    found |= {name: tensor.detach() for name, tensor in here.items() if name not in ("u", "w")}
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)
    assert float(local.trainable["u"].detach().norm()) > 0.1


def test_layers_are_views_in_the_network_s_order() -> None:
    task = layers_task((2, 3), (1, 2), (2, 1, 1, 2))
    flat = torch.arange(12.0)
    parts = layers(flat, task.weights)
    assert {name: part.shape for name, part in parts.items()} == task.weights
    assert [part.flatten().tolist() for part in parts.values()] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
    parts["1"][0, 1] = -1
    assert flat[7] == -1
    with pytest.raises(RuntimeError):
        layers(torch.zeros(11), task.weights)


@pytest.mark.parametrize(
    ("batch", "by_batches", "weights"),
    [
        (4, False, (1, 9, 4)),
        (4, True, (1, 3, 1)),  # 1, 9 and 4 samples in batches of 4: the last batch is kept
        (9, True, (1, 1, 1)),
        (1, True, (1, 9, 4)),
    ],
)
def test_mean_by_samples_and_by_batches(batch: int, by_batches: bool, weights: tuple[int, int, int]) -> None:
    clients = [([1.0, 0.0, 0.0], 1), ([0.0, 1.0, 0.0], 9), ([0.0, 0.0, 1.0], 4)]
    sent = tuple(({"u": torch.tensor(u), "2": torch.tensor([float(n)])}, n) for u, n in clients)
    method = Told(updates=sent, by_batches=by_batches).bind(layers_task((1, 2), (1, 1), (1,), batch=batch))
    model = {"0": torch.tensor([[10.0, 20.0]]), "1": torch.tensor([[30.0]]), "2": torch.tensor([99.0])}
    before = copy.deepcopy(model)
    found = served(method, *(bytes([k]) for k in range(3)), model=model)
    a, b, c = (weight / sum(weights) for weight in weights)
    torch.testing.assert_close(found["0"], torch.tensor([[10 + a, 20 + b]]))
    torch.testing.assert_close(found["1"], torch.tensor([[30 + c]]))
    torch.testing.assert_close(found["2"], torch.tensor([a * 1 + b * 9 + c * 4]))
    assert all(torch.equal(model[name], before[name]) for name in before), "the old state is left alone"


def test_mean_leaves_refused_uploads_out() -> None:
    sent = [PayloadError("broken"), *(({"u": torch.tensor([u])}, n) for u, n in ((5.0, 2), (2.0, 2), (0.0, 0)))]
    method = Told(updates=tuple(sent)).bind(layers_task((1, 1)))
    arrivals: list[tuple[int, Any]] = [(7, b"\0"), (8, b"\1"), (9, PayloadError("diverged")), (4, b"\2"), (5, b"\3")]
    uploads = Uploads(arrivals)
    found = method.aggregate(state_of(method), uploads).model
    assert found["0"].item() == 3.5 and uploads.accepted == [8, 4]
    assert [reason for _, reason in uploads.refused] == ["broken", "diverged", "upload stands for no training sample"]
    with pytest.raises(NoUpdate):
        served(method, b"\0")


# Updates that are not sent

CODECS = [SignSGD(), TernGrad(), TopK(budget="values"), TopK(), Drive(), Eden()]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=["signsgd", "terngrad", "values", "indices", "drive", "eden"])


def finished(method: UpdateCodec[None], u: Tensor, **others: Tensor) -> bytes:
    """The upload of a client that has trained to `u`."""
    return method.upload(Local({"u": u, **others}, {}, 1), NONE, Rng(0))


@each_codec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_update_that_is_not_finite_is_not_sent(codec: UpdateCodec[None], value: float) -> None:
    u = torch.zeros(32)
    u[7] = value
    with pytest.raises(PayloadError, match="not finite: local training diverged; lower the learning rate"):
        finished(codec.bind(layers_task((4, 8))), u)


@each_codec
def test_diverged_training_is_not_sent(codec: UpdateCodec[None]) -> None:
    method = codec.bind(make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=1e30)))
    with pytest.raises(PayloadError, match="diverged"):
        uploaded(method, (torch.full((1, 1), 1e30), torch.tensor([0])), Rng(0), {"weight": torch.zeros(3, 1)})


def test_bias_that_is_not_finite_is_not_sent() -> None:
    with pytest.raises(PayloadError, match="1: value 1 is inf"):
        finished(SignSGD().bind(layers_task((1, 2), (2,))), torch.zeros(2), **{"1": torch.tensor([0, math.inf])})


def test_update_whose_mean_size_overflows_is_not_sent() -> None:
    with pytest.raises(PayloadError, match="value 0 is inf"):
        finished(SignSGD().bind(layers_task((2, 3))), torch.full((6,), 3e38))


def test_broadcast_is_the_whole_model() -> None:
    method = SignSGD().bind(make_task(convolutional(), Plan(epochs=1, batch=8, lr=0.1)))
    local, model, task = begun(method), method.task.initial(), method.task
    assert torch.equal(local.frozen["w"], torch.cat([model[name].flatten() for name in task.weights]))
    here = local.trainable | local.frozen
    assert all(torch.equal(here[name].detach(), model[name]) for name in task.vectors | task.statistics)
    assert local.trainable.keys() == {"u"} | task.vectors.keys()
    assert local.frozen.keys() == {"w"} | task.statistics.keys()
    assert all(t.requires_grad for t in local.trainable.values())
    assert not any(t.requires_grad for t in local.frozen.values())
