"""SignSGD: numbers worked by hand, and a round written in plain torch."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import (
    CPU,
    ONE,
    begun,
    convolutional,
    images,
    layers_task,
    make_task,
    plain_training,
    served,
    uploaded,
)
from torch import Tensor, nn

from fedlib.core.plan import Plan
from fedlib.core.task import Task
from fedlib.errors import PayloadError
from fedlib.methods.baselines.signsgd import SignSGD
from fedlib.methods.fedavg import FedAvg
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.runs.spec import Spec
from fedlib.wire import bits, container, floats


def of(task: Task) -> SignSGD:
    return SignSGD().bind(task)


def sections(u: Tensor, method: SignSGD) -> list[memoryview]:
    return [memoryview(bytes(part)) for part in method.encode(u, begun(method), Rng(0))]


# Coding


def test_message_worked_by_hand() -> None:
    """Layer scales 2, 0.25 and 0: the means of |1 -2 3 -2|, |0.5 0| and |0 -0|. A zero counts as positive."""
    method = of(layers_task((2, 2), (1, 2), (2, 1)))
    signs, scales = sections(torch.tensor([1.0, -2.0, 3.0, -2.0, 0.5, 0.0, 0.0, -0.0]), method)
    assert bytes(signs) == bytes([0b11110101])
    assert np.frombuffer(scales, "<f4").tolist() == [2.0, 0.25, 0.0]
    assert method.decode([signs, scales], None).tolist() == [2, -2, 2, -2, 0.25, 0.25, 0, 0]
    assert method.sizes(b"").paper == 8 + 3 * 32


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6), st.lists(st.floats(-1, 1, width=32), min_size=3)
)
def test_every_entry_has_its_sign_and_its_layer_s_mean_size(first: list[float], second: list[float]) -> None:
    method = of(layers_task((2, 3), (1, len(second))))
    u = torch.tensor(first + second, dtype=torch.float32)
    found = method.decode(sections(u, method), None)
    for own, part in ((first, found[:6]), (second, found[6:])):
        size = float(np.abs(np.array(own, np.float32)).astype(np.float64).mean())
        assert part.tolist() == pytest.approx([size if v >= 0 else -size for v in own], rel=1e-5, abs=1e-30)


def test_of_all_scales_the_mean_comes_nearest() -> None:
    """The mean of |u| minimises ||s sign(u) - u||: a scale a little off is worse, in each layer for itself."""
    method = of(layers_task((10, 10), (5, 10)))
    u = torch.randn(150, generator=torch.Generator().manual_seed(0)) * torch.cat(
        [torch.ones(100), torch.full((50,), 9)]
    )
    found = method.decode(sections(u, method), None)
    for part in (slice(0, 100), slice(100, 150)):
        best = float((found[part] - u[part]).norm())
        assert all(float((found[part] * factor - u[part]).norm()) > best for factor in (0.98, 1.02))


def test_the_signs_are_packed_as_masks_are() -> None:
    """So that a reader of one format reads the other."""
    u = torch.randn(21, generator=torch.Generator().manual_seed(1))
    signs, scales = sections(u, of(layers_task((3, 7))))
    assert bytes(signs) == bits.pack(u.numpy() > 0)
    assert bytes(scales) == floats.encode([np.array([u.abs().mean()], np.float32)]).tobytes()


SIGNS, SCALES = bytes([0b00110101]), np.array([1, 2], "<f4").tobytes()
BAD = {
    "signs too long": (SIGNS * 2, SCALES, "bits: 2 bytes, expected 1"),
    "padding set": (bytes([0b01110101]), SCALES, "only its lowest 6 bits"),
    "a scale missing": (SIGNS, SCALES[:4], "4 bytes, expected 8"),
    "negative": (SIGNS, np.array([1, -2], "<f4").tobytes(), "scales: -2.0, expected none below 0"),
    "not a number": (SIGNS, np.array([math.nan, 1], "<f4").tobytes(), "scales: value 0 is nan"),
}


@pytest.mark.parametrize("signs, scales, complaint", BAD.values(), ids=BAD)
def test_what_is_refused_is_named(signs: bytes, scales: bytes, complaint: str) -> None:
    method = of(layers_task((2, 2), (1, 2)))
    assert method.decode([memoryview(SIGNS), memoryview(SCALES)], None).tolist() == [1, -1, 1, -1, 2, 2]
    with pytest.raises(PayloadError, match=complaint):
        method.decode([memoryview(signs), memoryview(scales)], None)


# Whole rounds


def test_round_worked_by_hand() -> None:
    """One step at zero, learning rate 0.3; the gradient is (softmax - one-hot) x, as in FedAvg's test.

    Client A, one sample:    u = ( 0.2, -0.1, -0.1), mean size 0.4 / 3
    Client B, three samples: u = (-0.2,  0.4, -0.2), mean size 0.8 / 3
    Weighted by 1 : 3, in units of 0.1 / 3: (4 - 24, -4 + 24, -4 - 24) / 4 = (-5, 5, -7)
    """
    method = of(make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=0.3)))
    zero = {"weight": torch.zeros(3, 1)}
    a = uploaded(method, ONE, Rng(0), zero)
    b = uploaded(method, (torch.full((3, 1), 2.0), torch.tensor([1, 1, 1])), Rng(1), zero)
    for messages, expected in (((a,), (4, -4, -4)), ((b,), (-8, 8, -8)), ((a, b), (-5, 5, -7)), ((b, a), (-5, 5, -7))):
        found = served(method, *messages, model=zero)["weight"].flatten().tolist()
        assert found == pytest.approx([v / 30 for v in expected], rel=1e-6)


def test_round_equals_a_plain_one() -> None:
    """Convolution, BatchNorm, biases; unequal shards with a last, smaller batch; three epochs."""
    method = of(make_task(network := convolutional(), plan := Plan(epochs=3, batch=5, lr=0.05)))
    counts, before = (23, 11), method.task.initial()
    found = served(method, *(uploaded(method, images(n, seed=n), Rng(n)) for n in counts))
    after = [plain_training(network, images(n, seed=n), plan, Rng(n)) for n in counts]
    assert found.keys() == after[0].keys()
    for name in found:
        if name in method.task.weights:
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
    method = of(make_task(network, Plan(epochs=1, batch=4, lr=0.1)))
    upload = uploaded(method, (torch.ones(2, columns), torch.tensor([0, 1])), Rng(0))
    expected = (math.ceil((3 * columns + 6) / 8), 8, 20 if bias else 0)
    assert container.section_sizes(upload) == expected and len(method.sections) == 3
    assert 0 < len(upload) - sum(expected) <= 64
    assert method.sizes(upload).paper == 3 * columns + 6 + 64


def test_upload_on_digits_is_a_27th_of_fedavg_s(tiny: Callable[..., Spec]) -> None:
    task = build.task(tiny(), CPU)
    upload = uploaded(of(task), task.shard(0), Rng(0))
    assert container.section_sizes(upload) == (592, 8, 0)
    assert len(uploaded(FedAvg().bind(task), task.shard(0), Rng(0))) / len(upload) > 27
