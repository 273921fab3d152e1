"""TernGrad and Top-k: rounds worked by hand, their laws, whole rounds on digits, and payloads that nobody sent."""

import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlib.core import client as client_side
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.data.partition import Partition
from fedlib.errors import PayloadError, SpecError
from fedlib.methods.baselines import terngrad, topk
from fedlib.rng import Rng
from fedlib.runs.spec import Spec
from fedlib.wire import container, entropy

CPU = torch.device("cpu")
VALUES, INDICES = topk.Hyper(budget="values"), topk.Hyper(budget="values and indices")
METHODS: list[tuple[ModuleType, Any]] = [(terngrad, terngrad.Hyper()), (topk, VALUES), (topk, INDICES)]
every_method = pytest.mark.parametrize(("method", "hyper"), METHODS, ids=["terngrad", "values", "indices"])

SPEC = """
{paper: p, profile: smoke, name: n, group: g, label: l, split: s, method: fedavg, hyper: {}, data: digits, model: mlp,
 partition: {kind: iid, seed: 0}, clients: 20, cohort: 5, rounds: 1, epochs: 2, batch: 16, lr: 0.1, evaluate_every: 1,
 seed: 0}
"""


@functools.cache
def digits_task() -> Task:
    return Task.of(Spec.from_dict(yaml.safe_load(SPEC)), CPU)


def task_of(*layers: tuple[int, int]) -> Task:
    """Weights of the given shapes and nothing else; no data."""
    network = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in layers))
    none = (torch.zeros(0), torch.zeros(0))
    return Task(
        network=network,
        weights={name: p.shape for name, p in network.named_parameters()},
        vectors={},
        statistics={},
        plan=Plan(epochs=1, batch=4, lr=0.1),
        train=none,
        test=none,
        partition=Partition.of([np.arange(0)]),
        device=CPU,
    )


def received(method: ModuleType, u: Tensor, hyper: Any, task: Task, place: Rng) -> Tensor:
    """u as the server sees it."""
    sections = [memoryview(bytes(section)) for section in method.encode(u, hyper, task, place)]
    return method.decode(sections, hyper, task)


def upload(method: ModuleType, u: Tensor, samples: int, hyper: Any, task: Task) -> bytes:
    return method.finish({"u": u}, {}, samples, hyper, task, Rng(samples))


def server(method: ModuleType, state: State, hyper: Any, task: Task, *messages: bytes) -> State:
    return method.server(state, Uploads(enumerate(messages)), hyper, task)


def trained(method: ModuleType, hyper: Any, task: Task, client: int) -> tuple[bytes, State, Rng]:
    """Upload of a client on digits, the trained tensors behind it, and the place of its randomness."""
    place, message = Rng(1).child("client", 1, client), method.broadcast(task.initial(), hyper, task)
    trainable, frozen = method.start(message, hyper, task, place)
    client_side.train(method, trainable, frozen, task.shard(client), hyper, task, place)
    return client_side.client(method, message, task.shard(client), hyper, task, place), trainable, place


# TernGrad


def test_terngrad_of_certain_entries_is_exact() -> None:
    """All |u| are 0 or s, so nothing is left to chance; layer scales 2 and 0.5, and a layer of zeros."""
    task = task_of((2, 2), (1, 2), (3, 1))
    u = torch.tensor([2.0, -2.0, 0.0, 2.0, -0.5, 0.5, 0.0, 0.0, 0.0])
    symbols, scales = terngrad.encode(u, terngrad.Hyper(), task, Rng(0))
    assert scales.tobytes() == np.array([2, 0.5, 0], "<f4").tobytes()  # type: ignore[union-attr]
    # Symbols 2 0 1 2 | 0 2 | 1 1 1 in two bits each, lowest first: 01 00 10 01, 00 01 10 10, 10.
    assert bytes(symbols) == bytes([0, 0b10010010, 0b01011000, 0b01])
    assert received(terngrad, u, terngrad.Hyper(), task, Rng(0)).tolist() == u.tolist()
    assert terngrad.paper_bits(b"", terngrad.Hyper(), task) == pytest.approx(9 * 1.5849625 + 3 * 32)


