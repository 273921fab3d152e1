"""FedPM's local training: properties 3 and 4 of the specification's section 9, by number, and one round in plain torch.

The oracles are numbers worked by hand, finite differences, and the closed forms of sections 4 and 5.
"""

import math
from typing import Any

import pytest
import torch
from fedpm_toys import SMALL, begun, images, make_task, mask_in, small, small_task, train, uniform
from torch import Tensor, nn
from torch.nn import functional

from fedlib.core import optimizers
from fedlib.core.method import Local
from fedlib.core.plan import Samples
from fedlib.errors import PayloadError
from fedlib.methods.fedsparse.masks import layers, pack_mask
from fedlib.methods.fedsparse.method import FedPM
from fedlib.rng import Rng
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")
each_penalty = pytest.mark.parametrize("penalty", ["mean_prob", "pooled_entropy", "mean_entropy"])
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
    local, drawn = begun(method, scores), uniform(6, seed=draw)
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
def test_03_gradient_by_finite_differences(ste: str) -> None:
    """dL/dm by central differences of the loss at the sampled mask, in float64; then the estimator's formula."""
    method, batch = small(lam=0.0, ste=ste, weight_scale="fedpm"), images()
    local, drawn = begun(method), uniform(271, seed=4)
    found = gradient(method, local, batch, drawn)
    theta = torch.sigmoid(local.trainable["s"].detach())
    mask, w = (drawn < theta).double(), local.frozen["w"].double()
    assert 100 < int(mask.sum()) < 171

    def loss(m: Tensor) -> float:
        return float(method.task.loss(layers(w * m, method.shapes), (batch[0].double(), batch[1])))

    slopes = []
    for entry in range(271):
        step = torch.zeros(271, dtype=torch.float64)
        step[entry] = 1e-6
        slopes.append((loss(mask + step) - loss(mask - step)) / 2e-6)
    expected = torch.tensor(slopes) * theta * (1 - theta) * (theta if ste == "prob" else 1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-6)
    assert float(found.abs().max()) > 0.01


@each_ste
@pytest.mark.parametrize("masking", ["bernoulli", "threshold", "top"])
def test_03_forward_uses_the_hard_mask_alone(ste: str, masking: str) -> None:
    method = small(lam=0.0, ste=ste, masking=masking, keep=0.25)
    local, drawn = begun(method), uniform(271) if masking == "bernoulli" else uniform(1)
    mask = method.mask(torch.sigmoid(local.trainable["s"].detach()), drawn)
    assert set(mask.tolist()) == {0.0, 1.0}
    found = method.loss(local.trainable, local.frozen, images(), drawn)
    assert torch.equal(found, method.task.loss(layers(local.frozen["w"] * mask, method.shapes), images()))


# Penalties


@each_penalty
def test_04_penalty_gradient_in_closed_form(penalty: str) -> None:
    """lam / n times theta (1 - theta) times 1, log2((1 - p) / p) with p the mean, or -s / ln 2 (section 5.3)."""
    method = small(lam=40.0, penalty=penalty)
    local, drawn = begun(method), uniform(271)
    with_penalty = gradient(method, local, images(), drawn)
    without = gradient(small(lam=0.0), local, images(), drawn)
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


@each_penalty
def test_04_penalty_gradient_by_finite_differences(penalty: str) -> None:
    method, s = FedPM(penalty=penalty), torch.linspace(-4, 3, 15, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(method.regularizer(torch.sigmoid(s)), s)

    def value(entry: int, step: float) -> float:
        moved = s.detach().clone()
        moved[entry] += step
        return float(method.regularizer(torch.sigmoid(moved)))

    slopes = [(value(entry, 1e-5) - value(entry, -1e-5)) / 2e-5 for entry in range(15)]
    assert found.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("penalty", "at_half", "low"),
    [("mean_prob", 0.5, 0.25), ("pooled_entropy", 1.0, 0.8112781), ("mean_entropy", 1.0, 0.0)],
)
def test_04_penalty_values(penalty: str, at_half: float, low: float) -> None:
    method = small(lam=3.0, penalty=penalty)
    assert float(method.regularizer(torch.full((9,), 0.5))) == pytest.approx(at_half)
    assert float(method.regularizer(torch.tensor([0.0, 0.0, 0.0, 1.0]))) == pytest.approx(low, abs=1e-6)
    local = begun(method, torch.zeros(271))
    with_penalty, without = (
        m.loss(local.trainable, local.frozen, images(), uniform(271)) for m in (method, small(lam=0.0))
    )
    assert float((with_penalty - without).detach()) == pytest.approx(3 * at_half, rel=1e-5)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("extreme", [17.0, 30.0, 110.0])
