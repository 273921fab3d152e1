"""Bytes alive, worked by hand: x [2, 3] times w1 [3, 4] times w2 [4, 5], summed; float32.

x 24, w1 48, w2 80: 152 held. The first product h takes 32, the second 40, the sum 4.
"""

import pytest
import torch
from peak_memory import Meter
from small_task import make_task
from torch import Tensor, nn

from fedlib.core import client
from fedlib.core.method import Phase
from fedlib.core.plan import Plan
from fedlib.methods.fedpt.method import FedPT
from fedlib.rng import Rng

HELD = 24 + 48 + 80


def chain(*trained: str) -> tuple[Tensor, Tensor, Tensor]:
    w1, w2 = torch.ones(3, 4), torch.ones(4, 5)
    return torch.ones(2, 3), w1.requires_grad_("w1" in trained), w2.requires_grad_("w2" in trained)


def test_without_gradients_nothing_stays_but_the_result() -> None:
    x, w1, w2 = chain()
    with Meter([x, w1, w2]) as meter:
        assert meter.now == meter.peak == HELD
        loss = (x @ w1 @ w2).sum()
        assert meter.now == HELD + 4
        # h goes when the second product is there, before it is summed
        assert meter.peak == HELD + 32 + 40
        del loss
        assert meter.now == HELD


# The gradient of w2 needs h. That of w1 needs x, which is held in any case.
@pytest.mark.parametrize(("trained", "kept"), [(("w1", "w2"), 32), (("w2",), 32), (("w1",), 0)])
def test_what_the_backward_pass_needs_stays(trained: tuple[str, ...], kept: int) -> None:
    x, w1, w2 = chain(*trained)
    with Meter([x, w1, w2]) as meter:
        loss = (x @ w1 @ w2).sum()
        assert meter.now == HELD + 4 + kept
    assert loss.requires_grad


def test_the_peak_of_a_backward_pass() -> None:
    x, w1, w2 = chain("w1", "w2")
    with Meter([x, w1, w2]) as meter:
        loss = (x @ w1 @ w2).sum()
        gradients = torch.autograd.grad(loss, [w1, w2])
        assert meter.now == HELD + 4 + 48 + 80
        # at the end: both gradients, that of h (h itself is gone), and the 1 that the pass started from
        assert meter.peak == HELD + 4 + 48 + 80 + 32 + 4
    assert [gradient.shape for gradient in gradients] == [w1.shape, w2.shape]


def test_a_storage_counts_once_and_as_long_as_a_view_refers_to_it() -> None:
    with Meter() as meter:
        x = torch.zeros(10, 10)
        x.add_(1)
        row = x.view(100)[:10]
        del x
        assert meter.now == meter.peak == 400
        del row
        assert meter.now == 0


@pytest.mark.parametrize("plan", [Plan(1, 2, 0.1, momentum=0.9), Plan(1, 2, 0.1, optimizer="adam")])
@pytest.mark.parametrize(("policy", "trained"), [("none", 6 * 64 + 64 + 64 * 5 + 5), ("random/0.5", 64 + 5)])
def test_an_optimizer_keeps_tensors_for_the_trained_part_alone(policy: str, trained: int, plan: Plan) -> None:
    network = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 5))  # of which random/0.5 trains the biases
    shard = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
    peaks = []
    for each in (Plan(1, 2, 0.1), plan):
        method, rng, phase = FedPT(policy=policy).bind(make_task(network, each)), Rng(0), Phase(each)
        local = method.begin(method.broadcast(method.initial(rng)), shard, rng)
        member = client.Member(0, rng, shard, local, None)
        with Meter([*local.trainable.values(), *local.frozen.values()]) as meter:
            client.enter(member, 0, phase)
            client.train(method, phase, [member])
        peaks.append(meter.peak)
    expected = 8 * trained + 4 if plan.optimizer == "adam" else 4 * trained  # Adam also counts its steps
    assert peaks[1] - peaks[0] == expected