def test_terngrad_mean_and_variance() -> None:
    """Every entry takes -s, 0 or s with its own sign; mean u, variance |u| (s - |u|)."""
    task, draws = task_of((4, 10), (2, 5)), 4000
    u = torch.cat([torch.linspace(-0.3, 0.3, 40), torch.linspace(-0.02, 0.01, 10)])
    s = torch.tensor([0.3] * 40 + [0.02] * 10)
    drawn = torch.stack([received(terngrad, u, terngrad.Hyper(), task, Rng(i)) for i in range(draws)]).double()
    assert bool(((drawn == 0) | (drawn == u.sign() * s)).all())
    variance = (u.abs() * (s - u.abs())).double()
    error = drawn.mean(0) - u.double()
    assert bool((error.abs() <= 4 * (variance / draws).sqrt() + 1e-8).all())
    assert float(drawn.var(0).sum()) == pytest.approx(float(variance.sum()), rel=0.02)
    assert drawn.var(0).tolist() == pytest.approx(variance.tolist(), rel=0.25, abs=1e-8)
    assert float((error / s).abs().max()) > 1e-4, "nor is it too exact"


def test_terngrad_draws_the_named_stream() -> None:
    task, u = task_of((100, 10)), torch.linspace(-1, 1, 1000)
    chance = torch.rand(1000, generator=Rng(3).child("upload").torch())
    expected = [math.copysign(1, v) if c < abs(v) else 0 for c, v in zip(chance.tolist(), u.tolist(), strict=True)]
    assert received(terngrad, u, terngrad.Hyper(), task, Rng(3)).tolist() == expected
    assert received(terngrad, u, terngrad.Hyper(), task, Rng(4)).tolist() != expected


@pytest.mark.skipif(not entropy.RANGE_CODER, reason="constriction has no wheel for this machine")
def test_terngrad_is_near_the_entropy_of_its_layers() -> None:
    """A layer of normal entries and one, a thousand times smaller, where half of the entries are certain."""
    task = task_of((100, 200), (50, 200))
    u = torch.cat([torch.randn(20_000, generator=torch.Generator().manual_seed(0)), torch.ones(10_000) * 1e-3])
    u[20_000::2] *= -1e-3
    symbols, _ = terngrad.encode(u, terngrad.Hyper(), task, Rng(0))
    coded = received(terngrad, u, terngrad.Hyper(), task, Rng(0)).sign().add(1).int().numpy()
    counts = [np.bincount(part, minlength=3) for part in (coded[:20_000], coded[20_000:])]
    bound = sum(entropy.entropy_bits(part) for part in counts) / 8
    assert bound <= len(symbols) <= 1.01 * bound + 32
    assert 8 * len(symbols) < 1.3 * 30_000, "less than log2(3) bits"


@pytest.mark.parametrize(
    ("scales", "complaint"),
    [
        (np.array([-1, 1], "<f4"), "expected none below 0"),
        (np.array([np.nan, 1], "<f4"), "only finite numbers travel"),
        (np.array([1], "<f4"), "4 bytes, expected 8"),
        (np.array([1, 1, 1], "<f4"), "12 bytes, expected 8"),
    ],
)
def test_terngrad_refuses_scales(scales: np.ndarray, complaint: str) -> None:
    task = task_of((2, 2), (1, 2))
    symbols = entropy.encode(np.array([2, 0, 1, 2, 0, 2]), 3, np.array([0, 0, 0, 0, 1, 1]))
    with pytest.raises(PayloadError, match=complaint):
        terngrad.decode([memoryview(symbols), memoryview(scales.tobytes())], terngrad.Hyper(), task)


def test_terngrad_refuses_symbols() -> None:
    task, scale = task_of((2, 2)), memoryview(np.ones(1, "<f4").tobytes())
    for symbols, complaint in ((b"", "no bytes"), (b"\0\xff", "found 3"), (b"\0\0\0", "2 bytes"), (b"\2", "counts of")):
        with pytest.raises(PayloadError, match=f"{complaint}|install the package"):
            terngrad.decode([memoryview(symbols), scale], terngrad.Hyper(), task)


# Top-k


@pytest.mark.parametrize(
    ("shape", "values", "indices"),
    [
        ((1, 1), (1, 32), (1, 32)),  # an index among one takes no bits
        ((5, 6), (1, 32), (1, 37)),  # 30 entries: less than one value, one is sent all the same
        ((64, 64), (128, 32), (93, 44)),  # 4096 = 93 * 44 + 4
        ((64, 65), (130, 32), (92, 45)),  # 4160 = 92 * 45 + 20; beyond 4096 an index takes 13 bits
        ((640, 609), (12180, 32), (7642, 51)),  # 389,760 = 7642 * 51 + 18
    ],
)
def test_topk_budget(shape: tuple[int, int], values: tuple[int, int], indices: tuple[int, int]) -> None:
    task = task_of(shape)
    for hyper, (k, each) in ((VALUES, values), (INDICES, indices)):
        assert topk.entries(hyper, task) == k
        assert topk.paper_bits(b"", hyper, task) == k * each
    assert topk.Hyper() == INDICES


