"""Local optimizers: torch's own are the oracle; and what Adam keeps from one round of a client to its next."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlib.core import client as client_side
from fedlib.core import optimizers
from fedlib.core.client import Reply, run_client
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, Memories, task_of
from fedlib.engines.pool import Pool
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.rng import Rng
from fedlib.runs import checkpoint, record, rounds
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
ADAM, SGD = Plan(epochs=1, batch=4, lr=0.1, optimizer="adam"), Plan(epochs=1, batch=4, lr=0.1)
SHAPES: dict[str, tuple[int, ...]] = {"kernel": (3, 2, 2, 2), "matrix": (5, 4), "vector": (7,), "one": (1,)}


def parameters(seed: int = 0) -> State:
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


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def by_torch(optimizer: torch.optim.Optimizer, own: State, steps: list[list[Tensor]]) -> Iterator[State]:
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


def test_sgd_is_torch_s_bit_for_bit() -> None:
    found, plain, steps = parameters(), parameters(), gradients(50)
    state = optimizers.moments(SGD, found)
    assert state == {}
    for step, expected in zip(steps, by_torch(torch.optim.SGD(plain.values(), lr=0.1), plain, steps), strict=True):
        optimizers.step(SGD, found, step, state)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_a_step_leaves_the_gradients_alone() -> None:
    for plan in (ADAM, SGD):
        own, (step,) = parameters(), gradients(1)
        before = [g.clone() for g in step]
        optimizers.step(plan, own, step, optimizers.moments(plan, own))
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


# Through a client's rounds


def spec_of(tiny: MakeSpec, method: str, **more: Any) -> Spec:
    return tiny(method=method, optimizer="adam", lr=0.05 if method == "fedpm" else 0.003, epochs=2, **more)


def begin(spec: Spec) -> tuple[Task, bytes]:
    task, hyper = task_of(spec.key(), CPU), registry.hyper(spec.method, spec.hyper)
    return task, registry.METHODS[spec.method].broadcast(registry.initial(spec, task), hyper, task)


def replied(spec: Spec, round: int, memory: bytes) -> Reply:
    task, message = begin(spec)
    reply = run_client(spec, task, message, round, 3, memory)
    assert isinstance(reply, Reply)
    return reply


@pytest.mark.parametrize("method", ["fedpm", "fedavg"])
def test_memory_of_the_first_round_changes_the_second(tiny: MakeSpec, method: str) -> None:
    spec = spec_of(tiny, method, persistent=True)
    task, message = begin(spec)
    first = replied(spec, 1, b"")
    assert first.upload == run_client(spec, task, message, 1, 3), "the first round is that of a fresh optimizer"
    assert len(first.memory) == 4 * (2 * 4736 + 1)
    steps = task.plan.steps(len(task.partition.indices(3)))
    assert np.frombuffer(first.memory, "<f4")[-1] == steps == 10
    second = replied(spec, 2, first.memory)
    assert np.frombuffer(second.memory, "<f4")[-1] == 2 * steps
    assert second.upload != replied(spec, 2, b"").upload
    assert second == replied(spec, 2, first.memory)


def test_second_round_equals_one_written_with_torch_s_adam(tiny: MakeSpec) -> None:
    """FedAvg: torch's Adam, kept over two rounds that both start from the broadcast model."""
    spec = spec_of(tiny, "fedavg", persistent=True)
    task, _ = begin(spec)
    (x, y), own = task.shard(3), {name: t.clone().requires_grad_() for name, t in task.initial().items()}
    adam, memory = torch.optim.Adam(own.values(), lr=spec.lr), b""
    for number in (1, 2):
        with torch.no_grad():
            for name, tensor in task.initial().items():
                own[name].copy_(tensor)
        order = Rng(spec.seed).child("client", number, 3).child("order").torch()
        for _ in range(spec.epochs):
            for batch in torch.randperm(len(x), generator=order).split(spec.batch):
                adam.zero_grad()
                hidden = (x[batch].flatten(1) @ own["1.weight"].T).relu()
                torch.autograd.backward(torch.nn.functional.cross_entropy(hidden @ own["3.weight"].T, y[batch]))
                adam.step()
        reply = replied(spec, number, memory)
        memory = reply.memory
        size = 4 * 4736
        sent = np.frombuffer(reply.upload[-4 - size : -4], "<f4")
        expected = torch.cat([tensor.detach().flatten() for tensor in own.values()])
        torch.testing.assert_close(torch.from_numpy(sent.copy()), expected, rtol=1e-4, atol=1e-4)
        moved = (expected - torch.cat([t.flatten() for t in task.initial().values()])).abs()
        assert float(moved.max()) > 5e-3


def test_without_persistence_nothing_is_kept(tiny: MakeSpec, tmp_path: Path) -> None:
    """Not even where a client is handed something: its optimizer starts anew."""
    spec = spec_of(tiny, "fedpm")
    task, message = begin(spec)
    upload = run_client(spec, task, message, 2, 3)
    assert isinstance(upload, bytes)
    memory = replied(spec_of(tiny, "fedpm", persistent=True), 1, b"").memory
    fresh = {"s": torch.zeros(4736)}
    assert not any(tensor.any() for tensor in client_side.recalled(task, fresh, memory).values())
    rounds.run(spec, InProcess(CPU), root=tmp_path, save_every=0)
    loaded = checkpoint.Checkpoint(spec, tmp_path).load()
    assert loaded and loaded[1] == {}


