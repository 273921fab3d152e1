"""What a client keeps from one of its rounds to the next: what its optimizer keeps, or the error to feed back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import CPU, MakeSpec, Stopping, job_of, message_of, ran

from fedlib.core import client
from fedlib.core.client import Job, Reply
from fedlib.core.method import Local
from fedlib.core.plan import count
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.pool import Pool
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.rng import Rng
from fedlib.runs import checkpoint, rounds
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
COMPRESSED: dict[str, dict[str, Any]] = {
    "fedmrn": {"mask": "signed", "magnitude": 0.05}, "signsgd": {}, "topk": {}, "terngrad": {}, "drive": {}, "eden": {},
}  # fmt: skip
WEIGHTS = 4736  # of the tiny network
SCHEDULED = {"magnitude": 0.05, "decay": 0.8}


def replied(job: Job, round: int, memory: bytes, number: int = 3) -> Reply:
    reply = InProcess(CPU).client(job, message_of(job, round), round, number, memory)
    assert isinstance(reply, Reply)
    return reply


def trained(job: Job, round: int, number: int) -> Local:
    """What a client without memory has trained, taken step by step from the library's parts."""
    member = client.begin(job, message_of(job, round), round, number, None)
    for index, phase in enumerate(job.method.phases()):
        client.enter(member, index, phase)
        client.train(job.method, phase, [member])
    return member.local


def values(memory: bytes) -> np.ndarray:
    return np.frombuffer(memory, "<f4")


# Error feedback


@pytest.mark.parametrize("method", COMPRESSED)
def test_what_is_sent_and_what_is_kept_add_up_to_what_was_learned(tiny: MakeSpec, method: str) -> None:
    job, memory = job_of(tiny(method=method, hyper=COMPRESSED[method])), b""
    learned, sent = (torch.zeros(count(job.task.weights), dtype=torch.float64) for _ in range(2))
    for round in (1, 4, 9):
        local, reply = trained(job, round, 3), replied(job, round, memory)
        learned += local.trainable["u"].detach().double()
        sent += job.method.sent(reply.upload, local).double()
        memory = reply.memory
        kept = torch.from_numpy(values(memory).copy()).double()
        torch.testing.assert_close(sent + kept, learned, rtol=0, atol=2e-6)
        assert kept.abs().max() > 1e-4  # one bit does lose something


def test_the_first_round_sends_what_a_client_without_memory_sends(tiny: MakeSpec) -> None:
    job = job_of(tiny(method="topk"))
    first = replied(job, 1, b"")
    assert first.upload == InProcess(CPU).client(job, message_of(job), 1, 3)
    later = replied(job, 1, first.memory)
    assert later.upload != first.upload
    assert len(later.memory) == len(first.memory) == 4 * count(job.task.weights)


def test_topk_sends_in_the_second_round_what_it_dropped_in_the_first(tiny: MakeSpec) -> None:
    """With one learning rate of almost nothing in round two, only the memory is left to be sent."""
    job, still = (job_of(tiny(method="topk", lr=lr)) for lr in (0.5, 1e-12))
    local, first = trained(job, 1, 3), replied(job, 1, b"")
    a, b = (job.method.sent(reply.upload, local) for reply in (first, replied(still, 2, first.memory)))
    k = int((a != 0).sum())
    order = local.trainable["u"].detach().abs().argsort(descending=True)
    assert set(order[:k].tolist()) == set(a.nonzero().flatten().tolist())
    assert set(order[k : 2 * k].tolist()) == set(b.nonzero().flatten().tolist())


@pytest.mark.parametrize("method", ["fedavg", "fedsparsify"])
def test_feedback_is_refused_where_nothing_is_compressed(tiny: MakeSpec, method: str) -> None:
    with pytest.raises(SpecError, match=f"feedback: True .* {method}, .* use false"):
        tiny(method=method, feedback=True)
    with pytest.raises(SpecError, match="feedback: 1 must be true or false"):
        tiny(method="topk", feedback=1)


# What the optimizer keeps


def spec_of(tiny: MakeSpec, method: str, **more: Any) -> Spec:
    return tiny(method=method, optimizer="adam", lr=0.05 if method == "fedpm" else 0.003, epochs=2, **more)


