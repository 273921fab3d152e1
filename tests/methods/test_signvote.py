"""SignSGD with a vote of the clients: numbers worked by hand."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_task import CPU, ONE, flat, make_task, served, state_of, uploaded
from torch import Tensor, nn

from fedlib.core.method import Local
from fedlib.core.plan import Plan
from fedlib.core.task import Task
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.methods.baselines.signsgd import SignSGD, SignVote
from fedlib.rng import Rng
from fedlib.runs import build, record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

each_vote = pytest.mark.parametrize("vote", ["majority", "mean"])


def of(task: Task, vote: str = "majority", step: float = 0.5) -> SignVote:
    return SignVote(vote=vote, step=step).bind(task)


def task_of(network: nn.Module, lr: float = 0.3) -> Task:
    return make_task(network, Plan(epochs=1, batch=4, lr=lr))


def line_task(columns: int) -> Task:
    return task_of(nn.Linear(columns, 1, bias=False))


def upload_of(method: SignVote, u: list[float], samples: int, *others: float) -> bytes:
    sections = [*method.encode(torch.tensor(u), Local({}, {}, samples), Rng(0)), np.array(others, "<f4").tobytes()]
    return container.pack("signvote.up", method.fingerprint(), samples, sections)


def line(*values: float) -> dict[str, Tensor]:
    return {"weight": torch.tensor([list(values)])}


# Votes of u, -0.0 and zero counting as positive: column sums 3, 1, -1, -3, 1, -1 of three clients.
VOTES = [
    [0.1, 2.0, -1e-9, -3.0, 0.0, -0.2],
    [5.0, 1e-30, -7.0, -0.1, 0.3, -0.4],
    [0.2, -9.0, 0.5, -0.1, -1.0, 8.0],
]


def test_votes_by_hand() -> None:
    """Sizes of u do not count, and neither do samples."""
    model = line(10, 20, 30, 40, 50, 60)
    before = copy.deepcopy(model)
    for vote, moves in (
        ("majority", [0.5, 0.5, -0.5, -0.5, 0.5, -0.5]),
        ("mean", [0.5, 0.5 / 3, -0.5 / 3, -0.5, 0.5 / 3, -0.5 / 3]),
    ):
        method = of(line_task(6), vote)
        for samples in ((1, 1, 1), (1, 1, 1000)):
            uploads = [upload_of(method, u, n) for u, n in zip(VOTES, samples, strict=True)]
            for order in (uploads, uploads[::-1]):
                found = served(method, *order, model=model)["weight"]
                torch.testing.assert_close(found, before["weight"] + torch.tensor([moves]))
    assert torch.equal(model["weight"], before["weight"]), "the old state is left alone"


@each_vote
def test_a_tie_leaves_the_weight_where_it_is(vote: str) -> None:
    method = of(line_task(3), vote)
    uploads = [upload_of(method, u, 4) for u in ([1.0, -1.0, 1.0], [-1.0, 1.0, 1.0])]
    found = served(method, *uploads, model=line(1.25, -2.5, 0.1))["weight"]
    assert found.tolist() == [[1.25, -2.5, pytest.approx(0.6)]]


@each_vote
def test_one_client_alone_decides(vote: str) -> None:
    method = of(line_task(3), vote)
    found = served(method, upload_of(method, [0.1, -7.0, 0.0], 1), model=line(0, 0, 0))
    assert found["weight"].tolist() == [[0.5, -0.5, 0.5]]


@each_vote
def test_only_accepted_uploads_vote(vote: str) -> None:
    method = of(line_task(2), vote)
    good = [upload_of(method, u, 1) for u in ([1.0, -1.0], [1.0, 1.0])]
    other = upload_of(of(line_task(2), vote, step=0.25), [-1.0, -1.0], 1)
    plain = container.pack("signvote.up", method.fingerprint(), 1, [b"\x04", b""])  # padding set
    uploads = Uploads(enumerate([good[0], other, good[1][:-1], plain, PayloadError("diverged"), b"", good[1]]))
    found = method.aggregate(state_of(method, line(0, 0)), uploads).model
    assert uploads.accepted == [0, 6] and [k for k, _ in uploads.refused] == [1, 2, 3, 4, 5]
    assert found["weight"].tolist() == [[0.5, 0.0]]
    with pytest.raises(NoUpdate):
        served(method, other, b"", model=line(0, 0))


def test_round_worked_by_hand() -> None:
    """One step at zero, learning rate 0.3; the gradient is (softmax - one-hot) x, as in SignSGD's test.

    A: u = (0.2, -0.1, -0.1); B: u = (-0.2, 0.4, -0.2). Signs add up to 0, 0, -2; the mean is half of it.
    """
    zero = {"weight": torch.zeros(3, 1)}
    shards = ONE, (torch.full((3, 1), 2.0), torch.tensor([1, 1, 1]))
    for vote in ("majority", "mean"):
        method = of(task_of(nn.Linear(1, 3, bias=False)), vote)
        uploads = [uploaded(method, shard, Rng(k), zero) for k, shard in enumerate(shards)]
        assert [bytes(upload[-5:-4]) for upload in uploads] == [b"\x01", b"\x02"]
        assert served(method, *uploads, model=zero)["weight"].flatten().tolist() == [0, 0, -0.5]
        assert served(method, uploads[0], model=zero)["weight"].flatten().tolist() == [0.5, -0.5, -0.5]


@each_vote
def test_biases_and_batchnorm_are_averaged_by_samples(vote: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 1))
    method = of(task_of(network), vote)
    task, model = method.task, method.task.initial()
    assert [*task.weights] == ["0.weight", "3.weight"]
    others = [*task.vectors, *task.statistics]
    a = upload_of(method, [1.0, -1.0], 1, *(float(i) for i in range(len(others))))
    b = upload_of(method, [1.0, -1.0], 3, *(float(4 + i) for i in range(len(others))))
    found = served(method, a, b)
    assert found.keys() == model.keys()
    assert [float(found[name]) for name in others] == pytest.approx([i + 3 for i in range(len(others))])
    assert float(found["0.weight"]) == pytest.approx(float(model["0.weight"]) + 0.5)
    assert float(found["3.weight"]) == pytest.approx(float(model["3.weight"]) - 0.5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [1, 8, 13])
def test_upload_in_bytes(bias: bool, columns: int) -> None:
    """d = 3 columns + 6 weights: ceil(d / 8) bytes of signs, no scale, 4 bytes an entry that is no weight."""
    method = of(task_of(nn.Sequential(nn.Linear(columns, 3, bias=bias), nn.Linear(3, 2, bias=bias))))
    upload = uploaded(method, (torch.ones(2, columns), torch.tensor([0, 1])), Rng(0))
    expected = (math.ceil((3 * columns + 6) / 8), 20 if bias else 0)
    assert container.section_sizes(upload) == expected and len(method.sections) == 2
    assert 0 < len(upload) - sum(expected) <= 64
    assert method.sizes(upload).paper == 3 * columns + 6


def test_signs_are_those_of_signsgd() -> None:
    """The same local training: the two uploads differ in the scales alone."""
    task = task_of(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    shard = (torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)
    (signs, full), (other_signs, _, other_full) = (
        container.unpack(
            uploaded(method, shard, Rng(2)), f"{method.name}.up", method.fingerprint(), [100] * len(method.sections)
        ).sections
        for method in (of(task, "mean"), SignSGD().bind(task))
    )
    assert bytes(signs) == bytes(other_signs) and bytes(full) == bytes(other_full)


@each_vote
def test_every_weight_moves_by_the_step_at_most(tiny: Callable[..., Spec], tmp_path: Path, vote: str) -> None:
    spec = tiny(method="signvote", hyper={"vote": vote, "step": 0.01}, cohort=5, rounds=6, evaluate_every=1)
    found = record.stable(rounds.run(spec, InProcess(CPU), root=tmp_path))
    assert found["final"]["accuracy"] > 0.7
    assert found["final"]["paper_bits"] == 6 * 5 * 4736
    assert record.stable(rounds.run(spec, Graphed(CPU), root=tmp_path)) == found
    method, task = (job := build.job(spec, CPU)).method, job.task
    after = served(method, *(uploaded(method, task.shard(k), Rng(k)) for k in range(5)))
    moves = (flat(after, task) - flat(task.initial(), task)).mul(100 * 5).round().unique()
    assert moves.tolist() == ([-5, 5] if vote == "majority" else [-5, -3, -1, 1, 3, 5])


def test_a_client_that_diverges_sends_nothing() -> None:
    method = of(task_of(nn.Linear(1, 3, bias=False), lr=1e30))
    with pytest.raises(PayloadError, match="diverged"):
        uploaded(method, (torch.full((1, 1), 1e30), torch.tensor([0])), Rng(0), {"weight": torch.zeros(3, 1)})


@pytest.mark.parametrize(
    "values", [*({"vote": v} for v in ("median", None, 1)), *({"step": v} for v in (0, -1, 1e4, math.nan, "x", True))]
)
def test_bad_settings_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"hyper.{next(iter(values))}: "):
        registry.make("signvote", values)


def test_there_is_no_error_feedback(tiny: Callable[..., Spec]) -> None:
    with pytest.raises(SpecError, match=r"feedback: True .* signvote"):
        tiny(method="signvote", feedback=True)
