"""FedPM's local training, one round in plain torch, and whole runs on digits: properties 3, 4, 11 and 14 of the
specification's section 9, by number.

The oracles are numbers worked by hand and the closed forms of sections 4 and 5.
"""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fedsparse_toys import SMALL, begin, make_task, mask_in, small, small_task, uniform
from jobs import MakeSpec, ran
from small_task import NONE, images, train
from torch import Tensor, nn
from torch.nn import functional

from fedlib.core import optimizers
from fedlib.core.method import Local, ServerState
from fedlib.core.plan import Samples
from fedlib.errors import PayloadError
from fedlib.methods.fedsparse.masks import layers
from fedlib.methods.fedsparse.method import FedPM, Own
from fedlib.rng import Rng
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
PENALTIES = ["mean_prob", "pooled_entropy", "mean_entropy"]
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_ste = pytest.mark.parametrize("ste", ["identity", "prob"])


def gradient(method: FedPM, local: Local, batch: Samples, drawn: Tensor) -> Tensor:
    loss = method.loss(local.trainable, local.frozen, batch, drawn)
    return torch.autograd.grad(loss, local.trainable["s"])[0]


# Straight-through gradients


@each_ste
@pytest.mark.parametrize("draw", range(6))
def test_03_gradient_worked_by_hand(ste: str, draw: int) -> None:
    """Logits a_j = m_j w_j x + m'_j b_j; dL/da = softmax(a) - onehot; a score gets that, times input, w, and slope."""
    method = FedPM(lam=0.0, ste=ste, weight_scale="critical").bind(make_task(nn.Linear(1, 3)))
    scores = torch.tensor([-2.0, 0.0, 1.5, -0.5, 3.0, 0.7])
    local, drawn = begin(method, scores), uniform(6, seed=draw)
    found = gradient(method, local, (torch.tensor([[1.7]]), torch.tensor([2])), drawn).tolist()

    theta = [1 / (1 + math.exp(-s)) for s in scores.tolist()]
    m = [float(u < p) for u, p in zip(drawn.tolist(), theta, strict=True)]
    w = local.frozen["w"].tolist()
    assert {abs(v) for v in w} == {2.0}
    a = [m[j] * w[j] * 1.7 + m[3 + j] * w[3 + j] for j in range(3)]
    total = sum(math.exp(v) for v in a)
    slope = [math.exp(v) / total - (j == 2) for j, v in enumerate(a)]
    expected = []
    for i in range(6):
        own = slope[i % 3] * (1.7 if i < 3 else 1.0) * w[i] * theta[i] * (1 - theta[i])
        expected.append(own * theta[i] if ste == "prob" else own)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@each_ste
@pytest.mark.parametrize("masking", ["bernoulli", "threshold", "top"])
def test_03_forward_uses_the_hard_mask_alone(ste: str, masking: str) -> None:
    method = small(lam=0.0, ste=ste, masking=masking, keep=0.25)
    local, drawn = begin(method), uniform(271) if masking == "bernoulli" else uniform(1)
    mask = method.mask(torch.sigmoid(local.trainable["s"].detach()), drawn)
    assert set(mask.tolist()) == {0.0, 1.0}
    found = method.loss(local.trainable, local.frozen, images(10), drawn)
    assert torch.equal(found, method.task.loss(layers(local.frozen["w"] * mask, method.shapes), images(10)))


# Penalties


@each_penalty
def test_04_penalty_gradient_in_closed_form(penalty: str) -> None:
    """lam / n times theta (1 - theta) times 1, log2((1 - p) / p) with p the mean, or -s / ln 2 (section 5.3)."""
    method = small(lam=40.0, penalty=penalty)
    local, drawn = begin(method), uniform(271)
    with_penalty = gradient(method, local, images(10), drawn)
    without = gradient(small(lam=0.0), local, images(10), drawn)
    s = local.trainable["s"].detach().double()
    theta = torch.sigmoid(s)
    p = float(theta.mean())
    factor = {
        "mean_prob": torch.ones_like(theta),
        "pooled_entropy": torch.full_like(theta, math.log2((1 - p) / p)),
        "mean_entropy": -s / math.log(2),
    }[penalty]
    expected = 40 / 271 * factor * theta * (1 - theta)
    torch.testing.assert_close((with_penalty - without).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("penalty", "at_half", "low"),
    [("mean_prob", 0.5, 0.25), ("pooled_entropy", 1.0, 0.8112781), ("mean_entropy", 1.0, 0.0)],
)
def test_04_penalty_values(penalty: str, at_half: float, low: float) -> None:
    method = small(lam=3.0, penalty=penalty)
    assert float(method.regularizer(torch.full((9,), 0.5))) == pytest.approx(at_half)
    assert float(method.regularizer(torch.tensor([0.0, 0.0, 0.0, 1.0]))) == pytest.approx(low, abs=1e-6)
    local = begin(method, torch.zeros(271))
    with_penalty, without = (
        m.loss(local.trainable, local.frozen, images(10), uniform(271)) for m in (method, small(lam=0.0))
    )
    assert float((with_penalty - without).detach()) == pytest.approx(3 * at_half, rel=1e-5)


