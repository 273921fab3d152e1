"""SignSGD with a vote of the clients: numbers worked by hand."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor, nn

from fedlib.core import client
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, NoUpdate, Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.methods.baselines import signsgd, signvote
from fedlib.methods.baselines.signvote import Hyper
from fedlib.rng import Rng
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

CPU = torch.device("cpu")
MAJORITY, MEAN = Hyper(step=0.5), Hyper(vote="mean", step=0.5)
each_vote = pytest.mark.parametrize("hyper", [MAJORITY, MEAN], ids=["majority", "mean"])


def make_task(network: nn.Module, batch: int = 4, lr: float = 0.3) -> Task:
    return toys.make_task(network, Plan(epochs=1, batch=batch, lr=lr))


def upload_of(u: list[float], samples: int, hyper: Hyper, task: Task, *others: float) -> bytes:
    sections = [*signvote.encode(torch.tensor(u), hyper, task, Rng(0)), np.array(others, "<f4").tobytes()]
    return container.pack("signvote.up", task.fingerprint("signvote", hyper), samples, sections)


def server(state: State, hyper: Hyper, task: Task, *uploads: Buffer) -> State:
    return signvote.server(state, Uploads(enumerate(uploads)), hyper, task)


def line(*values: float) -> Tensor:
    return torch.tensor([list(values)])


# Votes of u, -0.0 and zero counting as positive: column sums 3, 1, -1, -3, 1, -1 of three clients.
VOTES = [
    [0.1, 2.0, -1e-9, -3.0, 0.0, -0.2],
    [5.0, 1e-30, -7.0, -0.1, 0.3, -0.4],
    [0.2, -9.0, 0.5, -0.1, -1.0, 8.0],
]


def test_votes_by_hand() -> None:
    """Sizes of u do not count, and neither do samples."""
    task = make_task(nn.Linear(6, 1, bias=False))
    state = {"weight": line(10, 20, 30, 40, 50, 60)}
    before = copy.deepcopy(state)
    for hyper, moves in (
        (MAJORITY, [0.5, 0.5, -0.5, -0.5, 0.5, -0.5]),
        (MEAN, [0.5, 0.5 / 3, -0.5 / 3, -0.5, 0.5 / 3, -0.5 / 3]),
    ):
        for samples in ((1, 1, 1), (1, 1, 1000)):
            uploads = [upload_of(u, n, hyper, task) for u, n in zip(VOTES, samples, strict=True)]
            for order in (uploads, uploads[::-1]):
                found = server(state, hyper, task, *order)["weight"]
                torch.testing.assert_close(found, before["weight"] + line(*moves))
    assert torch.equal(state["weight"], before["weight"]), "the old state is left alone"


@each_vote
def test_a_tie_leaves_the_weight_where_it_is(hyper: Hyper) -> None:
    task, state = make_task(nn.Linear(3, 1, bias=False)), {"weight": line(1.25, -2.5, 0.1)}
    uploads = [upload_of(u, 4, hyper, task) for u in ([1.0, -1.0, 1.0], [-1.0, 1.0, 1.0])]
    found = server(state, hyper, task, *uploads)["weight"]
    assert found.tolist() == [[1.25, -2.5, pytest.approx(0.6)]]


@each_vote
def test_one_client_alone_decides(hyper: Hyper) -> None:
    task, state = make_task(nn.Linear(3, 1, bias=False)), {"weight": line(0, 0, 0)}
    assert server(state, hyper, task, upload_of([0.1, -7.0, 0.0], 1, hyper, task))["weight"].tolist() == [
        [0.5, -0.5, 0.5]
    ]


@each_vote
def test_only_accepted_uploads_vote(hyper: Hyper) -> None:
    task, state = make_task(nn.Linear(2, 1, bias=False)), {"weight": line(0, 0)}
    good = [upload_of(u, 1, hyper, task) for u in ([1.0, -1.0], [1.0, 1.0])]
    other = upload_of([-1.0, -1.0], 1, Hyper(step=0.25, vote=hyper.vote), task)
    plain = container.pack("signvote.up", task.fingerprint("signvote", hyper), 1, [b"\x04", b""])  # padding set
    uploads = Uploads(enumerate([good[0], other, good[1][:-1], plain, PayloadError("diverged"), b"", good[1]]))
    found = signvote.server(state, uploads, hyper, task)
    assert uploads.accepted == [0, 6] and [k for k, _ in uploads.refused] == [1, 2, 3, 4, 5]
    assert found["weight"].tolist() == [[0.5, 0.0]]
    with pytest.raises(NoUpdate):
        server(state, hyper, task, other, b"")


def test_round_worked_by_hand() -> None:
    """One step at zero, learning rate 0.3; the gradient is (softmax - one-hot) x, as in SignSGD's test.

    A: u = (0.2, -0.1, -0.1); B: u = (-0.2, 0.4, -0.2). Signs add up to 0, 0, -2; the mean is half of it.
    """
    task, zero = make_task(nn.Linear(1, 3, bias=False)), {"weight": torch.zeros(3, 1)}
    shards = (torch.ones(1, 1), torch.tensor([0])), (torch.full((3, 1), 2.0), torch.tensor([1, 1, 1]))
    for hyper in (MAJORITY, MEAN):
        message = signvote.broadcast(zero, hyper, task)
        uploads = [client.client(signvote, message, shard, hyper, task, Rng(k)) for k, shard in enumerate(shards)]
        assert [bytes(upload[-5:-4]) for upload in uploads] == [b"\x01", b"\x02"]
        assert server(zero, hyper, task, *uploads)["weight"].flatten().tolist() == [0, 0, -0.5]
        assert server(zero, hyper, task, uploads[0])["weight"].flatten().tolist() == [0.5, -0.5, -0.5]


@each_vote
def test_biases_and_batchnorm_are_averaged_by_samples(hyper: Hyper) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 1))
    task = make_task(network)
    assert [*task.weights] == ["0.weight", "3.weight"]
    state = task.initial()
    others = [*task.vectors, *task.statistics]
    a = upload_of([1.0, -1.0], 1, hyper, task, *(float(i) for i in range(len(others))))
    b = upload_of([1.0, -1.0], 3, hyper, task, *(float(4 + i) for i in range(len(others))))
    found = server(state, hyper, task, a, b)
    assert found.keys() == state.keys()
    assert [float(found[name]) for name in others] == pytest.approx([i + 3 for i in range(len(others))])
    assert float(found["0.weight"]) == pytest.approx(float(state["0.weight"]) + 0.5)
    assert float(found["3.weight"]) == pytest.approx(float(state["3.weight"]) - 0.5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [1, 8, 13])
def test_upload_in_bytes(bias: bool, columns: int) -> None:
    """d = 3 columns + 6 weights: ceil(d / 8) bytes of signs, no scale, 4 bytes an entry that is no weight."""
    task = make_task(nn.Sequential(nn.Linear(columns, 3, bias=bias), nn.Linear(3, 2, bias=bias)))
    message = signvote.broadcast(task.initial(), MAJORITY, task)
    shard = (torch.ones(2, columns), torch.tensor([0, 1]))
    upload = client.client(signvote, message, shard, MAJORITY, task, Rng(0))
    expected = (math.ceil((3 * columns + 6) / 8), 20 if bias else 0)
    assert container.section_sizes(upload) == expected and len(signvote.SECTIONS) == 2
    assert 0 < len(upload) - sum(expected) <= 64
    assert signvote.paper_bits(upload, MAJORITY, task) == 3 * columns + 6


def test_signs_are_those_of_signsgd() -> None:
    """The same local training: the two uploads differ in the scales alone."""
    task = make_task(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    shard = (torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)
    plain = signsgd.Hyper()
    uploads = (
        client.client(signvote, signvote.broadcast(task.initial(), MEAN, task), shard, MEAN, task, Rng(2)),
        client.client(signsgd, signsgd.broadcast(task.initial(), plain, task), shard, plain, task, Rng(2)),
    )
    (signs, full), (other_signs, _, other_full) = (
        container.unpack(upload, kind, task.fingerprint(kind[:-3], hyper), [100] * count).sections
        for upload, kind, hyper, count in zip(
            uploads, ("signvote.up", "signsgd.up"), (MEAN, plain), (2, 3), strict=True
        )
    )
    assert bytes(signs) == bytes(other_signs) and bytes(full) == bytes(other_full)


@each_vote
def test_every_weight_moves_by_the_step_at_most(tiny: Callable[..., Spec], tmp_path: Path, hyper: Hyper) -> None:
    spec = tiny(method="signvote", hyper={"vote": hyper.vote, "step": 0.01}, cohort=5, rounds=6, evaluate_every=1)
    found = record.stable(rounds.run(spec, InProcess(CPU), root=tmp_path))
    assert found["final"]["accuracy"] > 0.7
    assert found["final"]["paper_bits"] == 6 * 5 * 4736
    assert record.stable(rounds.run(spec, Graphed(CPU), root=tmp_path)) == found
    task = Task.of(spec, CPU)
    own = registry.hyper("signvote", spec.hyper)
    state = task.initial()
    message = signvote.broadcast(state, own, task)
    uploads = [client.client(signvote, message, task.shard(k), own, task, Rng(k)) for k in range(5)]
    after = server(state, own, task, *uploads)
    moves = torch.cat([(after[name] - state[name]).flatten() for name in state]).mul(100 * 5).round().unique()
    assert moves.tolist() == ([-5, 5] if hyper.vote == "majority" else [-5, -3, -1, 1, 3, 5])


def test_a_client_that_diverges_sends_nothing() -> None:
    task = make_task(nn.Linear(1, 3, bias=False), lr=1e30)
    message = signvote.broadcast({"weight": torch.zeros(3, 1)}, MAJORITY, task)
    with pytest.raises(PayloadError, match="diverged"):
        shard = (torch.full((1, 1), 1e30), torch.tensor([0]))
        client.client(signvote, message, shard, MAJORITY, task, Rng(0))


@pytest.mark.parametrize(
    "values", [*({"vote": v} for v in ("median", None, 1)), *({"step": v} for v in (0, -1, 1e4, math.nan, "x", True))]
)
def test_bad_settings_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"hyper.{next(iter(values))}: "):
        registry.hyper("signvote", values)


def test_there_is_no_error_feedback(tiny: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match=r"feedback: True .* signvote"):
        tiny(method="signvote", feedback=True)