def test_adam_with_error_feedback_keeps_the_error_alone(tiny: MakeSpec) -> None:
    spec = tiny(method="topk", optimizer="adam", lr=0.003, feedback=True)
    first = replied(spec, 1, b"")
    assert len(first.memory) == 4 * 4736
    assert replied(spec, 2, first.memory).upload != replied(spec, 2, b"").upload


def finished(spec: Spec, engine: Any, root: Path) -> dict[str, Any]:
    with engine:
        return record.stable(rounds.run(spec, engine, root=root))


@pytest.mark.parametrize("method", ["fedpm", "fedavg"])
def test_engines_agree_with_persistent_adam(tiny: MakeSpec, tmp_path: Path, method: str) -> None:
    spec = spec_of(tiny, method, persistent=True, cohort=10, rounds=4)
    expected = finished(spec, InProcess(CPU), tmp_path)
    assert finished(spec, Pool(2), tmp_path) == expected
    assert finished(spec, Graphed(CPU), tmp_path) == expected
    fresh = finished(spec_of(tiny, method, cohort=10, rounds=4), InProcess(CPU), tmp_path)
    assert fresh["rounds"][0]["uplink_bytes"] == expected["rounds"][0]["uplink_bytes"]
    assert fresh["final"]["loss"] != expected["final"]["loss"]
    stacked = finished(spec, Stacked(CPU), tmp_path)
    assert stacked["final"]["uplink_bytes"] == pytest.approx(expected["final"]["uplink_bytes"], rel=1e-2)
    assert stacked["final"]["loss"] == pytest.approx(expected["final"]["loss"], rel=0.05)


@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_engines_for_a_gpu_keep_the_moments_of_each_client(tiny: MakeSpec, kind: type[Any]) -> None:
    """Ten clients of two sizes, in two rounds: what each keeps is what it keeps when it is trained in process."""
    spec = spec_of(tiny, "fedpm", persistent=True)
    _, message = begin(spec)
    memories: dict[str, dict[int, bytes]] = {"reference": {}, "engine": {}}
    for number in (1, 2):
        for name, engine in (("reference", InProcess(CPU)), ("engine", kind(CPU))):
            replies = list(engine.train(spec, message, number, range(10), memories[name]))
            assert all(isinstance(reply, Reply) for _, reply in replies)
            memories[name] = {client: reply.memory for client, reply in replies}
    for client in range(10):
        found, expected = (np.frombuffer(memories[name][client], "<f4") for name in ("engine", "reference"))
        if kind is Graphed:
            assert np.array_equal(found, expected)
        else:
            assert found[-1] == expected[-1] == 20
            assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected[:-1])


class Dropping(InProcess):
    """Loses power in the third round."""

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Any, memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        if round == 3:
            raise KeyboardInterrupt
        return super().train(spec, message, round, cohort, memories)


@pytest.mark.parametrize("more", [{}, {"aggregation": "bayes", "reset_period": 4}], ids=["mean", "bayes"])
def test_moments_come_back_from_a_checkpoint(tiny: MakeSpec, tmp_path: Path, more: dict[str, Any]) -> None:
    spec = spec_of(tiny, "fedpm", persistent=True, cohort=9, rounds=5, hyper=more)
    expected = finished(spec, InProcess(CPU), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rounds.run(spec, Dropping(CPU), root=tmp_path, save_every=0)
    loaded = checkpoint.Checkpoint(spec, tmp_path).load()
    assert loaded and len(loaded[2]["rounds"]) == 2 and len(loaded[1]) >= 9
    assert {len(memory) for memory in loaded[1].values()} == {4 * (2 * 4736 + 1)}
    assert json.dumps(finished(spec, InProcess(CPU), tmp_path)) == json.dumps(expected)


def test_a_client_that_diverges_keeps_what_it_had(tiny: MakeSpec) -> None:
    spec = spec_of(tiny, "fedavg", persistent=True)
    task, message = begin(spec)
    memory = replied(spec, 1, b"").memory
    spoilt = np.frombuffer(memory, "<f4").copy()
    spoilt[0] = np.nan
    answer = run_client(spec, task, message, 2, 3, spoilt.tobytes())
    assert isinstance(answer, PayloadError)
    memories = {3: memory}
    assert list(rounds.remembered([(3, answer)], memories)) == [(3, answer)]
    assert memories == {3: memory}


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_every_method_trains_with_adam(tiny: MakeSpec, method: str) -> None:
    # FedCompress has stages of its own, which test_stages.py and test_fedcompress.py train.
    hyper = {"variant": "none"} if method == "fedcompress" else {}
    spec = spec_of(tiny, method, hyper=hyper)
    task, message = begin(spec)
    plain = tiny(method=method, lr=spec.lr, epochs=2, hyper=hyper)
    adam = run_client(spec, task, message, 1, 3)
    sgd = run_client(plain, task_of(plain.key(), CPU), message, 1, 3)
    assert isinstance(adam, bytes) and isinstance(sgd, bytes) and adam != sgd


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