@each_penalty
def test_04_scores_far_out_have_a_finite_gradient(penalty: str, extreme: float, sign: int) -> None:
    """theta is exactly 1 in float32 from a score of about 17 on, and 0 from -104 on: 120 steps of Adam get there."""
    method, scores = small(penalty=penalty), torch.linspace(-2, 2, 271)
    scores[::5] = sign * extreme
    assert bool(torch.isfinite(gradient(method, begun(method, scores), images(), uniform(271))).all())


@pytest.mark.parametrize("extreme", [-110.0, 30.0])
@each_penalty
def test_04_a_mask_of_all_zeros_or_all_ones_has_a_finite_gradient(penalty: str, extreme: float) -> None:
    method = small(penalty=penalty)
    local = begun(method, torch.full((271,), extreme))
    assert bool(torch.isfinite(gradient(method, local, images(), uniform(271))).all())


@each_penalty
def test_04_lam_0_is_fedpm_bit_for_bit(penalty: str) -> None:
    """Whatever the penalty that is not used, scores and uploaded mask are those of FedPM; lam > 0 moves them."""
    shard, plain = images(17), small(lam=0.0)

    def client(method: FedPM) -> tuple[Tensor, bytes]:
        local = begun(method)
        train(method, local, shard, Rng(1))
        upload = method.upload(local, images(0), Rng(1))
        return local.trainable["s"].detach(), upload[-4 - sum(container.section_sizes(upload)) : -4]

    scores, sections = client(small(lam=0.0, penalty=penalty))
    plain_scores, plain_mask = plain_round(plain, begun(plain), shard, Rng(1), exact=True)
    assert torch.equal(scores, plain_scores)
    assert sections == b"".join(pack_mask(plain_mask.numpy(), None))
    assert not torch.equal(client(small(lam=1.0, penalty=penalty))[0], scores)


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


def plain_round(method: FedPM, local: Local, shard: Samples, place: Rng, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Section 4.5 in plain torch, with the small network spelt out: final scores and the uploaded mask [n].

    exact: take the steps of the optimizer from `fedlib.core.optimizers`, which agrees with torch's within rounding
    only.
    """
    plan, s, w = small_task().plan, local.trainable["s"].detach().clone().requires_grad_(), local.frozen["w"]
    order, draws = place.child("order").torch(), place.child("draws").torch()
    adam, moments = torch.optim.Adam([s], lr=plan.lr), optimizers.moments(plan, {"s": s})
    for _ in range(plan.epochs):
        for batch in torch.randperm(len(shard[0]), generator=order).split(plan.batch):
            theta = torch.sigmoid(s)
            mask = (torch.rand(len(w), generator=draws) < theta).float()
            through: Any = Through.apply(theta, mask, method.ste == "prob")
            effective = w * through
            kernel, bias = effective[SMALL["0.weight"]].view(4, 2, 3, 3), effective[SMALL["0.bias"]]
            hidden = functional.conv2d(shard[0][batch], kernel, bias).relu().flatten(1)
            logits = functional.linear(hidden, effective[SMALL["3.weight"]].view(3, 64), effective[SMALL["3.bias"]])
            loss = functional.cross_entropy(logits, shard[1][batch])
            if method.lam:
                loss = loss + method.lam * theta.sum() / len(w)
            (s.grad,) = torch.autograd.grad(loss, s)
            if exact:
                optimizers.step(plan, {"s": s}, [s.grad], moments)
            else:
                adam.step()
    fresh = torch.rand(len(w), generator=place.child("upload").torch())
    return s.detach(), fresh < torch.sigmoid(s.detach())


@each_ste
@pytest.mark.parametrize("lam", [0.0, 10.0])
def test_client_round_equals_the_pseudo_code(ste: str, lam: float) -> None:
    method, place = small(lam=lam, ste=ste, weight_scale="fedpm"), Rng(9).child("client", 4, 1)
    shard, local = images(23), begun(method)
    before = local.trainable["s"].detach().clone()
    expected, mask = plain_round(method, local, shard, place)
    train(method, local, shard, place)
    torch.testing.assert_close(local.trainable["s"].detach(), expected, rtol=1e-4, atol=1e-3)
    assert float((expected - before).abs().max()) > 0.5
    found = mask_in(method, method.upload(local, images(0), place), local.seed)
    assert int((found != mask).sum()) <= 1, "a draw on the edge"


# What cannot be sent


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("masking", ["bernoulli", "threshold", "top"])
def test_scores_that_are_not_finite_are_not_sent(value: float, masking: str) -> None:
    method = small(masking=masking)
    local = begun(method)
    local.trainable["s"].detach()[1] = value
    with pytest.raises(PayloadError, match="not finite: local training diverged"):
        method.upload(local, images(0), Rng(0))


def test_diverged_training_is_not_sent() -> None:
    method, (x, y) = small(lam=0.0), images()
    x[3, 0, 0, 0] = math.nan
    local = begun(method)
    train(method, local, (x, y), Rng(0))
    with pytest.raises(PayloadError, match="diverged"):
        method.upload(local, images(0), Rng(0))