@pytest.mark.parametrize("every", [5, 1])
@pytest.mark.parametrize("extreme", [-110.0, -30.0, -17.0, 17.0, 30.0, 110.0])
@each_penalty
def test_04_scores_far_out_have_a_finite_gradient(penalty: str, extreme: float, every: int) -> None:
    """theta is exactly 1 in float32 from a score of about 17 on, and 0 from -104 on: 120 steps of Adam get there."""
    method, scores = small(penalty=penalty), torch.linspace(-2, 2, 271)
    scores[::every] = extreme
    assert bool(torch.isfinite(gradient(method, begin(method, scores), images(10), uniform(271))).all())


# One round in plain torch


class Through(torch.autograd.Function):
    """Section 4.2: forward a sampled mask, backward the incoming gradient, times theta in the code's variant."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, mask: Tensor, prob: bool) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.prob = prob
        return mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (theta,) = ctx.saved_tensors
        return (gradients[0] * theta if ctx.prob else gradients[0]), None, None


def plain_round(method: FedPM, local: Local, shard: Samples, place: Rng) -> tuple[Tensor, Tensor]:
    """Section 4.5 in plain torch, with the small network spelt out: final scores and the send mask [n].

    The steps are those of `fedlib.core.optimizers`, which agrees with torch's within rounding only.
    """
    plan, s, w = small_task().plan, local.trainable["s"].detach().clone().requires_grad_(), local.frozen["w"]
    order, draws = place.child("order").stream(), place.child("draws").stream()
    moments = optimizers.moments(plan, {"s": s})
    for _ in range(plan.epochs):
        for batch in order.permutation(len(shard[0])).split(plan.batch):
            theta = torch.sigmoid(s)
            mask = (draws.uniform(len(w)) < theta).float()
            through: Any = Through.apply(theta, mask, method.ste == "prob")
            effective = w * through
            kernel, bias = effective[SMALL["0.weight"]].view(4, 2, 3, 3), effective[SMALL["0.bias"]]
            hidden = functional.conv2d(shard[0][batch], kernel, bias).relu().flatten(1)
            logits = functional.linear(hidden, effective[SMALL["3.weight"]].view(3, 64), effective[SMALL["3.bias"]])
            loss = functional.cross_entropy(logits, shard[1][batch])
            if method.lam:
                loss = loss + method.lam * theta.mean()
            optimizers.step(plan, {"s": s}, [*torch.autograd.grad(loss, s)], moments)
    fresh = place.child("upload").stream().uniform(len(w))
    return s.detach(), fresh < torch.sigmoid(s.detach())


@pytest.mark.parametrize(
    "settings",
    [
        *({"lam": 0.0, "penalty": name} for name in PENALTIES),  # of which none is used
        *({"lam": lam, "ste": "prob", "weight_scale": "fedpm"} for lam in (0.0, 10.0)),
        {"lam": 10.0},
    ],
    ids=str,
)
def test_client_round_equals_the_pseudo_code(settings: dict[str, Any]) -> None:
    """With lam = 0, which is FedPM, to the bit."""
    method, place = small(**settings), Rng(9).child("client", 4, 1)
    shard, local = images(23), begin(method)
    before = local.trainable["s"].detach().clone()
    expected, mask = plain_round(method, local, shard, place)
    train(method, local, shard, place)
    atol = 1e-3 if method.lam else 0
    torch.testing.assert_close(local.trainable["s"].detach(), expected, rtol=0, atol=atol)
    assert float((expected - before).abs().max()) > 0.5
    found = mask_in(method, method.upload(local, NONE, place), local.seed)
    assert int((found != mask).sum()) <= bool(method.lam), "a draw on the edge"


# What cannot be sent


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("masking", ["bernoulli", "threshold", "top"])
def test_scores_that_are_not_finite_are_not_sent(value: float, masking: str) -> None:
    method = small(masking=masking)
    local = begin(method)
    local.trainable["s"].detach()[1] = value
    with pytest.raises(PayloadError, match="not finite: local training diverged"):
        method.upload(local, NONE, Rng(0))


# Whole runs


def of_fedpm(tiny: MakeSpec, rounds: int = 3, **hyper: Any) -> Spec:
    """Adam with two local epochs on the small perceptron, n = 4,736."""
    return tiny(method="fedpm", hyper=hyper, optimizer="adam", epochs=2, rounds=rounds, evaluate_every=1)


@pytest.mark.parametrize("own", [Own(2**64 - 3), Own(2**63, rounds=3, masks=12, kept=torch.ones(4736))])
def test_11_a_checkpoint_keeps_the_posterior(tiny: MakeSpec, tmp_path: Path, own: Own) -> None:
    checkpoint, theta = Checkpoint(of_fedpm(tiny), tmp_path), uniform(4736)
    checkpoint.save(ServerState({"theta": theta}, own), {}, {"rounds": []})
    loaded = checkpoint.load(FedPM())
    assert loaded and torch.equal(loaded[0].model["theta"], theta)
    found = loaded[0].own
    assert (found.seed, found.rounds, found.masks) == (own.seed, own.rounds, own.masks)
    assert torch.equal(found.kept, own.kept) if own.kept is not None else found.kept is None


@pytest.mark.parametrize(
    "other", [{"evaluate_every": 3}, *({"hyper": {"evaluated": how}} for how in ("mean", "threshold"))], ids=str
)
def test_14_evaluation_does_not_change_training(tiny: MakeSpec, tmp_path: Path, other: dict[str, Any]) -> None:
    found, different = (ran(Spec.from_dict(of_fedpm(tiny).as_dict() | more), tmp_path) for more in ({}, other))
    for a, b in zip(found["rounds"], different["rounds"], strict=True):
        assert all(a[name] == b[name] for name in ("notes", "uplink_bytes", "paper_bits", "clients"))
        assert a["loss"] != b["loss"] or a["round"] == 3
    same = found["final"]["loss"] == different["final"]["loss"]
    assert same == ("evaluate_every" in other), "each round's masks are named after the round"


def test_a_round_learns(tiny: MakeSpec, tmp_path: Path) -> None:
    """Ten rounds on digits with the code's scale: far from chance, and in few bits with the penalty."""
    found = {lam: ran(of_fedpm(tiny, rounds=10, lam=lam, weight_scale="fedpm"), tmp_path) for lam in (0.0, 30.0)}
    assert all(run["final"]["accuracy"] > 0.6 for run in found.values())
    dense, sparse = (found[lam]["rounds"][-1] for lam in (0.0, 30.0))
    assert dense["paper_bits"] > 0.99 * 4 * 4736 > 0.9 * 4 * 4736 > sparse["paper_bits"]
    assert sparse["uplink_bytes"] < dense["uplink_bytes"]
    assert all(sparse["notes"]["density"][name] < value for name, value in dense["notes"]["density"].items())


