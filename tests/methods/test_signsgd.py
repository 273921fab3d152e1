"""SignSGD, by scales and by a vote of the clients: numbers worked by hand."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import MakeSpec
from small_task import (
    CPU,
    ONE,
    THREE,
    ZERO,
    coded,
    flat,
    layers_task,
    line_task,
    make_task,
    noise,
    received,
    sent,
    served,
    state_of,
    uploaded,
)
from torch import nn

from fedlib.core.plan import Plan
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.methods.baselines.signsgd import SignSGD, SignVote
from fedlib.methods.fedavg import FedAvg
from fedlib.rng import Rng
from fedlib.runs import build, record, rounds
from fedlib.wire import bits, container, floats

each_vote = pytest.mark.parametrize("vote", ["majority", "mean"])


def linear(columns: int, bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(columns, 3, bias=bias), nn.Linear(3, 2, bias=bias))


@pytest.mark.parametrize("codec", [SignSGD(), SignVote()], ids=["signsgd", "signvote"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [1, 8, 13])
def test_upload_in_bytes(codec: SignSGD | SignVote, bias: bool, columns: int) -> None:
    """d = 3 columns + 6 weights in two layers: ceil(d / 8) bytes of signs, 4 a scale, 4 an entry that is no weight."""
    method = codec.bind(make_task(linear(columns, bias), Plan(epochs=1, batch=4, lr=0.1)))
    scales = [8] if codec == SignSGD() else []
    upload = uploaded(method, (torch.ones(2, columns), torch.tensor([0, 1])), Rng(0))
    expected = (math.ceil((3 * columns + 6) / 8), *scales, 20 if bias else 0)
    assert container.section_sizes(upload) == expected and len(method.sections) == len(expected)
    assert 0 < len(upload) - sum(expected) <= 64
    assert method.sizes(upload).paper == 3 * columns + 6 + 8 * sum(scales)


# By scales


def test_message_worked_by_hand() -> None:
    """Layer scales 2, 0.25 and 0: the means of |1 -2 3 -2|, |0.5 0| and |0 -0|. A zero counts as positive."""
    method = SignSGD().bind(layers_task((2, 2), (1, 2), (2, 1)))
    signs, scales = coded(method, torch.tensor([1.0, -2.0, 3.0, -2.0, 0.5, 0.0, 0.0, -0.0]))
    assert bytes(signs) == bytes([0b11110101])
    assert np.frombuffer(scales, "<f4").tolist() == [2.0, 0.25, 0.0]
    assert method.decode([signs, scales], None).tolist() == [2, -2, 2, -2, 0.25, 0.25, 0, 0]
    assert method.sizes(b"").paper == 8 + 3 * 32


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6), st.lists(st.floats(-1, 1, width=32), min_size=3)
)
def test_every_entry_has_its_sign_and_its_layer_s_mean_size(first: list[float], second: list[float]) -> None:
    method = SignSGD().bind(layers_task((2, 3), (1, len(second))))
    found = received(method, torch.tensor(first + second, dtype=torch.float32))
    for own, part in ((first, found[:6]), (second, found[6:])):
        size = float(np.abs(np.array(own, np.float32)).astype(np.float64).mean())
        assert part.tolist() == pytest.approx([size if v >= 0 else -size for v in own], rel=1e-5, abs=1e-30)


def test_of_all_scales_the_mean_comes_nearest() -> None:
    """The mean of |u| minimises ||s sign(u) - u||: a scale a little off is worse, in each layer for itself."""
    method = SignSGD().bind(layers_task((10, 10), (5, 10)))
    u = noise(150) * torch.cat([torch.ones(100), torch.full((50,), 9)])
    found = received(method, u)
    for part in (slice(0, 100), slice(100, 150)):
        best = float((found[part] - u[part]).norm())
        assert all(float((found[part] * factor - u[part]).norm()) > best for factor in (0.98, 1.02))


def test_the_signs_are_packed_as_masks_are() -> None:
    """So that a reader of one format reads the other."""
    u = noise(21, seed=1)
    signs, scales = coded(SignSGD().bind(layers_task((3, 7))), u)
    assert bytes(signs) == bits.pack(u.numpy() > 0)
    assert bytes(scales) == floats.encode([np.array([u.abs().mean()], np.float32)]).tobytes()


def test_round_worked_by_hand() -> None:
    """One step at zero, learning rate 0.3; the gradient is (softmax - one-hot) x, as in FedAvg's test.

    Client A, one sample:    u = ( 0.2, -0.1, -0.1), mean size 0.4 / 3
    Client B, three samples: u = (-0.2,  0.4, -0.2), mean size 0.8 / 3
    Weighted by 1 : 3, in units of 0.1 / 3: (4 - 24, -4 + 24, -4 - 24) / 4 = (-5, 5, -7)
    """
    method = SignSGD().bind(line_task())
    a, b = (uploaded(method, shard, Rng(k), ZERO) for k, shard in enumerate((ONE, THREE)))
    for messages, expected in (((a,), (4, -4, -4)), ((b,), (-8, 8, -8)), ((a, b), (-5, 5, -7)), ((b, a), (-5, 5, -7))):
        found = served(method, *messages, model=ZERO)["weight"].flatten().tolist()
        assert found == pytest.approx([v / 30 for v in expected], rel=1e-6)


def test_upload_on_digits_is_a_27th_of_fedavg_s(tiny: MakeSpec) -> None:
    task = build.task(tiny(), CPU)
    upload = uploaded(SignSGD().bind(task), task.shard(0), Rng(0))
    assert container.section_sizes(upload) == (592, 8, 0)
    assert len(uploaded(FedAvg().bind(task), task.shard(0), Rng(0))) / len(upload) > 27


# By a vote


def voting(columns: int, vote: str, step: float = 0.5) -> SignVote:
    return SignVote(vote=vote, step=step).bind(layers_task((1, columns)))


def test_votes_by_hand() -> None:
    """A zero counts as positive: column sums 3, 1, -1, -3, 1, -1. Sizes of u do not count, nor do samples."""
    votes = [
        [0.1, 2.0, -1e-9, -3.0, 0.0, -0.2],
        [5.0, 1e-30, -7.0, -0.1, 0.3, -0.4],
        [0.2, -9.0, 0.5, -0.1, -1.0, 8.0],
    ]
    model = {"0": torch.tensor([[10.0, 20, 30, 40, 50, 60]])}
    before = copy.deepcopy(model)
    for vote, moves in (
        ("majority", [0.5, 0.5, -0.5, -0.5, 0.5, -0.5]),
        ("mean", [0.5, 0.5 / 3, -0.5 / 3, -0.5, 0.5 / 3, -0.5 / 3]),
    ):
        method = voting(6, vote)
        for samples in ((1, 1, 1), (1, 1, 1000)):
            uploads = [sent(method, torch.tensor(u), n) for u, n in zip(votes, samples, strict=True)]
            for order in (uploads, uploads[::-1]):
                found = served(method, *order, model=model)["0"]
                torch.testing.assert_close(found, before["0"] + torch.tensor([moves]))
    assert torch.equal(model["0"], before["0"]), "the old state is left alone"


@each_vote
def test_a_tie_leaves_the_weight_where_it_is(vote: str) -> None:
    method = voting(3, vote)
    uploads = [sent(method, torch.tensor(u), 4) for u in ([1.0, -1.0, 1.0], [-1.0, 1.0, 1.0])]
    found = served(method, *uploads, model={"0": torch.tensor([[1.25, -2.5, 0.1]])})["0"]
    assert found.tolist() == [[1.25, -2.5, pytest.approx(0.6)]]


@each_vote
def test_only_accepted_uploads_vote(vote: str) -> None:
    method = voting(2, vote)
    good = [sent(method, torch.tensor(u)) for u in ([1.0, -1.0], [1.0, 1.0])]
    other = sent(voting(2, vote, step=0.25), -torch.ones(2))
    padded = container.pack("signvote.up", method.fingerprint(), 1, [b"\x04", b""])
    uploads = Uploads(enumerate([good[0], other, good[1][:-1], padded, PayloadError("diverged"), b"", good[1]]))
    found = method.aggregate(state_of(method), uploads).model
    assert uploads.accepted == [0, 6] and [k for k, _ in uploads.refused] == [1, 2, 3, 4, 5]
    assert found["0"].tolist() == [[0.5, 0.0]]
    with pytest.raises(NoUpdate):
        served(method, other, b"")


@each_vote
def test_vote_of_two_clients_and_of_one_alone(vote: str) -> None:
    """The clients of SignSGD's round: signs add up to 0, 0, -2; the mean is half of it."""
    method = SignVote(vote=vote, step=0.5).bind(line_task())
    uploads = [uploaded(method, shard, Rng(k), ZERO) for k, shard in enumerate((ONE, THREE))]
    assert [bytes(upload[-5:-4]) for upload in uploads] == [b"\x01", b"\x02"]
    assert served(method, *uploads, model=ZERO)["weight"].flatten().tolist() == [0, 0, -0.5]
    assert served(method, uploads[0], model=ZERO)["weight"].flatten().tolist() == [0.5, -0.5, -0.5]


