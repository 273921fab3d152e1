"""Top-k: its budget, messages worked by hand, and all codecs with a share of certain entries in whole rounds."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from common import range_coded
from hypothesis import given
from hypothesis import strategies as st
from small_task import NONE, START, begun, digits_task, flat, layers_task, served, trained, uploaded
from torch import Tensor

from fedlib.core.task import Task
from fedlib.errors import PayloadError, SpecError
from fedlib.methods.baselines.terngrad import TernGrad
from fedlib.methods.baselines.topk import TopK, kept
from fedlib.methods.update_codec import UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import container, entropy

pytestmark = pytest.mark.usefixtures("one_thread")
VALUES, INDICES = TopK(budget="values"), TopK(budget="values and indices")
each_codec = pytest.mark.parametrize("codec", [TernGrad(), VALUES, INDICES], ids=["terngrad", "values", "indices"])


def encoded(method: UpdateCodec[None], u: Tensor, place: Rng = START) -> list[bytes]:
    return [bytes(section) for section in method.encode(u, begun(method), place)]


def received(method: UpdateCodec[None], u: Tensor, place: Rng = START) -> Tensor:
    """u as the server sees it."""
    return method.decode([memoryview(section) for section in encoded(method, u, place)], None)


def upload(method: UpdateCodec[None], u: Tensor, samples: int) -> bytes:
    local = begun(method)
    local.trainable["u"], local.samples = u, samples
    return method.upload(local, NONE, Rng(samples))


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
def test_budget(shape: tuple[int, int], values: tuple[int, int], indices: tuple[int, int]) -> None:
    for codec, (k, each) in ((VALUES, values), (INDICES, indices)):
        method = codec.bind(layers_task(shape))
        assert method.entries == k
        assert method.sizes(b"").paper == k * each
    assert TopK() == INDICES


def test_worked_by_hand() -> None:
    """64 entries in two layers, two kept: -3 of the first layer and 2 of the second."""
    method = VALUES.bind(layers_task((4, 8), (8, 4)))
    u = torch.linspace(-1, 1, 64)
    u[5], u[40] = -3, 2
    positions, values = encoded(method, u)
    assert np.frombuffer(values, "<f4").tolist() == [-3, 2]
    assert entropy.decode(positions, 64, 2).nonzero()[0].tolist() == [5, 40]
    expected = torch.zeros(64)
    expected[5], expected[40] = -3, 2
    assert torch.equal(received(method, u), expected)


def test_of_equal_entries_the_first_come() -> None:
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
        assert np.flatnonzero(kept(u, k)).tolist() == places
    assert np.flatnonzero(kept(np.zeros(9, np.float32), 4)).tolist() == [0, 1, 2, 3]


@given(st.lists(st.integers(-4, 4) | st.floats(-9, 9, width=32), min_size=1, max_size=60), st.data())
def test_against_a_sort(entries: list[float], data: Any) -> None:
    k = data.draw(st.integers(1, len(entries)))
    u = np.array(entries, np.float32)
    order = sorted(range(len(u)), key=lambda i: (-abs(float(u[i])), i))
    assert np.flatnonzero(kept(u, k)).tolist() == sorted(order[:k])


@range_coded
def test_positions_cost_less_than_indices() -> None:
    method = INDICES.bind(layers_task((640, 609)))
    u = torch.randn(389_760, generator=torch.Generator().manual_seed(0))
    positions, values = encoded(method, u)
    assert len(values) == 4 * 7642
    bound = sum(-n * math.log2(n / 389_760) for n in (7642, 389_760 - 7642)) / 8
    assert bound <= len(positions) <= 1.01 * bound + 16
    assert 8 * len(positions) / 7642 == pytest.approx(math.log2(51) + 1.44, abs=0.05)
    left = u - received(method, u)
    assert int((left == 0).sum()) == 7642
    assert float(left.abs().max()) <= np.abs(np.frombuffer(values, "<f4")).min()


def test_what_is_refused_is_named() -> None:
    method = VALUES.bind(layers_task((8, 8)))
    mask, values = np.isin(np.arange(64), (5, 40)), np.array([-3, 2], "<f4")
    good = [entropy.encode(mask, 2), values.tobytes()]
    assert method.decode([memoryview(part) for part in good], None).count_nonzero() == 2
    for part, bad, complaint in (
        (0, entropy.encode(np.arange(64) == 5, 2), "positions: 1, expected 2"),
        (0, entropy.encode(np.arange(64) < 3, 2), "positions: 3, expected 2"),
        (0, entropy.encode(np.arange(63) < 2, 2)[:8], "7 bytes, expected 8|altered|counts of|range coder"),
        (1, values.tobytes() + bytes(4), "12 bytes, expected 8"),
        (1, np.array([1, np.inf], "<f4").tobytes(), "values: value 1 is inf"),
    ):
        sections = [memoryview(bad if place == part else own) for place, own in enumerate(good)]
        with pytest.raises(PayloadError, match=complaint):
            method.decode(sections, None)


@pytest.mark.parametrize("budget", ["indices", "", None, 1])
def test_unknown_budget(budget: Any) -> None:
    with pytest.raises(SpecError, match=r"hyper\.budget: .* allowed: values, values and indices"):
        TopK(budget=budget)


# With TernGrad


@each_codec
def test_server_adds_the_weighted_mean(codec: UpdateCodec[None]) -> None:
    """1 and 3 samples: w + u_1 / 4 + 3 u_2 / 4. One entry each, which both methods send exactly."""
    method = codec.bind(layers_task((4, 8)))
    first, second = torch.zeros(32), torch.zeros(32)
    first[3], second[30] = 0.8, -0.4
    messages = [upload(method, u, samples) for u, samples in ((first, 1), (second, 3))]
    model = served(method, *messages, model={"0": torch.full((4, 8), 0.25)})
    expected = torch.full((32,), 0.25)
    expected[3], expected[30] = 0.45, -0.05
    torch.testing.assert_close(model["0"], expected.view(4, 8))


@each_codec
def test_update_of_zeros(codec: UpdateCodec[None]) -> None:
    method = codec.bind(layers_task((4, 8), (8, 9)))
    model = {name: torch.ones(shape) for name, shape in method.task.weights.items()}
    after = served(method, upload(method, torch.zeros(104), 2), model=model)
    assert all(torch.equal(after[name], model[name]) for name in model)


def moved(task: Task, after: dict[str, Tensor]) -> Tensor:
    return flat(after, task) - flat(task.initial(), task)


@each_codec
def test_whole_round_on_digits(codec: UpdateCodec[None]) -> None:
    """Two clients through bytes; beside it the same from the trained tensors, without a server's code."""
    method = codec.bind(digits_task())
    task = method.task
    places, shards = [Rng(1).child("client", 1, k) for k in range(2)], [task.shard(k) for k in range(2)]
    ends = [trained(method, shard, place) for shard, place in zip(shards, places, strict=True)]
    uploads = [method.upload(local, NONE, place) for local, place in zip(ends, places, strict=True)]
    shares = [len(y) for _, y in shards]
    seen = [received(method, local.trainable["u"].detach(), place) for local, place in zip(ends, places, strict=True)]
    expected = torch.stack([n * u.double() for n, u in zip(shares, seen, strict=True)]).sum(0) / sum(shares)
    found = moved(task, served(method, *uploads))
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=0)
    assert float(found.norm()) > 0.01
    again = uploaded(method, shards[0], places[0])
    assert again == uploads[0], "the same client sends the same bytes again"
    assert len(container.section_sizes(again)) == len(method.sections) == 3
