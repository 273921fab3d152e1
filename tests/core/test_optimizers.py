"""Local optimizers: torch's own are the oracle."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from jobs import MakeSpec
from torch import Tensor

from fedlib.core import optimizers
from fedlib.core.plan import Plan, Tensors
from fedlib.errors import SpecError

pytestmark = pytest.mark.usefixtures("one_thread")
ADAM, SGD = Plan(epochs=1, batch=4, lr=0.1, optimizer="adam"), Plan(epochs=1, batch=4, lr=0.1)
SHAPES: dict[str, tuple[int, ...]] = {"kernel": (3, 2, 2, 2), "matrix": (5, 4), "vector": (7,), "one": (1,)}


def parameters(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradients(steps: int, seed: int = 1) -> list[list[Tensor]]:
    """Of sizes from 1e-12, far below Adam's epsilon, to 1e3; some entries are zero throughout."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        step = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
        step[0] *= 10 ** torch.linspace(-12, 3, 24).view(3, 2, 2, 2)
        step[1][2] = 0
        found.append(step)
    return found


def copied(state: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in state.items()}


def by_torch(optimizer: torch.optim.Optimizer, own: Tensors, steps: list[list[Tensor]]) -> Iterator[Tensors]:
    for step in steps:
        for tensor, g in zip(own.values(), step, strict=True):
            tensor.grad = g.clone()
        optimizer.step()
        yield own


# Against torch


@pytest.mark.parametrize("lr", [1e-3, 0.1, 3.0])
def test_adam_is_torch_s(lr: float) -> None:
    plan = Plan(epochs=1, batch=4, lr=lr, optimizer="adam")
    found, plain, steps = parameters(), parameters(), gradients(300)
    state = optimizers.moments(plan, found)
    reference = by_torch(torch.optim.Adam(plain.values(), lr=lr), plain, steps)
    for number, (step, expected) in enumerate(zip(steps, reference, strict=True), 1):
        optimizers.step(plan, found, step, state)
        assert float(state["steps"]) == number
        for name in SHAPES:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=lr * number * 1e-6)
    assert torch.equal(found["matrix"][2], parameters()["matrix"][2]), "no gradient, no step"
    assert float((found["vector"] - parameters()["vector"]).abs().max()) > lr


def test_adam_on_kernels_whose_gradients_lie_otherwise_in_memory() -> None:
    """As those of convolutions do where images are channels-last."""
    start = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    ours, theirs = {"kernel": start.clone()}, torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    plan = Plan(1, 1, 0.1, "adam")
    moments = optimizers.moments(plan, ours)
    for seed in range(3):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        lying = gradient.contiguous(memory_format=torch.channels_last)
        assert lying.stride() != ours["kernel"].stride()
        optimizers.step(plan, ours, [lying], moments)
        theirs.grad = gradient
        optimizer.step()
    torch.testing.assert_close(ours["kernel"], theirs.detach(), rtol=1e-5, atol=1e-7)