@each_vote
def test_biases_and_batchnorm_are_averaged_by_samples(vote: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 1))
    method = SignVote(vote=vote, step=0.5).bind(make_task(network, Plan(epochs=1, batch=4, lr=0.3)))
    model, others = method.task.initial(), [*method.task.others]
    uploads = []
    for samples, first in ((1, 0), (3, 4)):
        full = np.arange(first, first + len(others), dtype="<f4").tobytes()
        uploads.append(container.pack("signvote.up", method.fingerprint(), samples, [b"\x01", full]))
    found = served(method, *uploads)
    assert found.keys() == model.keys()
    assert [float(found[name]) for name in others] == pytest.approx([i + 3 for i in range(len(others))])
    assert float(found["0.weight"]) == pytest.approx(float(model["0.weight"]) + 0.5)
    assert float(found["3.weight"]) == pytest.approx(float(model["3.weight"]) - 0.5)


def test_signs_of_a_vote_are_those_of_signsgd() -> None:
    """The same local training: the two uploads differ in the scales alone."""
    task = make_task(linear(5, True), Plan(epochs=1, batch=4, lr=0.3))
    shard = noise(45).view(9, 5), torch.arange(9) % 2
    vote, scales = (uploaded(codec.bind(task), shard, Rng(2))[:-4] for codec in (SignVote(), SignSGD()))
    assert vote[-23:-20] == scales[-31:-28] and vote[-20:] == scales[-20:], "3 bytes of signs, 8 of scales, 5 biases"