def test_topk_worked_by_hand() -> None:
    """64 entries in two layers, two kept: -3 of the first layer and 2 of the second."""
    task = task_of((4, 8), (8, 4))
    u = torch.linspace(-1, 1, 64)
    u[5], u[40] = -3, 2
    positions, values = topk.encode(u, VALUES, task, Rng(0))
    assert np.frombuffer(values, "<f4").tolist() == [-3, 2]
    assert entropy.decode(bytes(positions), 64, 2).nonzero()[0].tolist() == [5, 40]
    expected = torch.zeros(64)
    expected[5], expected[40] = -3, 2
    assert torch.equal(received(topk, u, VALUES, task, Rng(0)), expected)


def test_topk_equal_entries_first_come() -> None:
    u = np.array([1, -2, 2, 0, 2, -1, 1, 2], np.float32)
    expected = {
        1: [1],
        2: [1, 2],
        3: [1, 2, 4],
        4: [1, 2, 4, 7],
        5: [0, 1, 2, 4, 7],
        6: [0, 1, 2, 4, 5, 7],
        8: [*range(8)],
    }
    for k, places in expected.items():
        assert np.flatnonzero(topk.kept(u, k)).tolist() == places
    assert np.flatnonzero(topk.kept(np.zeros(9, np.float32), 4)).tolist() == [0, 1, 2, 3]


@given(st.lists(st.integers(-4, 4) | st.floats(-9, 9, width=32), min_size=1, max_size=60), st.data())
def test_topk_against_a_sort(entries: list[float], data: Any) -> None:
    k = data.draw(st.integers(1, len(entries)))
    u = np.array(entries, np.float32)
    order = sorted(range(len(u)), key=lambda i: (-abs(float(u[i])), i))
    assert np.flatnonzero(topk.kept(u, k)).tolist() == sorted(order[:k])


@pytest.mark.skipif(not entropy.RANGE_CODER, reason="constriction has no wheel for this machine")
def test_topk_positions_cost_less_than_indices() -> None:
    task = task_of((640, 609))
    u = torch.randn(389_760, generator=torch.Generator().manual_seed(0))
    positions, values = topk.encode(u, INDICES, task, Rng(0))
    assert len(values) == 4 * 7642
    bound = sum(-n * math.log2(n / 389_760) for n in (7642, 389_760 - 7642)) / 8
    assert bound <= len(positions) <= 1.01 * bound + 16
    assert 8 * len(positions) / 7642 == pytest.approx(math.log2(51) + 1.44, abs=0.05)
    left = u - received(topk, u, INDICES, task, Rng(0))
    assert int((left == 0).sum()) == 7642
    assert float(left.abs().max()) <= np.abs(np.frombuffer(values, "<f4")).min()


def test_topk_refuses() -> None:
    task = task_of((8, 8))
    mask, values = np.isin(np.arange(64), (5, 40)), np.array([-3, 2], "<f4")
    good = [entropy.encode(mask, 2), values.tobytes()]
    assert topk.decode([memoryview(part) for part in good], VALUES, task).count_nonzero() == 2
    for part, bad, complaint in (
        (0, entropy.encode(np.arange(64) == 5, 2), "positions: 1, expected 2"),
        (0, entropy.encode(np.arange(64) < 3, 2), "positions: 3, expected 2"),
        (0, entropy.encode(np.arange(63) < 2, 2)[:8], "7 bytes, expected 8|altered|counts of|range coder"),
        (0, b"", "no bytes"),
        (1, values[:1].tobytes(), "4 bytes, expected 8"),
        (1, values.tobytes() + bytes(4), "12 bytes, expected 8"),
        (1, np.array([1, np.inf], "<f4").tobytes(), "values: value 1 is inf"),
    ):
        sections = [memoryview(bad if place == part else own) for place, own in enumerate(good)]
        with pytest.raises(PayloadError, match=complaint):
            topk.decode(sections, VALUES, task)


@pytest.mark.parametrize("budget", ["indices", "", None, 1])
def test_topk_unknown_budget(budget: Any) -> None:
    with pytest.raises(SpecError, match=r"hyper\.budget: .* allowed: values, values and indices"):
        topk.Hyper(budget=budget)


# Both