@pytest.mark.parametrize("masking", ["threshold", "top"])
def test_masks_without_chance_are_learned(tiny: MakeSpec, tmp_path: Path, masking: str) -> None:
    run = ran(of_fedpm(tiny, rounds=6, lam=0.0, masking=masking, weight_scale="fedpm"), tmp_path)
    assert run["final"]["accuracy"] > 0.5


def test_coding_does_not_change_what_is_learned(tiny: MakeSpec, tmp_path: Path) -> None:
    found = {
        coding: ran(of_fedpm(tiny, rounds=6, lam=30.0, weight_scale="fedpm", coding=coding), tmp_path)
        for coding in ("pooled", "layers", "global")
    }
    pooled = found["pooled"]
    for run in found.values():
        for entry, plain in zip(run["rounds"], pooled["rounds"], strict=True):
            assert entry["refused"] == []
            assert all(entry[name] == plain[name] for name in ("accuracy", "loss", "notes", "paper_bits"))
            assert entry["uplink_bytes"] <= plain["uplink_bytes"], "contexts are used where they pay alone"
    assert found["layers"]["rounds"][-1]["uplink_bytes"] < pooled["rounds"][-1]["uplink_bytes"]
    assert found["global"]["rounds"][-1]["uplink_bytes"] < 0.9 * pooled["rounds"][-1]["uplink_bytes"]


@pytest.mark.parametrize("more", [{}, {"aggregation": "bayes", "reset_period": 3, "prior": 2.0}], ids=["mean", "bayes"])
def test_downlink_by_levels_does_not_change_what_is_learned(
    tiny: MakeSpec, tmp_path: Path, more: dict[str, Any]
) -> None:
    full, levels = (
        ran(of_fedpm(tiny, rounds=4, downlink=downlink, **more), tmp_path) for downlink in ("full", "levels")
    )
    for one, other in zip(full["rounds"], levels["rounds"], strict=True):
        assert all(one[name] == other[name] for name in ("accuracy", "loss", "notes", "uplink_bytes", "refused"))
    assert levels["rounds"][0]["downlink_bytes"] == full["rounds"][0]["downlink_bytes"], "all values differ at first"
    # Four masks of 143 or 144 samples have at most 16 weighted means; masks counted alike, k of 4, 8 or 12.
    most = 26 if more else 16
    for entry in levels["rounds"][1:]:
        assert entry["downlink_bytes"] <= 4 * (4736 * math.log2(most) / 8 + 6 * most + 100)


def test_a_collapse_shows_in_the_record_and_in_the_log(
    tiny: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A penalty that outweighs the data by far, from scores that fall by half a unit a step."""
    spec = of_fedpm(tiny, rounds=2, lam=1e6)
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = ran(Spec.from_dict(spec.as_dict() | {"lr": 1.0, "epochs": 4}), tmp_path)
    assert found["rounds"][-1]["notes"]["collapsed"] == ["1.weight", "3.weight"]
    assert any("collapsed" in line.getMessage() for line in caplog.records)
    assert found["rounds"][-1]["uplink_bytes"] < 4 * 200