@pytest.mark.parametrize("method", ["fedpm", "fedavg"])
def test_memory_of_the_first_round_changes_the_second(tiny: MakeSpec, method: str) -> None:
    job = job_of(spec_of(tiny, method, persistent=True))
    first, fresh = replied(job, 1, b""), InProcess(CPU).client(job, message_of(job), 1, 3)
    assert first.upload == fresh, "the first round is that of a fresh optimizer"
    assert len(first.memory) == 4 * (2 * WEIGHTS + 1)
    steps = job.task.plan.steps(len(job.task.partition.indices(3)))
    assert values(first.memory)[-1] == steps == 10
    second = replied(job, 2, first.memory)
    assert values(second.memory)[-1] == 2 * steps
    assert second.upload != replied(job, 2, b"").upload
    assert second == replied(job, 2, first.memory)


def test_second_round_equals_one_written_with_torch_s_adam(tiny: MakeSpec) -> None:
    """FedAvg: torch's Adam, kept over two rounds that both start from the broadcast model."""
    spec = spec_of(tiny, "fedavg", persistent=True)
    job = job_of(spec)
    (x, y), model = job.task.shard(3), job.task.initial()
    own = {name: t.clone().requires_grad_() for name, t in model.items()}
    adam, memory = torch.optim.Adam(own.values(), lr=spec.lr), b""
    for number in (1, 2):
        with torch.no_grad():
            for name, tensor in model.items():
                own[name].copy_(tensor)
        order = Rng(spec.seed).child("client", number, 3).child("order").stream()
        for _ in range(spec.epochs):
            for batch in order.permutation(len(x)).split(spec.batch):
                adam.zero_grad()
                hidden = (x[batch].flatten(1) @ own["1.weight"].T).relu()
                torch.autograd.backward(torch.nn.functional.cross_entropy(hidden @ own["3.weight"].T, y[batch]))
                adam.step()
        reply = replied(job, number, memory)
        memory = reply.memory
        sent = torch.from_numpy(values(reply.upload[-4 - 4 * WEIGHTS : -4]).copy())
        expected = torch.cat([tensor.detach().flatten() for tensor in own.values()])
        torch.testing.assert_close(sent, expected, rtol=1e-4, atol=1e-4)
        assert float((expected - torch.cat([t.flatten() for t in model.values()])).abs().max()) > 5e-3


def test_without_persistence_nothing_is_kept(tiny: MakeSpec, tmp_path: Path) -> None:
    """Not even where a client is handed something: its optimizer starts anew."""
    spec = spec_of(tiny, "fedpm")
    job, memory = job_of(spec), replied(job_of(spec_of(tiny, "fedpm", persistent=True)), 1, b"").memory
    assert isinstance(InProcess(CPU).client(job, message_of(job, 2), 2, 3), bytes)
    member = client.begin(job, message_of(job, 2), 2, 3, {3: memory})
    client.enter(member, 0, job.method.phases()[0])
    assert member.moments and not any(tensor.any() for tensor in member.moments.values())
    rounds.run(spec, InProcess(CPU), root=tmp_path, save_every=0)
    loaded = checkpoint.Checkpoint(spec, tmp_path).load(job.method)
    assert loaded and loaded[1] == {}


def test_adam_with_error_feedback_keeps_the_error_alone(tiny: MakeSpec) -> None:
    job = job_of(tiny(method="topk", optimizer="adam", lr=0.003, feedback=True))
    first = replied(job, 1, b"")
    assert len(first.memory) == 4 * WEIGHTS
    assert replied(job, 2, first.memory).upload != replied(job, 2, b"").upload


def test_a_client_that_diverges_keeps_what_it_had(tiny: MakeSpec) -> None:
    job = job_of(spec_of(tiny, "fedavg", persistent=True))
    memory = replied(job, 1, b"").memory
    spoilt = values(memory).copy()
    spoilt[0] = np.nan
    answer = InProcess(CPU).client(job, message_of(job, 2), 2, 3, spoilt.tobytes())
    assert isinstance(answer, PayloadError)
    memories = {3: memory}
    assert list(rounds.remembered([(3, answer)], memories)) == [(3, answer)]
    assert memories == {3: memory}


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_every_method_trains_with_adam(tiny: MakeSpec, method: str) -> None:
    # FedCompress has phases of its own, which tests/methods trains.
    hyper = {"variant": "none"} if method == "fedcompress" else {}
    spec = spec_of(tiny, method, hyper=hyper)
    job, plain = job_of(spec), job_of(tiny(method=method, lr=spec.lr, epochs=2, hyper=hyper))
    adam, sgd = (InProcess(CPU).client(each, message_of(job), 1, 3) for each in (job, plain))
    assert isinstance(adam, bytes) and isinstance(sgd, bytes) and adam != sgd