@every_method
def test_server_adds_the_weighted_mean(method: ModuleType, hyper: Any) -> None:
    """1 and 3 samples: w + u_1 / 4 + 3 u_2 / 4. One entry each, which both methods send exactly."""
    task = task_of((4, 8))
    first, second = torch.zeros(32), torch.zeros(32)
    first[3], second[30] = 0.8, -0.4
    messages = [upload(method, u, samples, hyper, task) for u, samples in ((first, 1), (second, 3))]
    state = server(method, {"0.weight": torch.full((4, 8), 0.25)}, hyper, task, *messages)
    expected = torch.full((32,), 0.25)
    expected[3], expected[30] = 0.45, -0.05
    torch.testing.assert_close(state["0.weight"], expected.view(4, 8))


@every_method
def test_update_of_zeros(method: ModuleType, hyper: Any) -> None:
    task = task_of((4, 8), (8, 9))
    state = {name: torch.ones(shape) for name, shape in task.weights.items()}
    after = server(method, state, hyper, task, upload(method, torch.zeros(104), 2, hyper, task))
    assert all(torch.equal(after[name], state[name]) for name in state)


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_client_is_refused(method: ModuleType, hyper: Any, value: float) -> None:
    u = torch.zeros(32)
    u[7] = value
    with pytest.raises(PayloadError, match="not finite"):
        upload(method, u, 1, hyper, task_of((4, 8)))


@every_method
def test_whole_round_on_digits(method: ModuleType, hyper: Any) -> None:
    """Two clients through bytes; beside it the same from the trained tensors, without a server's code."""
    task = digits_task()
    before, clients = task.initial(), [trained(method, hyper, task, k) for k in range(2)]
    after = server(method, before, hyper, task, *(message for message, _, _ in clients))
    shares = [len(task.shard(k)[0]) for k in range(2)]
    for name in task.vectors:
        own = [n * tensors[name].detach().double() for n, (_, tensors, _) in zip(shares, clients, strict=True)]
        torch.testing.assert_close(after[name], (torch.stack(own).sum(0) / sum(shares)).float())
    seen = [received(method, tensors["u"].detach(), hyper, task, place) for _, tensors, place in clients]
    expected = torch.stack([n * u.double() for n, u in zip(shares, seen, strict=True)]).sum(0) / sum(shares)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in task.weights])
    torch.testing.assert_close(moved, expected.float(), atol=1e-6, rtol=0)
    assert float(moved.norm()) > 0.01
    again = trained(method, hyper, task, 0)[0]
    assert again == clients[0][0], "the same client sends the same bytes again"
    assert len(container.section_sizes(again)) == len(method.SECTIONS) == 3


@functools.cache
def honest(index: int) -> bytes:
    method, hyper = METHODS[index]
    return trained(method, hyper, digits_task(), 0)[0]


@pytest.mark.parametrize("index", range(3), ids=["terngrad", "values", "indices"])
@settings(deadline=None)
@given(data=st.data())
def test_altered_uploads_are_refused(index: int, data: Any) -> None:
    (method, hyper), altered = METHODS[index], bytearray(honest(index))
    if data.draw(st.booleans()):
        del altered[data.draw(st.integers(0, len(altered) - 1)) :]
    else:
        altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    uploads = Uploads([(0, altered)])
    with pytest.raises(NoUpdate):
        method.server(digits_task().initial(), uploads, hyper, digits_task())
    assert len(uploads.refused) == 1


@pytest.mark.parametrize("index", range(3), ids=["terngrad", "values", "indices"])
@settings(deadline=None)
@given(data=st.data())
def test_altered_sections_are_refused_or_finite(index: int, data: Any) -> None:
    """Behind a valid envelope: what decodes has the right shape, finite values and the method's alphabet."""
    (method, hyper), task = METHODS[index], digits_task()
    fingerprint = task.fingerprint(method.__name__.rpartition(".")[2], hyper)
    kind = f"{method.__name__.rpartition('.')[2]}.up"
    read = container.unpack(honest(index), kind, fingerprint, [10**6] * 3)
    sections = [bytearray(section) for section in read.sections[:2]]
    part = sections[data.draw(st.integers(0, 1))]
    part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        u = method.decode([memoryview(section) for section in sections], hyper, task)
    except PayloadError:
        return
    assert u.shape == (4736,) and bool(torch.isfinite(u).all())
    if method is topk:
        assert int((u != 0).sum()) <= topk.entries(hyper, task)
    else:
        first, second = u[:4096].abs().unique().tolist(), u[4096:].abs().unique().tolist()
        assert len(first) <= 2 and len(second) <= 2
