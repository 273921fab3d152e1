"""FedDQ: the rule for the width, the schedules, the server, and whole rounds on digits.

Numbers are the properties of its specification (shared/papers/feddq.md, section 7.3); 1 to 5 and 8 are in
test_quantizers.py, 6 and bad messages in test_levels.py. The oracles are exact fractions, torch's own optimizer and
loss, FedAvg, and sums in float64 of what the messages say.
"""

import dataclasses
import logging
import math
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from fedlib.core.client import run_client, train
from fedlib.core.plan import State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Uploads
from fedlib.data import images, partition, sets
from fedlib.engines.in_process import InProcess, task_of
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import fedavg, registry
from fedlib.methods.feddq import method as feddq
from fedlib.methods.feddq import quantizers
from fedlib.methods.feddq.method import Hyper
from fedlib.models import cnn, initializers
from fedlib.models.registry import MODELS
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container, levels

untimed = settings(deadline=None)
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
widths = st.integers(1, 16)
arrays = hnp.arrays(np.float32, st.integers(2, 30), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))
SPOILT = 5  # the client whose images are huge in data set "spoilt"
each_model = pytest.mark.parametrize("model", ["biased", "normed"])


def biased(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Convolution and linear layer with biases."""
    layers = [nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, classes)]
    return initializers.normal_weights(nn.Sequential(*layers), deviation=0.2, root=root)


def normed(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """With BatchNorm and without biases."""
    return initializers.normal_weights(cnn._blocks((4, 6), 1, channels, side, classes), deviation=0.3, root=root)


def spoilt_digits(folder: Path) -> images.Arrays:
    x, y, test_x, test_y = images.read_digits(folder)
    x = x.astype(np.float32)
    x[partition.iid(y, 10, 1)[SPOILT]] *= 1e30
    return x, y, test_x, test_y


@pytest.fixture(scope="module", autouse=True)
def small_world() -> Iterator[None]:
    """Networks and a data set of this file's own, by name; one thread, as `rounds.run` sets it."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "biased", biased)
        patch.setitem(MODELS, "normed", normed)
        spoilt = dataclasses.replace(sets.ENTRIES["digits"], name="spoilt", read=spoilt_digits)
        patch.setitem(sets.ENTRIES, "spoilt", spoilt)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture
def make(tiny: MakeSpec) -> MakeSpec:
    return lambda **more: tiny(**{"method": "feddq", "model": "biased", "momentum": 0.5, **more})


def begin(spec: Spec) -> tuple[Task, Hyper, State, bytes]:
    task, hyper = task_of(spec.key(), CPU), registry.hyper(spec.method, spec.hyper)
    state = registry.initial(spec, task)
    return task, hyper, state, feddq.broadcast(state, hyper, task)


def uploads(spec: Spec, task: Task, message: bytes, round: int, clients: list[int]) -> list[bytes]:
    found = [run_client(spec, task, message, round, client) for client in clients]
    assert all(isinstance(upload, bytes) for upload in found)
    return found  # type: ignore[return-value]


def sections(message: bytes) -> list[bytes]:
    sizes = container.section_sizes(message)
    ends = np.cumsum(sizes) + len(message) - 4 - sum(sizes)
    return [message[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]


def meant(message: bytes, shapes: dict[str, torch.Size]) -> dict[str, np.ndarray]:
    """An affine, packed upload's update in float64, read bit by bit."""
    head, body, *_ = sections(message)
    found, start = {}, 0
    for (name, shape), (width, low, step) in zip(shapes.items(), struct.iter_unpack("<Bff", head), strict=True):
        n, k = shape.numel(), np.zeros(shape.numel())
        for shift, w in ((0, min(width, 8)), (8, width - 8)):
            if w > 0:
                size = -(-n * w // 8)
                run = np.unpackbits(np.frombuffer(body[start : start + size], np.uint8), count=n * w, bitorder="little")
                k += (run.reshape(n, w) @ (1 << np.arange(w))) * 2.0**shift
                start += size
        found[name] = (low + k * step).reshape(shape)
    assert start == len(body)
    return found


# 7.3: property 7, and the rest of 8; 3.3 and 7.2: the rule


def test_07_equals_the_released_scripts_and_exact_arithmetic() -> None:
    ratios = 2 ** np.random.default_rng(0).uniform(1, 16, 1000)
    found = []
    for ratio, rho in zip(ratios.tolist(), np.resize([0.005, 0.001, 0.01], 1000).tolist(), strict=True):
        span = ratio * rho
        found.append(feddq.width(span, Hyper(resolution=rho)))
        assert found[-1] == int(np.ceil(np.log2(span / rho)))
        assert Fraction(rho) * 2 ** (found[-1] - 1) < Fraction(span) <= Fraction(rho) * 2 ** found[-1]
    assert set(found) == set(range(2, 17))


@untimed
@given(st.floats(1e-20, 1e20), st.floats(1e-20, 1e20), st.floats(1e-6, 1e3), widths, widths)
def test_07_monotone_clamped_and_one_bit_a_doubling(a: float, b: float, rho: float, one: int, other: int) -> None:
    least, most = sorted((one, other))
    hyper, coarser = (Hyper(resolution=r, least=least, most=most) for r in (rho, 2 * rho))
    low, high = (feddq.width(span, hyper) for span in sorted((a, b)))
    assert least <= low <= high <= most
    if least < low < most:
        assert feddq.width(min(a, b), coarser) == low - 1
    if least < high < most:
        assert feddq.width(max(a, b) * 8, hyper) == min(most, high + 3)


@untimed
@given(arrays, st.floats(0.001, 10))
def test_07_step_is_at_most_four_thirds_of_the_resolution(values: np.ndarray, rho: float) -> None:
    x = torch.from_numpy(values)
    span = quantizers.extent(x)[1]
    assume(1e-20 < span <= rho * 2**16)
    found, _ = feddq.quantized(x, 0, Hyper(resolution=rho), Rng(0))
    assert found.second <= 4 / 3 * rho * (1 + 1e-6)
    if span > 2 * rho:
        assert found.second > rho / 2
    double, _ = feddq.quantized(x * 2, 0, Hyper(resolution=rho), Rng(0))
    assert double.width == min(16, found.width + 1) or span <= 2 * rho, "8: the width follows log2 of the scale"


@pytest.mark.parametrize("power", [2, 4, 8, 16])
@pytest.mark.parametrize("rho", [0.005, 0.001, 0.3, 2.0**-9])
def test_07_exact_powers_of_two(power: int, rho: float) -> None:
    """ceil of an exact integer is that integer; the next number above needs one bit more (4: the float after it)."""
    hyper = Hyper(resolution=rho, least=1)
    assert feddq.width(power * rho, hyper) == int(math.log2(power))
    assert feddq.width(power * rho * (1 + 1e-12), hyper) == int(math.log2(power)) + 1


@pytest.mark.parametrize(
    "span, hyper, expected",
    [
        (0.0, Hyper(), 0),
        (9e-31, Hyper(resolution=1e-12), 0),
        (1.1e-30, Hyper(), 2),
        (1e-9, Hyper(), 2),
        (0.005, Hyper(), 2),
        (0.005, Hyper(least=1), 1),
        (0.02, Hyper(least=5), 5),
        (0.0201, Hyper(), 3),
        (327.68, Hyper(), 16),
        (328.0, Hyper(), 16),
        (1e30, Hyper(), 16),
        (1e30, Hyper(most=7), 7),
    ],
)
def test_rule_at_its_bounds(span: float, hyper: Hyper, expected: int) -> None:
    assert feddq.width(span, hyper) == expected


@pytest.mark.parametrize("quantizer", quantizers.AFFINE)
@pytest.mark.parametrize("values", [[0.25] * 3, [-7.5], [0.0], [1e-31, 0.0], [2.0**127] * 2])
def test_a_constant_tensor_takes_no_bits_and_comes_back(quantizer: str, values: list[float]) -> None:
    """7.2: no range, one entry, or a range below 1e-30."""
    x = torch.tensor(values)
    for schedule in ("range", "fixed", "ascending", "loss"):
        found, _ = feddq.quantized(x, 5, Hyper(quantizer=quantizer, schedule=schedule), Rng(0))
        assert (found.width, found.second, found.levels.size) == (0, 0, 0)
        assert quantizers.restored(found, len(x), quantizer).tolist() == pytest.approx(values, abs=1e-30)
        assert (levels.pack([found], False), len(levels.headers([found]))) == (b"", 9)


def test_an_empty_tensor_is_skipped() -> None:
    """7.2: 0 entries take no levels."""
    found, _ = feddq.quantized(torch.zeros(0), 0, Hyper(), Rng(0))
    assert found.levels.size == 0 and quantizers.restored(found, 0, "affine_stochastic").shape == (0,)


# Schedules


@untimed
@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(1, 300), st.integers(9, 16))
def test_11_schedules_follow_the_loss(first: float, a: float, b: float, s: int, most: int) -> None:
    """ceil(s_0 sqrt(f_0 / f)), never less for a smaller loss; the mirror image never more, nor below 3."""
    ascending, loss = (Hyper(schedule=name, first=s, most=most) for name in ("ascending", "loss"))
    high, low = first * max(a, b), first * min(a, b)
    found = [feddq.next_intervals(f, first, ascending) for f in (first, high, low)]
    assert found[0] == s and found == sorted(found) and found[2] <= 2**most - 1
    for f, n in zip((first, high, low), found, strict=True):
        exact = s * math.sqrt(first / f)
        assert n == 2**most - 1 <= exact or 0 <= n - exact < 1
    mirrored = [feddq.next_intervals(f, first, loss) for f in (first, high, low)]
    assert mirrored[0] == max(3, s) and mirrored == sorted(mirrored, reverse=True)
    for f, n in zip((first, high, low), mirrored, strict=True):
        exact = s * math.sqrt(f / first)
        assert 0 <= n - exact < 1 or n == 3 > exact


def test_schedules_worked_by_hand() -> None:
    ascending, loss = Hyper(schedule="ascending"), Hyper(schedule="loss", first=255)
    assert [feddq.next_intervals(2.0 / n, 2.0, ascending) for n in (1, 1.01, 2, 4, 4.01, 100)] == [2, 3, 3, 4, 5, 20]
    assert [feddq.next_intervals(2.0 / n, 2.0, loss) for n in (1, 4, 100, 1e6)] == [255, 128, 26, 3]
    assert feddq.next_intervals(0.0, 2.0, ascending) == 65535 and feddq.next_intervals(0.0, 2.0, loss) == 3
    assert feddq.next_intervals(8.0, 2.0, loss) == 510


@pytest.mark.parametrize("schedule", ["ascending", "loss"])
def test_a_loss_of_zero_in_the_first_round(make: MakeSpec, schedule: str) -> None:
    spec = make(hyper={"schedule": schedule})
    task, hyper, state, message = begin(spec)
    (upload,) = uploads(spec, task, message, 1, [3])
    parts = [*sections(upload)[:3], bytes(4)]
    silent = container.pack("feddq.up", task.fingerprint("feddq", hyper), 7, parts)
    for _ in range(2):
        state = feddq.server(state, Uploads([(3, silent)]), hyper, task)
        assert 1 <= float(state["intervals"]) <= 65535
    feddq.server(state, Uploads([(3, upload)]), hyper, task)


@pytest.mark.parametrize("more", [{"first": 9, "most": 3}, {"quantizer": "norm", "most": 15, "first": 65535}])
@pytest.mark.parametrize("schedule", ["ascending", "loss"])
def test_11_most_bounds_the_first_round_too(make: MakeSpec, schedule: str, more: dict[str, Any]) -> None:
    """Or the settings are refused, in words."""
    try:
        spec = make(hyper={"schedule": schedule, **more})
    except SpecError as error:
        assert "hyper.first" in str(error)
        return
    task, hyper, _, message = begin(spec)
    (upload,) = uploads(spec, task, message, 1, [3])
    sign = hyper.quantizer == "norm"
    assert max(width for width, *_ in struct.iter_unpack("<Bff", sections(upload)[0])) <= hyper.most + sign


def loss_of(task: Task, model: State, client: int) -> float:
    """Mean cross-entropy of the network itself, in evaluation mode, in float64."""
    network, (x, y) = task.network.eval(), task.shard(client)
    with torch.no_grad():
        logits: Tensor = torch.func.functional_call(network, model, (x,)).double()
        return float((logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean())


@pytest.mark.parametrize("downlink", [0.0, 0.05])
@pytest.mark.parametrize("model", ["biased", "normed", "mlp"])
def test_losses_are_those_of_the_received_model(make: MakeSpec, model: str, downlink: float) -> None:
    """Weighted by samples, of which clients have between 57 and 235."""
    unequal = {"kind": "dirichlet", "beta": 0.3, "seed": 7}
    spec = make(model=model, partition=unequal, hyper={"schedule": "ascending", "downlink": downlink})
    task, hyper, state, message = begin(spec)
    clients, first = [0, 1, 2, 8], None
    for number in (1, 2, 3):
        message = feddq.broadcast(state, hyper, task)
        model_read = {name: t for name, t in feddq.received(message, hyper, task).items() if name in task.tensors}
        found = uploads(spec, task, message, number, clients)
        losses, sizes = [loss_of(task, model_read, c) for c in clients], [len(task.shard(c)[1]) for c in clients]
        for upload, expected in zip(found, losses, strict=True):
            assert struct.unpack("<f", sections(upload)[3])[0] == pytest.approx(expected, rel=1e-5)
        mean = float(np.average(losses, weights=sizes))
        first = first or mean
        if number == 1:
            assert state["intervals"] == 2
        state = feddq.server(state, Uploads(enumerate(found)), hyper, task)
        assert float(state["loss"]) == pytest.approx(mean, rel=1e-5)
        assert feddq.notes(state, hyper, task)["loss"] == float(state["loss"])
        assert float(state["intervals"]) == math.ceil(2 * math.sqrt(first / mean)), "the next round's"
    assert len(set(sizes)) == 4


def test_11_widths_of_a_run_follow_the_schedule(make: MakeSpec) -> None:
    """All tensors of all clients have ceil(log2(s + 1)) bits and levels up to s; s = s_0 in the first round."""
    spec = make(hyper={"schedule": "ascending", "first": 5}, lr=0.3)
    task, hyper, state, _ = begin(spec)
    seen = []
    for number in range(1, 5):
        s = int(state["intervals"])
        seen.append(s)
        for upload in uploads(spec, task, feddq.broadcast(state, hyper, task), number, [0, 1]):
            sizes = [shape.numel() for shape in task.tensors.values()]
            head, body, *_ = sections(upload)
            found = levels.unpack(memoryview(head), memoryview(body), sizes, False)
            assert {t.width for t in found} == {math.ceil(math.log2(s + 1))}
            assert {int(t.levels.max()) for t in found} <= {s, s - 1}
        state, _ = rounds.one_round(spec, task, InProcess(CPU), state, number, {})
    assert seen[:2] == [5, 5] and seen == sorted(seen) and seen[-1] > 5


# Bytes of a round


@each_model
@pytest.mark.parametrize("biases", ["sent", "kept"])
@pytest.mark.parametrize(
    "more", [{}, {"schedule": "fixed", "width": 9}, {"schedule": "loss", "first": 255}, {"report": True}]
)
def test_06_bytes_of_a_round(make: MakeSpec, model: str, biases: str, more: dict[str, Any]) -> None:
    spec = make(model=model, hyper={"biases": biases, **more})
    task, hyper, state, message = begin(spec)
    shapes = task.tensors if biases == "sent" else task.weights
    assert list(shapes) == list(feddq.travelling(hyper, task))
    cohort = rounds.draw_cohort(spec, task, 1)
    sizes, expected, bits = [shape.numel() for shape in shapes.values()], 0, 0
    for upload in uploads(spec, task, message, 1, cohort):
        found = [width for width, *_ in struct.iter_unpack("<Bff", sections(upload)[0])]
        expected += sum(9 + math.ceil(d * b / 8) for d, b in zip(sizes, found, strict=True))
        bits += sum(d * b for d, b in zip(sizes, found, strict=True))
    parts: dict[str, int] = {}
    _, entry = rounds.one_round(spec, task, InProcess(CPU), state, 1, parts)
    assert parts["headers"] == 9 * len(sizes) * len(cohort) and parts["headers"] + parts["levels"] == expected
    assert parts["scales"] == 0 and parts["loss"] == 4 * len(cohort) * hyper.reports
    assert 0 < parts["container"] <= 64 * len(cohort)
    assert entry["uplink_bytes"] == sum(parts.values()) and entry["paper_bits"] == bits
    assert entry["downlink_bytes"] == len(cohort) * len(message)
    assert 4 * count(task.tensors) < len(message) <= 4 * count(task.tensors) + 4 + 64
    assert list(entry["notes"]["widths"]) == list(shapes) and ("loss" in entry["notes"]) == hyper.reports
    assert hyper.reports == ("report" in more or hyper.schedule == "loss")


@each_model
def test_kept_biases_keep_their_initial_values(make: MakeSpec, model: str) -> None:
    """7.1, pitfall 1: clients train them, the server never hears of it."""
    spec = make(model=model, hyper={"biases": "kept"}, lr=0.3)
    task, hyper, before, message = begin(spec)
    trainable, frozen = feddq.start(message, hyper, task, Rng(0))
    train(feddq, trainable, frozen, task.shard(0), hyper, task, Rng(0))
    state = before
    for number in (1, 2, 3):
        state, _ = rounds.one_round(spec, task, InProcess(CPU), state, number, {})
    own = trainable | frozen
    for name in task.tensors:
        if name not in task.weights:
            assert torch.equal(state[name], before[name]) and not torch.equal(own[name], before[name])
        else:
            assert not torch.equal(state[name], before[name])
    sent, _ = rounds.one_round(make(model=model, lr=0.3), task, InProcess(CPU), before, 1, {})
    assert all(not torch.equal(sent[name], before[name]) for name in task.tensors)


# The server


@each_model
@pytest.mark.parametrize("more", [{}, {"quantizer": "affine_nearest", "resolution": 1e-5}])
def test_server_adds_the_mean_by_samples(make: MakeSpec, model: str, more: dict[str, Any]) -> None:
    unequal = {"kind": "dirichlet", "beta": 0.3, "seed": 7}
    spec = make(model=model, partition=unequal, hyper=more)
    task, hyper, state, message = begin(spec)
    clients = [0, 1, 2]
    found = uploads(spec, task, message, 1, clients)
    new = feddq.server(state, Uploads(enumerate(found)), hyper, task)
    weights = np.array([len(task.partition.indices(c)) for c in clients]) / 445
    assert weights.sum() == 1
    each = [meant(upload, task.tensors) for upload in found]
    for name in task.tensors:
        mean = sum(w * x[name] for w, x in zip(weights, each, strict=True))
        np.testing.assert_allclose(new[name].numpy(), state[name].double().numpy() + mean, rtol=1e-6, atol=1e-7)
    heads = np.array([list(struct.iter_unpack("<Bff", sections(upload)[0])) for upload in found])
    assert new["widths"].numpy() == pytest.approx(weights @ heads[:, :, 0], rel=1e-6)
    ranges = np.array([[x[name].max() - x[name].min() for name in task.tensors] for x in each])
    assert new["ranges"].numpy() == pytest.approx(weights @ ranges, rel=1e-5)


def test_a_running_variance_below_0_becomes_0(make: MakeSpec) -> None:
    """7.1, pitfall 6. All else, a running mean and a scale included, may be negative."""
    spec = make(model="normed")
    task, hyper, state, message = begin(spec)
    trainable, frozen = feddq.start(message, hyper, task, Rng(0))
    for name, tensor in (trainable | {n: frozen[n] for n in task.statistics}).items():
        tensor.detach()[0] = -5 - float(frozen[f"from {name}"].abs().max())
    upload = feddq.finish(trainable, frozen, 7, hyper, task, Rng(0))
    new = feddq.server(state, Uploads([(0, upload)]), hyper, task)
    for name in task.tensors:
        if name.endswith("running_var"):
            assert new[name][0] == 0 and bool((new[name][1:] > 0.9).all())
        else:
            assert float(new[name].min()) < -4


@each_model
def test_10_sixteen_bits_agree_with_fedavg(make: MakeSpec, model: str) -> None:
    more: dict[str, Any] = dict(model=model, momentum=0.5, partition={"kind": "dirichlet", "beta": 0.3, "seed": 7})
    spec, plain = make(hyper={"schedule": "fixed", "width": 16}, **more), make(method="fedavg", **more)
    task, _, state, message = begin(spec)
    cohort = rounds.draw_cohort(spec, task, 1)
    each = [meant(upload, task.tensors) for upload in uploads(spec, task, message, 1, cohort)]
    found, _ = rounds.one_round(spec, task, InProcess(CPU), state, 1, {})
    expected, _ = rounds.one_round(plain, task, InProcess(CPU), task.initial(), 1, {})
    for name in task.tensors:
        span = max(float(x[name].max() - x[name].min()) for x in each)
        assert float((found[name] - expected[name]).abs().max()) < 2**-15 * span
        assert float((found[name] - state[name]).abs().max()) > 0.01 * span, "it has moved"


@each_model
def test_downlink_is_quantized_to_the_nearest_and_the_server_keeps_its_own(make: MakeSpec, model: str) -> None:
    spec = make(model=model, hyper={"downlink": 0.05, "quantizer": "affine_nearest", "resolution": 1e-4})
    task, hyper, state, _ = begin(spec)
    for number in (1, 2):
        message = feddq.broadcast(state, hyper, task)
        head, body, intervals = sections(message)
        found = feddq.received(message, hyper, task)
        numbers = dict(zip(task.tensors, struct.iter_unpack("<Bff", head), strict=True))
        exact = meant(message, task.tensors)
        for name, (width, _, step) in numbers.items():
            span = float(state[name].max() - state[name].min())
            assert width == (min(16, max(2, math.ceil(math.log2(span / 0.05)))) if span else 0)
            error = (found[name] - state[name]).abs().max()
            assert float(error) <= step / 2 * (1 + 1e-5) + 1e-7
            np.testing.assert_allclose(found[name].numpy(), exact[name], rtol=1e-6, atol=1e-7)
        assert len(intervals) == 4 and len(message) - len(head) - len(body) - 4 <= 64
        each = uploads(spec, task, message, number, [1, 2])
        new = feddq.server(state, Uploads(enumerate(each)), hyper, task)
        one, other = (meant(upload, task.tensors) for upload in each)
        sizes = [len(task.shard(c)[1]) for c in (1, 2)]
        for name in task.tensors:
            mean = (one[name] * sizes[0] + other[name] * sizes[1]) / sum(sizes)
            np.testing.assert_allclose(new[name].numpy(), state[name].double().numpy() + mean, rtol=1e-6, atol=1e-7)
        state = new
    assert float((found["0.weight"] - state["0.weight"]).abs().max()) > 1e-3, "the resolution is coarse"


# Determinism, and a client that diverges


def test_09_codes_depend_on_seed_round_client_and_tensor_alone(make: MakeSpec) -> None:
    spec = make()
    task, hyper, _, message = begin(spec)
    forth = dict(InProcess(CPU).train(spec, message, 1, [4, 1, 7]))
    back = dict(InProcess(CPU).train(spec, message, 1, [7, 0, 4, 1]))
    assert {client: back[client] for client in forth} == forth
    x = torch.linspace(-1, 1, 36)

    def drawn(seed: int, *names: Any) -> tuple[bytes, bytes]:
        """Levels of the same update in both weights, drawn at another place."""
        trainable, frozen = feddq.start(message, hyper, task, Rng(0))
        for name in task.weights:
            frozen[f"from {name}"].zero_()
            trainable[name].detach().zero_().view(-1)[:36] = x
        body = sections(feddq.finish(trainable, frozen, 7, hyper, task, Rng(seed).child(*names)))[1]
        return body[:36], body[41:77]

    places = [(0, "client", 1, 4), (1, "client", 1, 4), (0, "client", 2, 4), (0, "client", 1, 5)]
    assert feddq.width(2.0, hyper) == 9, "36 lower bytes, 36 upper bits, and the next tensor"
    assert len({part for place in places for part in drawn(*place)}) == 8 and drawn(*places[0]) == drawn(*places[0])


@pytest.mark.parametrize(
    "hyper", [{}, {"schedule": "ascending"}, {"schedule": "fixed", "quantizer": "norm", "most": 15}]
)
def test_a_client_whose_update_is_not_finite_is_refused(
    make: MakeSpec, hyper: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    spec = make(data="spoilt", hyper=hyper, cohort=10)
    task, _, state, message = begin(spec)
    assert isinstance(run_client(spec, task, message, 1, SPOILT), PayloadError)
    with caplog.at_level(logging.WARNING):
        new, entry = rounds.one_round(spec, task, InProcess(CPU), state, 1, {})
    assert sorted(entry["clients"]) == [client for client in range(10) if client != SPOILT]
    assert [client for client, _ in entry["refused"]] == [SPOILT] and "not finite" in entry["refused"][0][1]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in new.values())


# Momentum


@pytest.mark.parametrize("method", [feddq, fedavg])
def test_momentum_is_that_of_torch_s_sgd(make: MakeSpec, method: Any) -> None:
    """Two epochs of a client, which restart from nothing in each round."""
    (name,) = (name for name, module in registry.METHODS.items() if module is method)
    spec = make(method=name, momentum=0.9, epochs=2, lr=0.05)
    task, hyper = task_of(spec.key(), CPU), registry.hyper(spec.method, spec.hyper)
    message = method.broadcast(registry.initial(spec, task), hyper, task)
    x, y = task.shard(3)
    for number in (1, 2):
        rng = Rng(0).child("client", number, 3)
        trainable, frozen = method.start(message, hyper, task, rng)
        train(method, trainable, frozen, (x, y), hyper, task, rng)
        network = biased(1, 8, 10, Rng(spec.seed))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        order, steps = rng.child("order").torch(), 0
        for _ in range(2):
            for batch in torch.randperm(len(x), generator=order).split(32):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(network(x[batch]), y[batch]))
                optimizer.step()
                steps += 1
        assert steps >= 10
        for name, parameter in network.named_parameters():
            assert torch.equal(trainable[name], parameter)
            assert not torch.equal(parameter, task.initial()[name])


# Settings


@pytest.mark.parametrize(
    "hyper, words",
    [
        ({"schedule": "descending"}, "hyper.schedule: 'descending' is unknown; allowed: ascending, fixed, loss, range"),
        ({"schedule": None}, "hyper.schedule: None"),
        ({"quantizer": "qsgd"}, "hyper.quantizer: 'qsgd' is unknown; allowed: affine_nearest, affine_stochastic"),
        ({"biases": False}, "hyper.biases: False is unknown; allowed: kept, sent"),
        ({"coding": "zip"}, "hyper.coding: 'zip' is unknown; allowed: entropy, packed"),
        *[({f: v}, f"hyper.{f}: {v!r} must be an integer") for f in ("least", "most", "width") for v in (0, 17, 2.5)],
        *[({f: True}, f"hyper.{f}: True must be an integer from 1 to") for f in ("least", "most", "width", "first")],
        *[({"first": v}, "must be an integer from 1 to 65535") for v in (0, -2, 65536, 1.5, "2")],
        *[({"resolution": v}, "hyper.resolution: .* must be a number from 1e-12") for v in (0, -1.0, math.nan, "x")],
        *[({"downlink": v}, "hyper.downlink: .* must be a number from 0") for v in (-0.1, math.inf, math.nan, None)],
        ({"downlink": 1e-13}, "hyper.downlink"),
        ({"least": 5, "most": 4}, "hyper.least: 5 exceeds hyper.most: 4"),
        *[({"quantizer": q}, f"hyper.quantizer: '{q}' .* another schedule than range") for q in quantizers.NORMED],
        ({"quantizer": "norm", "schedule": "ascending"}, "hyper.most below 16"),
        ({"quantizer": "norm", "schedule": "fixed", "most": 15, "width": 16}, "hyper.width"),
        ({"report": 1}, "hyper.report: 1 must be true or false"),
        ({"rho": 0.1}, "unknown key 'rho'"),
    ],
)
def test_settings_out_of_range_are_named(make: MakeSpec, hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make(hyper=hyper)


# Regression


# Widths by round, client and tensor (convolution, linear layer, their biases).
REGRESSION = {
    1: {1: [6, 4, 5, 5], 2: [6, 4, 4, 5], 3: [6, 4, 5, 5], 6: [6, 4, 5, 5]},
    2: {0: [5, 5, 4, 4], 3: [5, 4, 4, 3], 4: [6, 5, 4, 4], 9: [6, 4, 4, 4]},
    3: {0: [6, 5, 4, 4], 1: [6, 5, 4, 3], 3: [6, 5, 4, 4], 4: [6, 5, 4, 2]},
}


def test_12_widths_of_three_rounds(make: MakeSpec) -> None:
    spec = make(hyper={"resolution": 0.01}, lr=0.2)
    task, hyper, state, _ = begin(spec)
    for number, expected in REGRESSION.items():
        message, found = feddq.broadcast(state, hyper, task), {}
        for client in rounds.draw_cohort(spec, task, number):
            (upload,) = uploads(spec, task, message, number, [client])
            found[client] = list(sections(upload)[0][::9])
        assert found == expected
        state, _ = rounds.one_round(spec, task, InProcess(CPU), state, number, {})
