"""FedDQ's clients and server, and whole rounds on digits.

Numbers are the properties of its specification (section 7.3). The oracles are torch's own
optimizer and loss, FedAvg, and sums in float64 of what the messages say.
"""

import dataclasses
import logging
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feddq_runs import ENGINE, begin, headers, meant, sections, trained
from torch import Tensor, nn

from fedlib.core.plan import Tensors, count
from fedlib.core.task import Task
from fedlib.core.uploads import Uploads
from fedlib.data import images, partition, sets
from fedlib.errors import PayloadError, SpecError
from fedlib.models import cnn, initializers
from fedlib.models.registry import MODELS
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container, levels

pytestmark = pytest.mark.usefixtures("one_thread")
MakeSpec = Callable[..., Spec]
SPOILT = 5  # the client whose images are huge in data set "spoilt"
UNEQUAL = {"kind": "dirichlet", "beta": 0.3, "seed": 7}
each_model = pytest.mark.parametrize("model", ["biased", "normed"])


def biased(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Convolution and linear layer with biases."""
    layers = [nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, classes)]
    return initializers.normal_weights(nn.Sequential(*layers), deviation=0.2, root=root)


def spoilt_digits(folder: Path) -> images.Arrays:
    x, y, test_x, test_y = images.read_digits(folder)
    x = x.astype(np.float32)
    x[partition.iid(y, 10, 1)[SPOILT]] *= 1e30
    return x, y, test_x, test_y


@pytest.fixture(scope="module", autouse=True)
def small_world() -> Iterator[None]:
    """Networks and a data set of this file's own, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "biased", biased)
        patch.setitem(MODELS, "normed", cnn.normed("normed", (4, 6), 1, deviation=0.3))
        spoilt = dataclasses.replace(sets.ENTRIES["digits"], name="spoilt", read=spoilt_digits)
        patch.setitem(sets.ENTRIES, "spoilt", spoilt)
        yield


@pytest.fixture
def make(tiny: MakeSpec) -> MakeSpec:
    return lambda **more: tiny(**{"method": "feddq", "model": "biased", "momentum": 0.5, **more})


# Schedules that follow the loss


@pytest.mark.parametrize("schedule", ["ascending", "loss"])
def test_a_loss_of_zero_in_the_first_round(make: MakeSpec, schedule: str) -> None:
    run = begin(make(hyper={"schedule": schedule}))
    method, state = run.method, run.state
    (upload,) = run.uploads(run.message, 1, [3])
    silent = container.pack("feddq.up", method.fingerprint(), 7, [*sections(upload)[:3], bytes(4)])
    for _ in range(2):
        state = method.aggregate(state, Uploads([(3, silent)]))
        assert 1 <= state.own.intervals <= 65535
    method.aggregate(state, Uploads([(3, upload)]))


@pytest.mark.parametrize("more", [{"first": 9, "most": 3}, {"quantizer": "norm", "most": 15, "first": 65535}])
@pytest.mark.parametrize("schedule", ["ascending", "loss"])
def test_11_most_bounds_the_first_round_too(make: MakeSpec, schedule: str, more: dict[str, Any]) -> None:
    """Or the settings are refused, in words."""
    try:
        spec = make(hyper={"schedule": schedule, **more})
    except SpecError as error:
        assert "hyper.first" in str(error)
        return
    run = begin(spec)
    (upload,) = run.uploads(run.message, 1, [3])
    sign = run.method.quantizer == "norm"
    assert max(width for width, *_ in headers(upload)) <= run.method.most + sign


def loss_of(task: Task, model: Tensors, which: int) -> float:
    """Mean cross-entropy of the network itself, in evaluation mode, in float64."""
    network, (x, y) = task.network.eval(), task.shard(which)
    with torch.no_grad():
        logits: Tensor = torch.func.functional_call(network, model, (x,)).double()
        return float((logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean())


@pytest.mark.parametrize("downlink", [0.0, 0.05])
@pytest.mark.parametrize("model", ["biased", "normed", "mlp"])
def test_losses_are_those_of_the_received_model(make: MakeSpec, model: str, downlink: float) -> None:
    """Weighted by samples, of which clients have between 57 and 235."""
    run = begin(make(model=model, partition=UNEQUAL, hyper={"schedule": "ascending", "downlink": downlink}))
    method, state, task = run.method, run.state, run.job.task
    clients, first = [0, 1, 2, 8], 0.0
    for number in (1, 2, 3):
        message = method.broadcast(state)
        model_read, intervals = method.read_broadcast(message)
        found = run.uploads(message, number, clients)
        losses, sizes = [loss_of(task, model_read, c) for c in clients], [len(task.shard(c)[1]) for c in clients]
        for upload, expected in zip(found, losses, strict=True):
            assert struct.unpack("<f", sections(upload)[3])[0] == pytest.approx(expected, rel=1e-5)
        mean = float(np.average(losses, weights=sizes))
        first = first or mean
        assert intervals == state.own.intervals and (intervals == 2 or number > 1)
        state = method.aggregate(state, Uploads(enumerate(found)))
        assert state.own.loss == pytest.approx(mean, rel=1e-5)
        assert method.notes(state)["loss"] == state.own.loss
        assert state.own.intervals == math.ceil(2 * math.sqrt(first / mean)), "the next round's"
    assert len(set(sizes)) == 4


def test_11_widths_of_a_run_follow_the_schedule(make: MakeSpec) -> None:
    """All tensors of all clients have ceil(log2(s + 1)) bits and levels up to s; s = s_0 in the first round."""
    run = begin(make(hyper={"schedule": "ascending", "first": 5}, lr=0.3))
    state, seen = run.state, []
    sizes = [shape.numel() for shape in run.job.task.tensors.values()]
    for number in range(1, 5):
        s = state.own.intervals
        seen.append(s)
        for upload in run.uploads(run.method.broadcast(state), number, [0, 1]):
            head, body, *_ = sections(upload)
            found = levels.unpack(memoryview(head), memoryview(body), sizes, False)
            assert {t.width for t in found} == {math.ceil(math.log2(s + 1))}
            assert {int(t.levels.max()) for t in found} <= {s, s - 1}
        state, _ = run.one_round(state, number)
    assert seen[:2] == [5, 5] and seen == sorted(seen) and seen[-1] > 5


# Bytes of a round


@each_model
@pytest.mark.parametrize("biases", ["sent", "kept"])
@pytest.mark.parametrize(
    "more", [{}, {"schedule": "fixed", "width": 9}, {"schedule": "loss", "first": 255}, {"report": True}]
)
def test_06_bytes_of_a_round(make: MakeSpec, model: str, biases: str, more: dict[str, Any]) -> None:
    run = begin(make(model=model, hyper={"biases": biases, **more}))
    method, task, message = run.method, run.job.task, run.message
    shapes = task.tensors if biases == "sent" else task.weights
    assert list(shapes) == list(method.uploaded)
    cohort = rounds.draw_cohort(run.spec, task, 1)
    sizes, expected, bits = [shape.numel() for shape in shapes.values()], 0, 0
    for upload in run.uploads(message, 1, cohort):
        found = [width for width, *_ in headers(upload)]
        expected += sum(9 + math.ceil(d * b / 8) for d, b in zip(sizes, found, strict=True))
        bits += sum(d * b for d, b in zip(sizes, found, strict=True))
    parts: dict[str, int] = {}
    _, entry = run.one_round(run.state, 1, parts)
    assert parts["headers"] == 9 * len(sizes) * len(cohort) and parts["headers"] + parts["levels"] == expected
    assert parts["scales"] == 0 and parts["loss"] == 4 * len(cohort) * method.reports
    assert 0 < parts["container"] <= 64 * len(cohort)
    assert entry["uplink_bytes"] == sum(parts.values()) and entry["paper_bits"] == bits
    assert entry["downlink_bytes"] == len(cohort) * len(message)
    assert 4 * count(task.tensors) < len(message) <= 4 * count(task.tensors) + 4 + 64
    assert list(entry["notes"]["widths"]) == list(shapes) and ("loss" in entry["notes"]) == method.reports
    assert method.reports == ("report" in more or method.schedule == "loss")


@each_model
def test_kept_biases_keep_their_initial_values(make: MakeSpec, model: str) -> None:
    """7.1, pitfall 1: clients train them, the server never hears of it."""
    run, other = begin(make(model=model, hyper={"biases": "kept"}, lr=0.3)), begin(make(model=model, lr=0.3))
    task, before, state = run.job.task, run.state.model, run.state
    local = trained(run.job, run.message, 1, 0).local
    for number in (1, 2, 3):
        state, _ = run.one_round(state, number)
    own = local.trainable | local.frozen
    for name in task.tensors:
        if name not in task.weights:
            assert torch.equal(state.model[name], before[name]) and not torch.equal(own[name], before[name])
        else:
            assert not torch.equal(state.model[name], before[name])
    sent, _ = other.one_round(other.state, 1)
    assert all(not torch.equal(sent.model[name], before[name]) for name in task.tensors)


# The server


@each_model
@pytest.mark.parametrize("more", [{}, {"quantizer": "affine_nearest", "resolution": 1e-5}])
def test_server_adds_the_mean_by_samples(make: MakeSpec, model: str, more: dict[str, Any]) -> None:
    run = begin(make(model=model, partition=UNEQUAL, hyper=more))
    task, before, clients = run.job.task, run.state.model, [0, 1, 2]
    found = run.uploads(run.message, 1, clients)
    new = run.method.aggregate(run.state, Uploads(enumerate(found)))
    weights = np.array([len(task.partition.indices(c)) for c in clients]) / 445
    assert weights.sum() == 1
    each = [meant(upload, task.tensors) for upload in found]
    for name in task.tensors:
        mean = sum(w * x[name] for w, x in zip(weights, each, strict=True))
        np.testing.assert_allclose(new.model[name].numpy(), before[name].double().numpy() + mean, rtol=1e-6, atol=1e-7)
    heads = np.array([headers(upload) for upload in found])
    assert new.own.widths == pytest.approx(weights @ heads[:, :, 0], rel=1e-6)
    ranges = np.array([[x[name].max() - x[name].min() for name in task.tensors] for x in each])
    assert new.own.ranges == pytest.approx(weights @ ranges, rel=1e-5)


def test_a_running_variance_below_0_becomes_0(make: MakeSpec) -> None:
    """7.1, pitfall 6. All else, a running mean and a scale included, may be negative."""
    run = begin(make(model="normed"))
    method, task = run.method, run.job.task
    none = (torch.zeros(0), torch.zeros(7))
    local = method.begin(run.message, none, Rng(0))
    for name in task.tensors:
        tensor = (local.trainable | local.frozen)[name]
        tensor.detach()[0] = -5 - float(local.frozen[f"from {name}"].abs().max())
    new = method.aggregate(run.state, Uploads([(0, method.upload(local, none, Rng(0)))])).model
    for name in task.tensors:
        if name.endswith("running_var"):
            assert new[name][0] == 0 and bool((new[name][1:] > 0.9).all())
        else:
            assert float(new[name].min()) < -4


@each_model
def test_10_sixteen_bits_agree_with_fedavg(make: MakeSpec, model: str) -> None:
    more: dict[str, Any] = dict(model=model, momentum=0.5, partition=UNEQUAL)
    run, plain = begin(make(hyper={"schedule": "fixed", "width": 16}, **more)), begin(make(method="fedavg", **more))
    task, before = run.job.task, run.state.model
    each = [meant(u, task.tensors) for u in run.uploads(run.message, 1, rounds.draw_cohort(run.spec, task, 1))]
    found, expected = run.one_round(run.state, 1)[0].model, plain.one_round(plain.state, 1)[0].model
    for name in task.tensors:
        span = max(float(x[name].max() - x[name].min()) for x in each)
        assert float((found[name] - expected[name]).abs().max()) < 2**-15 * span
        assert float((found[name] - before[name]).abs().max()) > 0.01 * span, "it has moved"


@each_model
def test_downlink_is_quantized_to_the_nearest_and_the_server_keeps_its_own(make: MakeSpec, model: str) -> None:
    run = begin(make(model=model, hyper={"downlink": 0.05, "quantizer": "affine_nearest", "resolution": 1e-4}))
    method, task, state = run.method, run.job.task, run.state
    sizes = [len(task.shard(c)[1]) for c in (1, 2)]
    for number in (1, 2):
        message, before = method.broadcast(state), state.model
        head, body, intervals = sections(message)
        found, exact = method.read_broadcast(message)[0], meant(message, task.tensors)
        for name, (width, _, step) in zip(task.tensors, headers(message), strict=True):
            span = float(before[name].max() - before[name].min())
            assert width == (min(16, max(2, math.ceil(math.log2(span / 0.05)))) if span else 0)
            assert float((found[name] - before[name]).abs().max()) <= step / 2 * (1 + 1e-5) + 1e-7
            np.testing.assert_allclose(found[name].numpy(), exact[name], rtol=1e-6, atol=1e-7)
        assert len(intervals) == 4 and len(message) - len(head) - len(body) - 4 <= 64
        each = run.uploads(message, number, [1, 2])
        state = method.aggregate(state, Uploads(enumerate(each)))
        one, other = (meant(upload, task.tensors) for upload in each)
        for name, tensor in state.model.items():
            mean = (one[name] * sizes[0] + other[name] * sizes[1]) / sum(sizes)
            np.testing.assert_allclose(tensor.numpy(), before[name].double().numpy() + mean, rtol=1e-6, atol=1e-7)
    assert float((found["0.weight"] - state.model["0.weight"]).abs().max()) > 1e-3, "the resolution is coarse"


# Determinism, and a client that diverges


def test_09_codes_depend_on_seed_round_client_and_tensor_alone(make: MakeSpec) -> None:
    run = begin(make())
    method, task, message = run.method, run.job.task, run.message
    forth, back = (dict(ENGINE.train(run.job, message, 1, order)) for order in ([4, 1, 7], [7, 0, 4, 1]))
    assert {which: back[which] for which in forth} == forth
    x, none = torch.linspace(-1, 1, 36), (torch.zeros(0), torch.zeros(7))

    def drawn(seed: int, *names: Any) -> tuple[bytes, bytes]:
        """Levels of the same update in both weights, drawn at another place."""
        local = method.begin(message, none, Rng(0))
        for name in task.weights:
            local.frozen[f"from {name}"].zero_()
            local.trainable[name].detach().zero_().view(-1)[:36] = x
        body = sections(method.upload(local, none, Rng(seed).child(*names)))[1]
        return body[:36], body[41:77]

    places = [(0, "client", 1, 4), (1, "client", 1, 4), (0, "client", 2, 4), (0, "client", 1, 5)]
    assert method.width_for(2.0) == 9, "36 lower bytes, 36 upper bits, and the next tensor"
    assert len({part for place in places for part in drawn(*place)}) == 8 and drawn(*places[0]) == drawn(*places[0])


@pytest.mark.parametrize(
    "hyper", [{}, {"schedule": "ascending"}, {"schedule": "fixed", "quantizer": "norm", "most": 15}]
)
def test_a_client_whose_update_is_not_finite_is_refused(
    make: MakeSpec, hyper: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(make(data="spoilt", hyper=hyper, cohort=10))
    assert isinstance(ENGINE.client(run.job, run.message, 1, SPOILT), PayloadError)
    with caplog.at_level(logging.WARNING):
        new, entry = run.one_round(run.state, 1)
    assert sorted(entry["clients"]) == [which for which in range(10) if which != SPOILT]
    assert [which for which, _ in entry["refused"]] == [SPOILT] and "not finite" in entry["refused"][0][1]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in new.model.values())
    assert np.isfinite([*new.own.widths, *new.own.ranges, new.own.loss]).all()


# Momentum


@pytest.mark.parametrize("method", ["feddq", "fedavg"])
def test_momentum_is_that_of_torch_s_sgd(make: MakeSpec, method: str) -> None:
    """Two epochs of a client, which restart from nothing in each round."""
    spec, job, state = begin(make(method=method, momentum=0.9, epochs=2, lr=0.05))
    x, y = job.task.shard(3)
    for number in (1, 2):
        local = trained(job, job.method.broadcast(state), number, 3).local
        network = biased(1, 8, 10, Rng(spec.seed))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        order, steps = Rng(0).child("client", number, 3).child("order").torch(), 0
        for _ in range(2):
            for batch in torch.randperm(len(x), generator=order).split(32):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(network(x[batch]), y[batch]))
                optimizer.step()
                steps += 1
        assert steps >= 10
        for name, parameter in network.named_parameters():
            assert torch.equal(local.trainable[name], parameter)
            assert not torch.equal(parameter, state.model[name])


# Regression


# Widths by round, client and tensor (convolution, linear layer, their biases).
REGRESSION = {
    1: {1: [6, 4, 5, 5], 2: [6, 4, 4, 5], 3: [6, 4, 5, 5], 6: [6, 4, 5, 5]},
    2: {0: [5, 5, 4, 4], 3: [5, 4, 4, 3], 4: [6, 5, 4, 4], 9: [6, 4, 4, 4]},
    3: {0: [6, 5, 4, 4], 1: [6, 5, 4, 3], 3: [6, 5, 4, 4], 4: [6, 5, 4, 2]},
}


def test_12_widths_of_three_rounds(make: MakeSpec) -> None:
    run = begin(make(hyper={"resolution": 0.01}, lr=0.2))
    state = run.state
    for number, expected in REGRESSION.items():
        cohort = rounds.draw_cohort(run.spec, run.job.task, number)
        each = run.uploads(run.method.broadcast(state), number, cohort)
        found = {which: [w for w, *_ in headers(upload)] for which, upload in zip(cohort, each, strict=True)}
        assert found == expected
        state, _ = run.one_round(state, number)
