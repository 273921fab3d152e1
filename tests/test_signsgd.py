"""SignSGD, and what all methods share that compress an update after local training (fedlib.methods.update_codec).

The oracles are numbers worked by hand and FedAvg's local training written with a plain torch optimizer.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import make_task

from fedlib.core import client as client_side
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, NoUpdate, Uploads
from fedlib.errors import PayloadError
from fedlib.methods import fedavg, update_codec
from fedlib.methods.baselines import signsgd
from fedlib.rng import Rng
from fedlib.runs.spec import Spec
from fedlib.wire import bits, container, floats

CPU, HYPER = torch.device("cpu"), signsgd.Hyper()
Shard = tuple[Tensor, Tensor]


def convolutional() -> nn.Sequential:
    """Weights 2 x 4 x 3 x 3 and 64 x 3; BatchNorm and a bias travel beside them."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def images(count: int, seed: int = 0) -> Shard:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def layers_task(*shapes: tuple[int, ...], batch: int = 4) -> Task:
    """Weights of the given shapes and nothing else."""
    task = make_task(nn.Sequential(), Plan(epochs=1, batch=batch, lr=0.1))
    task.weights.update({str(index): torch.Size(shape) for index, shape in enumerate(shapes)})
    return task


def plain_training(network: nn.Module, shard: Shard, plan: Plan, rng: Rng) -> State:
    """FedAvg's local training with torch's own optimizer; the batches are those of `rng`."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=plan.lr)
    order = rng.child("order").torch()
    for _ in range(plan.epochs):
        permutation = torch.randperm(len(shard[0]), generator=order)
        for start in range(0, len(permutation), plan.batch):
            index = permutation[start : start + plan.batch]
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(network(shard[0][index]), shard[1][index]))
            optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def client(state: State, shard: Shard, task: Task, rng: Rng) -> bytes:
    return client_side.client(signsgd, signsgd.broadcast(state, HYPER, task), shard, HYPER, task, rng)


def server(state: State, task: Task, *messages: Buffer) -> State:
    return signsgd.server(state, Uploads(enumerate(messages)), HYPER, task)


def sections(u: Tensor, task: Task) -> list[memoryview]:
    return [memoryview(bytes(part)) for part in signsgd.encode(u, HYPER, task, Rng(0))]


# Coding


def test_message_worked_by_hand() -> None:
    """Layer scales 2, 0.25 and 0: the means of |1 -2 3 -2|, |0.5 0| and |0 -0|. A zero counts as positive."""
    task = layers_task((2, 2), (1, 2), (2, 1))
    u = torch.tensor([1.0, -2.0, 3.0, -2.0, 0.5, 0.0, 0.0, -0.0])
    signs, scales = sections(u, task)
    assert bytes(signs) == bytes([0b11110101])
    assert np.frombuffer(scales, "<f4").tolist() == [2.0, 0.25, 0.0]
    assert signsgd.decode([signs, scales], HYPER, task).tolist() == [2, -2, 2, -2, 0.25, 0.25, 0, 0]
    assert signsgd.paper_bits(b"", HYPER, task) == 8 + 3 * 32


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6), st.lists(st.floats(-1, 1, width=32), min_size=3)
)
def test_every_entry_has_its_sign_and_its_layer_s_mean_size(first: list[float], second: list[float]) -> None:
    task = layers_task((2, 3), (1, len(second)))
    u = torch.tensor(first + second, dtype=torch.float32)
    found = signsgd.decode(sections(u, task), HYPER, task)
    for own, part in ((first, found[:6]), (second, found[6:])):
        size = float(np.abs(np.array(own, np.float32)).astype(np.float64).mean())
        assert part.tolist() == pytest.approx([size if v >= 0 else -size for v in own], rel=1e-5, abs=1e-30)


def test_of_all_scales_the_mean_comes_nearest() -> None:
    """The mean of |u| minimises ||s sign(u) - u||: a scale a little off is worse, in each layer for itself."""
    task = layers_task((10, 10), (5, 10))
    u = torch.randn(150, generator=torch.Generator().manual_seed(0)) * torch.cat(
        [torch.ones(100), torch.full((50,), 9)]
    )
    found = signsgd.decode(sections(u, task), HYPER, task)
    for part in (slice(0, 100), slice(100, 150)):
        best = float((found[part] - u[part]).norm())
        assert all(float((found[part] * factor - u[part]).norm()) > best for factor in (0.98, 1.02))


SIGNS, SCALES = bytes([0b00110101]), np.array([1, 2], "<f4").tobytes()
BAD = {
    "signs missing": (b"", SCALES, "bits: 0 bytes, expected 1"),
    "signs too long": (SIGNS * 2, SCALES, "bits: 2 bytes, expected 1"),
    "padding set": (bytes([0b01110101]), SCALES, "only its lowest 6 bits"),
    "a scale missing": (SIGNS, SCALES[:4], "4 bytes, expected 8"),
    "a scale more": (SIGNS, SCALES + bytes(4), "12 bytes, expected 8"),
    "part of a scale": (SIGNS, SCALES[:7], "7 bytes, expected 8"),
    "negative": (SIGNS, np.array([1, -2], "<f4").tobytes(), "scales: -2.0, expected none below 0"),
    "not a number": (SIGNS, np.array([math.nan, 1], "<f4").tobytes(), "scales: value 0 is nan"),
    "infinite": (SIGNS, np.array([1, math.inf], "<f4").tobytes(), "scales: value 1 is inf"),
}


@pytest.mark.parametrize("signs, scales, complaint", BAD.values(), ids=BAD)
def test_sections_that_nobody_sends_are_refused(signs: bytes, scales: bytes, complaint: str) -> None:
    """Alone, and inside an upload with a right checksum: then the round goes on without it."""
    task = layers_task((2, 2), (1, 2))
    good = signsgd.decode([memoryview(SIGNS), memoryview(SCALES)], HYPER, task)
    assert good.tolist() == [1, -1, 1, -1, 2, 2]
    with pytest.raises(PayloadError, match=complaint):
        signsgd.decode([memoryview(signs), memoryview(scales)], HYPER, task)
    fingerprint = task.fingerprint("signsgd", HYPER)
    uploads = Uploads(
        (k, container.pack("signsgd.up", fingerprint, 3, [*parts, b""]))
        for k, parts in enumerate([(signs, scales), (SIGNS, SCALES)])
    )
    zero = {name: torch.zeros(shape) for name, shape in task.weights.items()}
    after = signsgd.server(zero, uploads, HYPER, task)
    assert uploads.accepted == [1] and [k for k, _ in uploads.refused] == [0]
    assert after["0"].flatten().tolist() == [1, -1, 1, -1] and after["1"].tolist() == [[2, 2]]


def test_uploads_of_others_are_refused() -> None:
    task = make_task(convolutional(), Plan(epochs=1, batch=8, lr=0.1))
    state, fingerprint = task.initial(), task.fingerprint("signsgd", HYPER)
    good = client(state, images(9), task, Rng(0))
    signs, scales, full = container.unpack(good, "signsgd.up", fingerprint, [10**6] * 3).sections
    values = np.frombuffer(full, "<f4").copy()
    values[-1] = math.nan
    plain = fedavg.Hyper()
    bad: list[Buffer] = [
        container.pack("signsgd.up", fingerprint, 9, [signs, scales, values.tobytes()]),
        container.pack("signsgd.up", fingerprint, 9, [signs, scales, full[:-4]]),
        container.pack("signsgd.up", fingerprint, 9, [signs, scales]),
        container.pack("signsgd.up", fingerprint, 0, [signs, scales, full]),
        container.pack("signsgd.up", bytes(8), 9, [signs, scales, full]),
        client_side.client(fedavg, fedavg.broadcast(state, plain, task), images(9), plain, task, Rng(0)),
        signsgd.broadcast(state, HYPER, task),
        *(good[:n] for n in (0, 4, len(good) // 2, len(good) - 1)),
        *(good[:n] + bytes([good[n] ^ 4]) + good[n + 1 :] for n in range(0, len(good), 11)),
    ]
    uploads = Uploads([*enumerate(bad), (1000, good)])
    found = signsgd.server(state, uploads, HYPER, task)
    assert uploads.accepted == [1000] and len(uploads.refused) == len(bad)
    expected = server(state, task, good)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(NoUpdate):
        signsgd.server(state, Uploads(enumerate(bad)), HYPER, task)


# Whole rounds


def test_round_worked_by_hand() -> None:
    """One step at zero, learning rate 0.3; the gradient is (softmax - one-hot) x, as in FedAvg's test.

    Client A, one sample:    u = ( 0.2, -0.1, -0.1), mean size 0.4 / 3
    Client B, three samples: u = (-0.2,  0.4, -0.2), mean size 0.8 / 3
    Weighted by 1 : 3, in units of 0.1 / 3: (4 - 24, -4 + 24, -4 - 24) / 4 = (-5, 5, -7)
    """
    task = make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=0.3))
    zero = {"weight": torch.zeros(3, 1)}
    a = client(zero, (torch.ones(1, 1), torch.tensor([0])), task, Rng(0))
    b = client(zero, (torch.full((3, 1), 2.0), torch.tensor([1, 1, 1])), task, Rng(1))
    for messages, expected in (((a,), (4, -4, -4)), ((b,), (-8, 8, -8)), ((a, b), (-5, 5, -7)), ((b, a), (-5, 5, -7))):
        found = server(zero, task, *messages)["weight"].flatten().tolist()
        assert found == pytest.approx([v / 30 for v in expected], rel=1e-6)


def test_round_equals_a_plain_one() -> None:
    """Convolution, BatchNorm, biases; unequal shards with a last, smaller batch; three epochs."""
    task = make_task(convolutional(), plan := Plan(epochs=3, batch=5, lr=0.05))
    counts, before = (23, 11), task.initial()
    found = server(before, task, *(client(before, images(n, seed=n), task, Rng(n)) for n in counts))
    after = [plain_training(task.network, images(n, seed=n), plan, Rng(n)) for n in counts]
    assert found.keys() == after[0].keys()
    for name in found:
        if name in task.weights:
            moved = [model[name] - before[name] for model in after]
            means = [u.abs().mean() * torch.where(u < 0, -1.0, 1.0) for u in moved]
            expected = before[name] + (23 * means[0] + 11 * means[1]) / 34
        else:
            expected = (23 * after[0][name] + 11 * after[1][name]) / 34
        torch.testing.assert_close(found[name], expected)
        assert not torch.equal(found[name], before[name])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [1, 8, 13])
def test_upload_in_bytes(bias: bool, columns: int) -> None:
    """d = 3 columns + 6 weights in two layers: ceil(d / 8) bytes of signs, 4 a layer, 4 an entry that is no weight."""
    network = nn.Sequential(nn.Linear(columns, 3, bias=bias), nn.Linear(3, 2, bias=bias))
    task = make_task(network, Plan(epochs=1, batch=4, lr=0.1))
    upload = client(task.initial(), (torch.ones(2, columns), torch.tensor([0, 1])), task, Rng(0))
    expected = (math.ceil((3 * columns + 6) / 8), 8, 20 if bias else 0)
    assert container.section_sizes(upload) == expected and len(signsgd.SECTIONS) == 3
    assert 0 < len(upload) - sum(expected) <= 64
    assert signsgd.paper_bits(upload, HYPER, task) == 3 * columns + 6 + 64


def test_upload_on_digits_is_a_27th_of_fedavg_s(tiny: Callable[..., Spec]) -> None:
    task, plain = Task.of(tiny(), CPU), fedavg.Hyper()
    upload = client(task.initial(), task.shard(0), task, Rng(0))
    assert container.section_sizes(upload) == (592, 8, 0)
    full = client_side.client(fedavg, fedavg.broadcast(task.initial(), plain, task), task.shard(0), plain, task, Rng(0))
    assert len(full) / len(upload) > 27


# What the methods share


@pytest.mark.parametrize("seed", [0, 1])
def test_local_training_of_u_is_fedavg_s_of_w(seed: int) -> None:
    task = make_task(convolutional(), plan := Plan(epochs=3, batch=5, lr=0.1))
    message = signsgd.broadcast(task.initial(), HYPER, task)
    trainable, frozen = signsgd.start(message, HYPER, task, Rng(seed))
    assert not trainable["u"].any() and len(trainable["u"]) == 72 + 192
    w = frozen["w"].clone()
    client_side.train(signsgd, trainable, frozen, images(23), HYPER, task, Rng(seed))
    assert torch.equal(frozen["w"], w), "w is frozen"
    expected = plain_training(task.network, images(23), plan, Rng(seed))
    found = update_codec.layers(w + trainable["u"].detach(), task)
    found |= {name: tensor.detach() for name, tensor in (trainable | frozen).items() if name not in ("u", "w")}
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)
    assert float(trainable["u"].detach().norm()) > 0.1


def test_layers_are_views_in_the_network_s_order() -> None:
    task = layers_task((2, 3), (1, 2), (2, 1, 1, 2))
    flat = torch.arange(12.0)
    parts = update_codec.layers(flat, task)
    assert {name: part.shape for name, part in parts.items()} == task.weights
    assert [part.flatten().tolist() for part in parts.values()] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
    parts["1"][0, 1] = -1
    assert flat[7] == -1
    with pytest.raises(RuntimeError):
        update_codec.layers(torch.zeros(11), task)


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
    task = layers_task((1, 2), (1, 1), batch=batch)
    task.vectors["bias"] = torch.Size([1])
    clients = [([1.0, 0.0, 0.0], 1), ([0.0, 1.0, 0.0], 9), ([0.0, 0.0, 1.0], 4)]
    sent = [({"u": torch.tensor(u), "bias": torch.tensor([float(n)])}, n) for u, n in clients]
    state = {"0": torch.tensor([[10.0, 20.0]]), "1": torch.tensor([[30.0]]), "bias": torch.tensor([99.0])}
    before = copy.deepcopy(state)
    uploads = Uploads((k, bytes([k])) for k in range(3))
    found = update_codec.add_mean(state, uploads, lambda upload: sent[upload[0]], task, by_batches)
    a, b, c = (weight / sum(weights) for weight in weights)
    torch.testing.assert_close(found["0"], torch.tensor([[10 + a, 20 + b]]))
    torch.testing.assert_close(found["1"], torch.tensor([[30 + c]]))
    torch.testing.assert_close(found["bias"], torch.tensor([a * 1 + b * 9 + c * 4]))
    assert all(torch.equal(state[name], before[name]) for name in before), "the old state is left alone"


def test_mean_leaves_refused_uploads_out() -> None:
    task = layers_task((1, 1))

    def read(upload: Buffer) -> tuple[State, int]:
        if upload[0] == 1:
            raise PayloadError("broken")
        return {"u": torch.tensor([float(upload[0])])}, 2 if upload[0] else 0

    arrivals: list[tuple[int, Any]] = [(7, b"\1"), (8, b"\5"), (9, PayloadError("diverged")), (4, b"\2"), (5, b"\0")]
    uploads = Uploads(arrivals)
    found = update_codec.add_mean({"0": torch.zeros(1, 1)}, uploads, read, task)
    assert found["0"].item() == 3.5 and uploads.accepted == [8, 4]
    assert [reason for _, reason in uploads.refused] == ["broken", "diverged", "upload stands for no training sample"]
    with pytest.raises(NoUpdate):
        update_codec.add_mean({"0": torch.zeros(1, 1)}, Uploads(arrivals[:1]), read, task)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_update_that_is_not_finite_is_not_sent(value: float) -> None:
    u = torch.zeros(6)
    u[4] = value
    with pytest.raises(PayloadError, match="not finite: local training diverged; lower the learning rate"):
        signsgd.finish({"u": u}, {}, 1, HYPER, layers_task((2, 3)), Rng(0))


def test_diverged_training_is_not_sent() -> None:
    task = make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=1e30))
    shard = (torch.full((1, 1), 1e30), torch.tensor([0]))
    with pytest.raises(PayloadError, match="diverged"):
        client({"weight": torch.zeros(3, 1)}, shard, task, Rng(0))


def test_bias_that_is_not_finite_is_not_sent() -> None:
    task = layers_task((1, 2))
    task.vectors["bias"] = torch.Size([2])
    with pytest.raises(PayloadError, match="bias: value 1 is inf"):
        signsgd.finish({"u": torch.zeros(2), "bias": torch.tensor([0, math.inf])}, {}, 1, HYPER, task, Rng(0))


def test_update_whose_mean_size_overflows_is_not_sent() -> None:
    with pytest.raises(PayloadError, match="value 0 is inf"):
        signsgd.finish({"u": torch.full((6,), 3e38)}, {}, 1, HYPER, layers_task((2, 3)), Rng(0))


def test_broadcast_is_the_whole_model_and_nothing_else_is_read_as_one() -> None:
    task = make_task(convolutional(), Plan(epochs=1, batch=8, lr=0.1))
    message, state = signsgd.broadcast(task.initial(), HYPER, task), task.initial()
    trainable, frozen = signsgd.start(message, HYPER, task, Rng(0))
    assert torch.equal(frozen["w"], torch.cat([state[name].flatten() for name in task.weights]))
    assert all(torch.equal((trainable | frozen)[name].detach(), state[name]) for name in task.vectors | task.statistics)
    assert trainable.keys() == {"u"} | task.vectors.keys() and frozen.keys() == {"w"} | task.statistics.keys()
    assert all(t.requires_grad for t in trainable.values()) and not any(t.requires_grad for t in frozen.values())
    upload = client(state, images(9), task, Rng(0))
    for bad in (
        upload,
        message[:-1],
        message[:40] + bytes([message[40] ^ 1]) + message[41:],
        fedavg.broadcast(state, fedavg.Hyper(), task),
    ):
        with pytest.raises(PayloadError):
            signsgd.start(bad, HYPER, task, Rng(0))


def test_the_signs_are_packed_as_masks_are() -> None:
    """So that a reader of one format reads the other."""
    task, u = layers_task((3, 7)), torch.randn(21, generator=torch.Generator().manual_seed(1))
    signs, scales = sections(u, task)
    assert bytes(signs) == bits.pack(u.numpy() > 0)
    assert bytes(scales) == floats.encode([np.array([u.abs().mean()], np.float32)]).tobytes()
