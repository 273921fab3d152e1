"""What outlives a round: a client's error feedback, the server's noise magnitude."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlib.core import client as client_side
from fedlib.core.client import Reply, run_client
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, Memories, task_of
from fedlib.engines.pool import Pool
from fedlib.engines.vmapped import Stacked
from fedlib.errors import SpecError
from fedlib.methods import fedmrn, registry
from fedlib.rng import Rng
from fedlib.runs import checkpoint, record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
COMPRESSED = {
    "fedmrn": {"mask": "signed", "magnitude": 0.05}, "signsgd": {}, "topk": {}, "terngrad": {}, "drive": {}, "eden": {},
}  # fmt: skip


def trained(spec: Spec, message: bytes, round: int, client: int) -> tuple[Task, State, State]:
    """Task, trainable and frozen tensors after local training, taken step by step from the library's parts."""
    task, method, hyper = (
        task_of(spec.key(), CPU),
        registry.METHODS[spec.method],
        registry.hyper(spec.method, spec.hyper),
    )
    rng = Rng(spec.seed).child("client", round, client)
    trainable, frozen = method.start(message, hyper, task, rng)
    client_side.train(method, trainable, frozen, task.shard(client), hyper, task, rng)
    return task, trainable, frozen


def broadcast(spec: Spec) -> bytes:
    task, hyper = task_of(spec.key(), CPU), registry.hyper(spec.method, spec.hyper)
    message: bytes = registry.METHODS[spec.method].broadcast(registry.initial(spec, task), hyper, task)
    return message


# Error feedback


@pytest.mark.parametrize("method", COMPRESSED)
def test_what_is_sent_and_what_is_kept_add_up_to_what_was_learned(tiny: MakeSpec, method: str) -> None:
    spec = tiny(method=method, hyper=COMPRESSED[method])
    message, memory = broadcast(spec), b""
    learned, sent = torch.zeros(0), torch.zeros(0)
    for round in (1, 4, 9):
        task, trainable, frozen = trained(spec, message, round, client=3)
        reply = run_client(spec, task, message, round, 3, memory)
        assert isinstance(reply, Reply)
        hyper = registry.hyper(method, spec.hyper)
        update = registry.METHODS[method].sent(reply.upload, frozen, hyper, task).double()
        learned = trainable["u"].detach().double() + (learned if len(learned) else 0)
        sent = update + (sent if len(sent) else 0)
        memory = reply.memory
        kept = torch.from_numpy(np.frombuffer(memory, dtype=np.float32).copy()).double()
        torch.testing.assert_close(sent + kept, learned, rtol=0, atol=2e-6)
        assert kept.abs().max() > 1e-4  # one bit does lose something


def test_the_first_round_sends_what_a_client_without_memory_sends(tiny: MakeSpec) -> None:
    spec = tiny(method="topk")
    task, message = task_of(spec.key(), CPU), broadcast(spec)
    first = run_client(spec, task, message, 1, 2, b"")
    assert isinstance(first, Reply)
    assert first.upload == run_client(spec, task, message, 1, 2)
    later = run_client(spec, task, message, 1, 2, first.memory)
    assert isinstance(later, Reply)
    assert later.upload != first.upload
    assert len(later.memory) == len(first.memory) == 4 * sum(shape.numel() for shape in task.weights.values())


def test_topk_sends_in_the_second_round_what_it_dropped_in_the_first(tiny: MakeSpec) -> None:
    """With one learning rate of almost nothing in round two, only the memory is left to be sent."""
    spec, still = tiny(method="topk", lr=0.5), tiny(method="topk", lr=1e-12)
    task, message = task_of(spec.key(), CPU), broadcast(spec)
    _, trainable, frozen = trained(spec, message, 1, client=0)
    first = run_client(spec, task, message, 1, 0, b"")
    assert isinstance(first, Reply)
    second = run_client(still, task_of(still.key(), CPU), message, 2, 0, first.memory)
    assert isinstance(second, Reply)
    hyper = registry.hyper("topk", {})
    a, b = (registry.METHODS["topk"].sent(reply.upload, frozen, hyper, task) for reply in (first, second))
    k = int((a != 0).sum())
    order = trainable["u"].detach().abs().argsort(descending=True)
    assert set(order[:k].tolist()) == set(a.nonzero().flatten().tolist())
    assert set(order[k : 2 * k].tolist()) == set(b.nonzero().flatten().tolist())


def finished(spec: Spec, engine: Any, root: Path) -> dict[str, Any]:
    with engine:
        return record.stable(rounds.run(spec, engine, root=root))


