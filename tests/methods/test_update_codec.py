"""What all methods share that compress an update after local training (fedlib.methods.update_codec).

The oracle is FedAvg's local training written with a plain torch optimizer.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small_task import (
    HUGE,
    NONE,
    ZERO,
    begun,
    convolutional,
    flat,
    images,
    layers_task,
    line_task,
    make_task,
    plain_training,
    received,
    sent,
    served,
    state_of,
    train,
    trained,
    uploaded,
)
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Local
from fedlib.core.plan import Plan, layers
from fedlib.core.uploads import Buffer, NoUpdate, Update, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.baselines.drive import Drive, Eden
from fedlib.methods.baselines.fedsparsify import FedSparsify
from fedlib.methods.baselines.signsgd import SignSGD, SignVote
from fedlib.methods.baselines.terngrad import TernGrad
from fedlib.methods.baselines.topk import TopK
from fedlib.methods.fedmrn import FedMRN
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import container, entropy

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
        update: Update | PayloadError = self.updates[upload[0]]
        if isinstance(update, PayloadError):
            raise update
        return update

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
    vector = torch.arange(12.0)
    parts = layers(vector, task.weights)
    assert {name: part.shape for name, part in parts.items()} == task.weights
    assert [part.flatten().tolist() for part in parts.values()] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
    parts["1"][0, 1] = -1
    assert vector[7] == -1
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
    updates = tuple(({"u": torch.tensor(u), "2": torch.tensor([float(n)])}, n) for u, n in clients)
    method = Told(updates=updates, by_batches=by_batches).bind(layers_task((1, 2), (1, 1), (1,), batch=batch))
    model = {"0": torch.tensor([[10.0, 20.0]]), "1": torch.tensor([[30.0]]), "2": torch.tensor([99.0])}
    before = copy.deepcopy(model)
    found = served(method, *(bytes([k]) for k in range(3)), model=model)
    a, b, c = (weight / sum(weights) for weight in weights)
    torch.testing.assert_close(found["0"], torch.tensor([[10 + a, 20 + b]]))
    torch.testing.assert_close(found["1"], torch.tensor([[30 + c]]))
    torch.testing.assert_close(found["2"], torch.tensor([a * 1 + b * 9 + c * 4]))
    assert all(torch.equal(model[name], before[name]) for name in before), "the old state is left alone"


def test_mean_leaves_refused_uploads_out() -> None:
    updates = [PayloadError("broken"), *(({"u": torch.tensor([u])}, n) for u, n in ((5.0, 2), (2.0, 2), (0.0, 0)))]
    method = Told(updates=tuple(updates)).bind(layers_task((1, 1)))
    arrivals: list[tuple[int, Any]] = [(7, b"\0"), (8, b"\1"), (9, PayloadError("diverged")), (4, b"\2"), (5, b"\3")]
    uploads = Uploads(arrivals)
    found = method.aggregate(state_of(method), uploads).model
    assert found["0"].item() == 3.5 and uploads.accepted == [8, 4]
    assert [reason for _, reason in uploads.refused] == ["broken", "diverged", "upload stands for no training sample"]
    with pytest.raises(NoUpdate):
        served(method, b"\0")


def test_broadcast_is_the_whole_model() -> None:
    method = SignSGD().bind(make_task(convolutional(), Plan(epochs=1, batch=8, lr=0.1)))
    local, model, task = begun(method), method.task.initial(), method.task
    assert torch.equal(local.frozen["w"], flat(model, task))
    here = local.trainable | local.frozen
    assert all(torch.equal(here[name].detach(), model[name]) for name in task.vectors | task.statistics)
    assert local.trainable.keys() == {"u"} | task.vectors.keys()
    assert local.frozen.keys() == {"w"} | task.statistics.keys()
    assert all(t.requires_grad for t in local.trainable.values())
    assert not any(t.requires_grad for t in local.frozen.values())


# Every codec

MEANS = {
    "signsgd": SignSGD(),
    "terngrad": TernGrad(),
    "values": TopK(budget="values"),
    "indices": TopK(),
    "drive": Drive(),
    "eden": Eden(),
}
CODECS = {**MEANS, "signvote": SignVote(), "fedmrn": FedMRN(), "fedsparsify": FedSparsify()}
each_mean = pytest.mark.parametrize("codec", MEANS.values(), ids=MEANS)
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@each_mean
def test_round_equals_one_without_a_server(codec: UpdateCodec[None]) -> None:
    """Convolution, BatchNorm, biases; unequal shards with a last, smaller batch; the mean from the trained tensors."""
    method = codec.bind(make_task(convolutional(), Plan(epochs=3, batch=5, lr=0.05)))
    counts, model = (23, 11), method.task.initial()
    shards, places = [images(n, seed=n) for n in counts], [Rng(n) for n in counts]
    ends = [trained(method, shard, place) for shard, place in zip(shards, places, strict=True)]
    uploads = [method.upload(local, NONE, place) for local, place in zip(ends, places, strict=True)]
    moves = [received(method, local.trainable["u"].detach(), place) for local, place in zip(ends, places, strict=True)]
    found = served(method, *uploads)
    step = layers((23 * moves[0] + 11 * moves[1]) / 34, method.task.weights)
    a, b = (local.trainable | local.frozen for local in ends)
    expected = {name: model[name] + step[name] for name in step}
    expected |= {name: ((23 * a[name] + 11 * b[name]) / 34).detach() for name in method.task.others}
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
        assert not torch.equal(found[name], model[name])
    assert uploaded(method, shards[0], places[0]) == uploads[0], "the same client sends the same bytes again"
    assert len(container.section_sizes(uploads[0])) == len(method.sections)


@each_mean
def test_update_of_zeros(codec: UpdateCodec[None]) -> None:
    method = codec.bind(layers_task((4, 8), (8, 9)))
    model = {name: torch.ones(shape) for name, shape in method.task.weights.items()}
    after = served(method, sent(method, torch.zeros(104), 2), model=model)
    assert all(torch.equal(after[name], model[name]) for name in model)


@each_codec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_update_that_is_not_finite_is_not_sent(codec: UpdateCodec[None], value: float) -> None:
    u = torch.zeros(32)
    u[7] = value
    with pytest.raises(PayloadError, match="u is not finite: local training diverged; lower the learning rate"):
        sent(codec.bind(layers_task((4, 8))), u)


@each_mean
def test_diverged_training_is_not_sent(codec: UpdateCodec[None]) -> None:
    with pytest.raises(PayloadError, match="diverged"):
        uploaded(codec.bind(line_task(lr=1e30)), HUGE, Rng(0), ZERO)


def test_bias_that_is_not_finite_is_not_sent() -> None:
    method = SignSGD().bind(layers_task((1, 2), (2,)))
    local = begun(method)
    local.trainable["1"] = torch.tensor([0, math.inf])
    with pytest.raises(PayloadError, match="1: value 1 is inf"):
        method.upload(local, NONE, Rng(0))


@pytest.mark.parametrize(
    ("codec", "complaint"),
    [(SignSGD(), "value 0 is inf"), (Drive(), "scale: value 0 is nan"), (Eden(), "value 0 is nan")],
)
def test_update_whose_scale_overflows_is_not_sent(codec: UpdateCodec[None], complaint: str) -> None:
    with pytest.raises(PayloadError, match=complaint):
        sent(codec.bind(layers_task((8, 8))), torch.full((64,), 3e38))


# Malformed sections


def float32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


PLACES = np.arange(17)
GOOD: dict[str, list[bytes]] = {  # of 17 weights in two layers
    "signsgd": [bytes([0b00110101, 0, 1]), float32(1, 2)],
    "terngrad": [entropy.encode(PLACES % 3, 3, np.repeat([0, 1], [4, 13])), float32(1, 2)],
    "values": [entropy.encode(PLACES == 5, 2), float32(-3)],
    "drive": [bytes(8), bytes(4), float32(0.5)],
    "eden": [bytes(8), bytes(4), float32(0.5)],
}
REFUSED: dict[str, list[tuple[int, bytes, str]]] = {
    "signsgd": [
        (0, bytes(4), "bits: 4 bytes, expected 3"),
        (0, bytes([0, 0, 2]), "only its lowest 1 bits"),
        (1, float32(1), "4 bytes, expected 8"),
        (1, float32(1, -2), "scales: -2.0, expected none below 0"),
        (1, float32(math.nan, 1), "scales: value 0 is nan"),
    ],
    "terngrad": [
        (0, b"", "no bytes"),
        (0, b"\0" + b"\xff" * 4 + b"\3", "found 3"),
        (0, b"\0\0\0", "2 bytes, expected 5"),
        (0, b"\2", "counts of|install the package"),
        (1, float32(-1, 1), "expected none below 0"),
    ],
    "values": [
        (0, entropy.encode(PLACES < 0, 2), "positions: 0, expected 1"),
        (0, entropy.encode(PLACES < 3, 2), "positions: 3, expected 1"),
        (0, b"\0\0", "1 bytes, expected 3"),
        (1, float32(-3, 0), "8 bytes, expected 4"),
        (1, float32(math.inf), "values: value 0 is inf"),
    ],
    "drive": [
        (0, bytes(7), "seed of 7 bytes where 8 were expected"),
        (1, bytes(3), "bits: 3 bytes, expected 4 for 32 entries"),
        (2, bytes(8), "floats: 8 bytes, expected 4"),
        (2, float32(math.nan), "scale: value 0 is nan"),
        (2, float32(-0.5), "scale: -0.5, expected 0 to 6"),
        (2, float32(7e37), r"scale: 7e\+37, expected 0 to 6"),
    ],
}
REFUSED["eden"] = REFUSED["drive"]
EVERY = [(name, *case) for name, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize(
    ("name", "index", "part", "complaint"), EVERY, ids=[f"{name}: {text}" for name, *_, text in EVERY]
)
def test_what_is_refused_is_named(name: str, index: int, part: bytes, complaint: str) -> None:
    method = MEANS[name].bind(layers_task((2, 2), (1, 13)))
    parts = [memoryview(good) for good in GOOD[name]]
    assert method.decode(parts, None).isfinite().all()
    parts[index] = memoryview(part)
    with pytest.raises(PayloadError, match=complaint):
        method.decode(parts, None)