# In all engines


@pytest.mark.parametrize(
    "method, kept", [("fedmrn", "error"), ("signsgd", "error"), ("fedpm", "adam"), ("fedavg", "adam")]
)
def test_engines_agree_on_what_is_kept(tiny: MakeSpec, tmp_path: Path, method: str, kept: str) -> None:
    switch = {"feedback" if kept == "error" else "persistent": True}
    hyper = COMPRESSED.get(method, {})
    make = tiny if kept == "error" else lambda **fields: spec_of(tiny, **fields)
    spec, plain = (make(method=method, hyper=hyper, cohort=10, rounds=4, **more) for more in (switch, {}))
    expected, without = ran(spec, tmp_path), ran(plain, tmp_path)
    with Pool(2) as pool:
        assert ran(spec, tmp_path, pool) == expected
    assert ran(spec, tmp_path, Graphed(CPU)) == expected
    assert without["rounds"][0]["uplink_bytes"] == expected["rounds"][0]["uplink_bytes"]
    assert without["final"]["loss"] != expected["final"]["loss"]
    stacked = ran(spec, tmp_path, Stacked(CPU))
    tolerance = 1e-2 if method == "fedpm" else 0  # whose uploads are coded
    assert stacked["final"]["uplink_bytes"] == pytest.approx(expected["final"]["uplink_bytes"], rel=tolerance)
    assert stacked["final"]["loss"] == pytest.approx(expected["final"]["loss"], rel=0.05)


@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_engines_for_a_gpu_keep_the_moments_of_each_client(tiny: MakeSpec, kind: type[Any]) -> None:
    """Ten clients of two sizes, in two rounds: what each keeps is what it keeps when it is trained in process."""
    job = job_of(spec_of(tiny, "fedpm", persistent=True))
    memories: dict[str, dict[int, bytes]] = {"reference": {}, "engine": {}}
    for number in (1, 2):
        for name, engine in (("reference", InProcess(CPU)), ("engine", kind(CPU))):
            replies = list(engine.train(job, message_of(job, number), number, range(10), memories[name]))
            assert all(isinstance(reply, Reply) for _, reply in replies)
            memories[name] = {client: reply.memory for client, reply in replies}
    for client_ in range(10):
        found, expected = (values(memories[name][client_]) for name in ("engine", "reference"))
        if kind is Graphed:
            assert np.array_equal(found, expected)
        else:
            assert found[-1] == expected[-1] == 20
            assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected[:-1])


# Over a break


@pytest.mark.parametrize(
    "method, fields, size",
    [
        ("fedmrn", {"hyper": SCHEDULED, "feedback": True}, WEIGHTS),
        ("fedpm", {"persistent": True}, 2 * WEIGHTS + 1),
        ("fedpm", {"persistent": True, "hyper": {"aggregation": "bayes", "reset_period": 4}}, 2 * WEIGHTS + 1),
    ],
    ids=["error", "adam, mean", "adam, bayes"],
)
def test_memories_come_back_from_a_checkpoint(
    tiny: MakeSpec, tmp_path: Path, method: str, fields: dict[str, Any], size: int
) -> None:
    make = tiny if "feedback" in fields else lambda **more: spec_of(tiny, **more)
    spec = make(method=method, cohort=9, rounds=5, **fields)
    expected = ran(spec, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        rounds.run(spec, Stopping(3), root=tmp_path, save_every=0)
    loaded = checkpoint.Checkpoint(spec, tmp_path).load(job_of(spec).method)
    assert loaded and len(loaded[2]["rounds"]) == 2 and len(loaded[1]) >= 9
    assert {len(memory) for memory in loaded[1].values()} == {4 * size}
    assert json.dumps(ran(spec, tmp_path)) == json.dumps(expected)