@pytest.mark.parametrize("method", ["fedmrn", "signsgd"])
def test_engines_agree_with_feedback(tiny: MakeSpec, tmp_path: Path, method: str) -> None:
    spec = tiny(method=method, hyper=COMPRESSED[method], feedback=True, cohort=10, rounds=4)
    expected = finished(spec, InProcess(CPU), tmp_path)
    assert finished(spec, Pool(2), tmp_path) == expected
    assert finished(spec, Graphed(CPU), tmp_path) == expected
    without = finished(tiny(method=method, hyper=COMPRESSED[method], cohort=10, rounds=4), InProcess(CPU), tmp_path)
    assert without["rounds"][0]["uplink_bytes"] == expected["rounds"][0]["uplink_bytes"]
    assert without["final"]["loss"] != expected["final"]["loss"]
    stacked = finished(spec, Stacked(CPU), tmp_path)
    assert stacked["final"]["uplink_bytes"] == expected["final"]["uplink_bytes"]
    assert stacked["final"]["loss"] == pytest.approx(expected["final"]["loss"], rel=0.05)


class Dropping(InProcess):
    """Loses power in the third round."""

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Any, memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        if round == 3:
            raise KeyboardInterrupt
        return super().train(spec, message, round, cohort, memories)


def test_memories_come_back_from_a_checkpoint(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(method="fedmrn", hyper={"magnitude": 0.05, "decay": 0.8}, feedback=True, cohort=9, rounds=5)
    expected = finished(spec, InProcess(CPU), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rounds.run(spec, Dropping(CPU), root=tmp_path, save_every=0)
    loaded = checkpoint.Checkpoint(spec, tmp_path).load()
    assert loaded and len(loaded[2]["rounds"]) == 2 and len(loaded[1]) >= 9
    assert json.dumps(finished(spec, InProcess(CPU), tmp_path)) == json.dumps(expected)


@pytest.mark.parametrize("method", ["fedavg", "fedsparsify"])
def test_feedback_is_refused_where_nothing_is_compressed(tiny: MakeSpec, method: str) -> None:
    with pytest.raises(SpecError, match=f"feedback: True .* {method}, .* use false"):
        tiny(method=method, feedback=True)
    with pytest.raises(SpecError, match="feedback: 1 must be true or false"):
        tiny(method="topk", feedback=1)


# The noise schedule


def test_magnitude_falls_by_its_factor_and_travels_with_the_model(tiny: MakeSpec) -> None:
    spec, plain = (tiny(method="fedmrn", hyper={"magnitude": 0.5} | more) for more in ({"decay": 0.25}, {}))
    task, hyper = task_of(spec.key(), CPU), registry.hyper("fedmrn", spec.hyper)
    state = registry.initial(spec, task)
    assert len(broadcast(spec)) == len(broadcast(plain)) + 4
    for magnitude in (0.5, 0.125, 0.03125):
        assert state["magnitude"].tolist() == [magnitude]
        message = fedmrn.broadcast(state, hyper, task)
        _, _, frozen = trained(spec, message, 1, client=1)
        assert 0.9 * magnitude < frozen["n"].abs().max() <= magnitude
        upload = run_client(spec, task, message, 1, 1)
        assert isinstance(upload, bytes)
        assert container.section_sizes(upload)[0] == 8  # still the seed alone: the server knows the magnitude
        update = fedmrn.sent(upload, frozen, hyper, task)
        assert torch.equal(update[update != 0], frozen["n"][update != 0])
        before = torch.cat([state[name].flatten() for name in task.weights])
        state = fedmrn.server(state, Uploads([(1, upload)]), hyper, task)
        after = torch.cat([state[name].flatten() for name in task.weights])
        assert torch.equal(after, before + update)


def test_without_a_schedule_nothing_is_kept_or_sent(tiny: MakeSpec) -> None:
    spec = tiny(method="fedmrn", hyper={"decay": 1.0})
    task = task_of(spec.key(), CPU)
    assert registry.initial(spec, task).keys() == task.initial().keys()
    assert len(broadcast(spec)) == len(broadcast(tiny(method="fedmrn")))


def test_entropy_coded_masks_follow_the_schedule(tiny: MakeSpec, tmp_path: Path) -> None:
    """The coder's contexts depend on the magnitude: both sides must use that of the round."""
    hyper = {"magnitude": 0.2, "decay": 0.5}
    packed = finished(tiny(method="fedmrn", hyper=hyper, rounds=5), InProcess(CPU), tmp_path)
    coded = finished(tiny(method="fedmrn", hyper=hyper | {"coding": "entropy"}, rounds=5), InProcess(CPU), tmp_path)
    assert not any(entry["refused"] for entry in coded["rounds"])
    assert [entry["loss"] for entry in coded["rounds"]] == [entry["loss"] for entry in packed["rounds"]]
    assert coded["final"]["uplink_parts"]["mask"] < packed["final"]["uplink_parts"]["mask"]


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan"), "fast"])
def test_decay_out_of_range(tiny: MakeSpec, decay: object) -> None:
    with pytest.raises(SpecError, match=r"hyper\.decay"):
        tiny(method="fedmrn", hyper={"decay": decay})
