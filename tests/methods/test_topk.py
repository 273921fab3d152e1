"""Top-k: its budget, messages worked by hand, and which entries it keeps."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from common import range_coded
from hypothesis import given
from hypothesis import strategies as st
from small_task import coded, layers_task, noise, received

from fedlib.errors import SpecError
from fedlib.methods.baselines.topk import TopK, kept
from fedlib.wire import entropy

VALUES, INDICES = TopK(budget="values"), TopK(budget="values and indices")


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
    positions, values = coded(method, u)
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
    u = noise(389_760)
    positions, values = coded(method, u)
    assert len(values) == 4 * 7642
    bound = sum(-n * math.log2(n / 389_760) for n in (7642, 389_760 - 7642)) / 8
    assert bound <= len(positions) <= 1.01 * bound + 16
    assert 8 * len(positions) / 7642 == pytest.approx(math.log2(51) + 1.44, abs=0.05)
    left = u - received(method, u)
    assert int((left == 0).sum()) == 7642
    assert float(left.abs().max()) <= np.abs(np.frombuffer(values, "<f4")).min()


@pytest.mark.parametrize("budget", ["indices", "", None, 1])
def test_unknown_budget(budget: Any) -> None:
    with pytest.raises(SpecError, match=r"hyper\.budget: .* allowed: values, values and indices"):
        TopK(budget=budget)