def test_adam_worked_by_hand() -> None:
    """The first step is lr g / (|g| + 1e-8). With g = 2, then -1: m = 0.08, v = 0.004996, corrected by 0.19 and
    0.001999: the second step is lr 0.421053 / 1.580904 = 0.266337 lr."""
    w = {"w": torch.tensor([1.0, 1.0, 1.0])}
    state = optimizers.moments(ADAM, w)
    optimizers.step(ADAM, w, [torch.tensor([2.0, 1e-8, 0.0])], state)
    assert w["w"].tolist() == pytest.approx([0.9, 0.95, 1.0], abs=1e-6)
    optimizers.step(ADAM, w, [torch.tensor([-1.0, 0.0, 0.0])], state)
    assert float(w["w"][0]) == pytest.approx(0.9 - 0.0266337, abs=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_s_bit_for_bit(momentum: float) -> None:
    found, plain, steps = parameters(), parameters(), gradients(50)
    plan = dataclasses.replace(SGD, momentum=momentum)
    state = optimizers.moments(plan, found) if plan.keeps else {}
    assert bool(state) == bool(momentum)
    sgd = torch.optim.SGD(plain.values(), lr=0.1, momentum=momentum)
    for step, expected in zip(steps, by_torch(sgd, plain, steps), strict=True):
        optimizers.step(plan, found, step, state)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_a_step_leaves_the_gradients_alone() -> None:
    for plan in (ADAM, SGD):
        own, (step,) = parameters(), gradients(1)
        before = [g.clone() for g in step]
        optimizers.step(plan, own, step, optimizers.moments(ADAM, own))
        assert all(torch.equal(g, b) for g, b in zip(step, before, strict=True))


# Moments as bytes


def test_moments_packed_and_recalled_go_on_as_if_nothing_had_been() -> None:
    found, steps = parameters(), gradients(40)
    state = optimizers.moments(ADAM, found)
    for step in steps[:25]:
        optimizers.step(ADAM, found, step, state)
    kept = optimizers.packed(state)
    assert len(kept) == 4 * (2 * (24 + 20 + 7 + 1) + 1)
    other = copied(found)
    recalled = optimizers.moments(ADAM, other, kept)
    assert recalled.keys() == state.keys()
    assert all(torch.equal(recalled[name], state[name]) and recalled[name].shape == state[name].shape for name in state)
    assert float(recalled["steps"]) == 25
    for step in steps[25:]:
        optimizers.step(ADAM, found, step, state)
        optimizers.step(ADAM, other, step, recalled)
    assert all(torch.equal(found[name], other[name]) for name in SHAPES)
    assert optimizers.packed(recalled) == optimizers.packed(state) != kept, "the bytes were copied"


def test_without_earlier_moments_all_is_zero() -> None:
    state = optimizers.moments(ADAM, parameters())
    assert all(not tensor.any() for tensor in state.values())
    assert optimizers.packed(state) == bytes(4 * 105)


# Stacked clients


def test_stacked_clients_with_steps_of_their_own_equal_separate_ones() -> None:
    """Three clients that have taken 0, 7 and 150 steps; then two steps together, and one of the last two alone."""
    clients, states = [parameters(seed) for seed in range(3)], []
    for client, before in zip(clients, (0, 7, 150), strict=True):
        states.append(optimizers.moments(ADAM, client))
        for step in gradients(before, seed=before):
            optimizers.step(ADAM, client, step, states[-1])
    stack = {name: torch.stack([client[name] for client in clients]) for name in SHAPES}
    moments = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    assert moments["steps"].tolist() == [0, 7, 150]
    steps = [gradients(3, seed=10 + k) for k in range(3)]
    for number, rows in enumerate((slice(0, 3), slice(0, 3), slice(1, 3))):
        together = [torch.stack(gs) for gs in zip(*(own[number] for own in steps[rows]), strict=True)]
        own, held = ({name: tensor[rows] for name, tensor in s.items()} for s in (stack, moments))
        optimizers.step(ADAM, own, together, held)
        for k in range(3)[rows]:
            optimizers.step(ADAM, clients[k], steps[k][number], states[k])
    assert moments["steps"].tolist() == [2, 10, 153]
    for k in range(3):
        for name in SHAPES:
            torch.testing.assert_close(stack[name][k], clients[k][name], rtol=1e-5, atol=1e-6)
        for name in states[k]:
            torch.testing.assert_close(moments[name][k], states[k][name], rtol=1e-5, atol=1e-30)


# Settings


def test_settings_that_cannot_go_together(tiny: MakeSpec) -> None:
    assert tiny().optimizer == "sgd" and not tiny().persistent
    with pytest.raises(SpecError, match="optimizer: 'momentum' is unknown; allowed: adam, sgd"):
        tiny(optimizer="momentum")
    with pytest.raises(SpecError, match="persistent: 1 must be true or false"):
        tiny(optimizer="adam", persistent=1)
    with pytest.raises(SpecError, match="persistent: True needs optimizer adam"):
        tiny(persistent=True)
    with pytest.raises(SpecError, match=r"persistent: True needs .* no feedback"):
        tiny(method="topk", optimizer="adam", persistent=True, feedback=True)