@each_vote
def test_every_weight_moves_by_the_step_at_most(tiny: MakeSpec, tmp_path: Path, vote: str) -> None:
    spec = tiny(method="signvote", hyper={"vote": vote, "step": 0.01}, cohort=5, rounds=6, evaluate_every=1)
    found = record.stable(rounds.run(spec, InProcess(CPU), root=tmp_path))
    assert found["final"]["accuracy"] > 0.7
    assert found["final"]["paper_bits"] == 6 * 5 * 4736
    assert record.stable(rounds.run(spec, Graphed(CPU), root=tmp_path)) == found
    method, task = (job := build.job(spec, CPU)).method, job.task
    after = served(method, *(uploaded(method, task.shard(k), Rng(k)) for k in range(5)))
    moves = (flat(after, task) - flat(task.initial(), task)).mul(100 * 5).round().unique()
    assert moves.tolist() == ([-5, 5] if vote == "majority" else [-5, -3, -1, 1, 3, 5])


@pytest.mark.parametrize(
    "values", [*({"vote": v} for v in ("median", None, 1)), *({"step": v} for v in (0, -1, 1e4, math.nan, "x", True))]
)
def test_bad_settings_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"hyper.{next(iter(values))}: "):
        registry.make("signvote", values)


def test_a_vote_has_no_error_feedback(tiny: MakeSpec) -> None:
    with pytest.raises(SpecError, match=r"feedback: True .* signvote"):
        tiny(method="signvote", feedback=True)
