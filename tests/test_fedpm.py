"""FedPM and its regularized form: the properties of the specification's section 9, by number (13, the table of
section 10, is in test_fedpm_digits.py), and one client round in plain torch.

The oracles are numbers worked by hand, finite differences, the closed forms of sections 4 and 5, and plain loops.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fedlib.core import client as client_side
from fedlib.core import optimizers
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, NoUpdate, Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, Memories, task_of
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.methods.fedsparse import method as fedsparse
from fedlib.methods.fedsparse.masks import (
    binary_entropy,
    bits_a_parameter,
    fixed_weights,
    layers,
    packed_mask,
    unpacked_mask,
)
from fedlib.methods.fedsparse.method import Hyper
from fedlib.rng import Rng
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
Shard = tuple[Tensor, Tensor]
PLAIN = Hyper(lam=0.0)
PENALTIES = ("mean_prob", "pooled_entropy", "mean_entropy")
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_ste = pytest.mark.parametrize("ste", ["identity", "prob"])


def make_task(network: nn.Module, plan: Plan | None = None) -> Task:
    return toys.make_task(network, plan or Plan(epochs=2, batch=4, lr=0.1, optimizer="adam"))


@functools.cache
def small() -> Task:
    """n = 72 + 4 + 192 + 3 = 271 parameters: a convolution with fan-in 18 and a linear layer with fan-in 64."""
    return make_task(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))


@functools.cache
def flat_task(*sizes: int) -> Task:
    """Matrices of the given lengths and nothing else."""
    return make_task(nn.ModuleList(nn.Linear(size, 1, bias=False) for size in sizes))


SMALL = {"0.weight": slice(0, 72), "0.bias": slice(72, 76), "3.weight": slice(76, 268), "3.bias": slice(268, 271)}


def images(count: int = 10, seed: int = 0) -> Shard:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def state_of(theta: Tensor, hyper: Hyper = PLAIN, seed: int = 7) -> State:
    state = {"theta": theta, "seed": torch.tensor([seed])}
    if hyper.aggregation == "bayes":
        state |= {"kept": torch.zeros(len(theta)), "dropped": torch.zeros(len(theta)), "rounds": torch.zeros(1)}
    return state


SEED: State = {"seed": torch.tensor([7])}


def upload_of(
    mask: Tensor, samples: int, hyper: Hyper, task: Task, theta: Tensor | None = None, seed: State = SEED
) -> bytes:
    known = None if theta is None else fedsparse.contexts(theta, hyper, task)
    sections = packed_mask(mask.numpy(), known)
    return container.pack("fedpm.up", fedsparse.fingerprint(seed, hyper, task), samples, sections)


def masks(count: int, n: int, density: float = 0.4, seed: int = 0) -> list[Tensor]:
    return [row < density for row in uniform(count, n, seed=seed)]


def bernoulli(theta: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(theta.shape, generator=generator) < theta


def server(state: State, hyper: Hyper, task: Task, *uploads: Buffer) -> State:
    return fedsparse.server(state, Uploads(enumerate(uploads)), hyper, task)


def begun(hyper: Hyper, task: Task, scores: Tensor | None = None) -> tuple[State, State]:
    """Trainable and frozen tensors of a client, at the given scores."""
    message = fedsparse.broadcast(fedsparse.initial(hyper, task, Rng(3)), hyper, task)
    trainable, frozen = fedsparse.start(message, hyper, task, Rng(0))
    if scores is not None:
        trainable["s"].detach().copy_(scores)
    return trainable, frozen


def gradient(trainable: State, frozen: State, batch: Shard, drawn: Tensor, hyper: Hyper, task: Task) -> Tensor:
    return torch.autograd.grad(fedsparse.objective(trainable, frozen, batch, drawn, hyper, task), trainable["s"])[0]


# 1, 2: fixed weights


# The first eight signs of each tensor under seed 2^63 + 5.
KNOWN_SIGNS = {"0.weight": "+++++-++", "0.bias": "-++-", "3.weight": "++-+-+++", "3.bias": "---"}
KNOWN_WEIGHTS = "8841558bdbab3487"  # begin of the SHA-256 of all 271 in the scale of the code


def test_01_fixed_weights_are_known_from_the_seed_alone() -> None:
    task = small()
    w = fixed_weights(2**63 + 5, "fedpm", task)
    assert w.dtype == torch.float32 and w.shape == (271,)
    found = {name: "".join("+" if v > 0 else "-" for v in w[part][:8].tolist()) for name, part in SMALL.items()}
    assert found == KNOWN_SIGNS
    assert hashlib.sha256(w.numpy().astype("<f4").tobytes()).hexdigest()[:16] == KNOWN_WEIGHTS
    torch.manual_seed(1)
    again = make_task(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    assert torch.equal(fixed_weights(2**63 + 5, "fedpm", again), w), "not of the network's"


@pytest.mark.parametrize(("scale", "factor"), [("kaiming", math.sqrt(2)), ("fedpm", math.e), ("critical", 2.0)])
def test_01_weight_scales(scale: str, factor: float) -> None:
    """One constant a layer, c = factor / sqrt(fan_in); a bias has that of its layer."""
    w = fixed_weights(1, scale, small())
    for name, part in SMALL.items():
        fan_in = 18 if name.startswith("0") else 64
        assert set(w[part].abs().tolist()) == {float(np.float32(factor / math.sqrt(fan_in)))}
    parts = layers(w, small())
    assert {name: tuple(tensor.shape) for name, tensor in parts.items()} == {
        "0.weight": (4, 2, 3, 3), "0.bias": (4,), "3.weight": (3, 64), "3.bias": (3,)
    }  # fmt: skip
    assert all(torch.equal(parts[name].flatten(), w[part]) for name, part in SMALL.items())


def test_01_signs_are_fair_coins_of_each_layer_and_seed() -> None:
    task = flat_task(4000, 4000, 4000)
    signs = torch.cat(
        [fixed_weights(seed, PLAIN.weight_scale, task).sign().view(3, 4000) for seed in (0, 1, 2**64 - 1)]
    )
    assert float(signs.mean(1).abs().max()) < 5 / 4000**0.5
    assert float((torch.corrcoef(signs) - torch.eye(9)).abs().max()) < 5 / 4000**0.5


def test_01_weights_stay_through_training_and_come_from_the_message_s_seed() -> None:
    task = small()
    for seed in (1, 2):
        state = fedsparse.initial(PLAIN, task, Rng(seed))
        for place in (Rng(0), Rng(5)):
            trainable, frozen = fedsparse.start(fedsparse.broadcast(state, PLAIN, task), PLAIN, task, place)
            before = trainable["s"].detach().clone()
            client_side.train(fedsparse, trainable, frozen, images(), PLAIN, task, place)
            assert torch.equal(frozen["w"], fixed_weights(fedsparse.seed_of(state), PLAIN.weight_scale, task))
            assert not torch.equal(trainable["s"], before)
    one, other = (fedsparse.seed_of(fedsparse.initial(PLAIN, task, Rng(seed))) for seed in (1, 2))
    assert 0 <= one < 2**64 and one != other


def test_01_a_seed_above_two_to_the_63_survives_the_way() -> None:
    """Of 64 bits, the highest is not a sign."""
    seeds = {fedsparse.seed_of(fedsparse.initial(PLAIN, small(), Rng(number))) for number in range(8)}
    assert any(seed >= 2**63 for seed in seeds) and any(seed < 2**63 for seed in seeds)
    for number in range(8):
        state = fedsparse.initial(PLAIN, small(), Rng(number))
        read, _ = fedsparse.read_broadcast(fedsparse.broadcast(state, PLAIN, small()), 271, PLAIN, small())
        assert read == fedsparse.seed_of(state)


def test_02_only_scores_are_trained() -> None:
    task = small()
    trainable, frozen = begun(PLAIN, task)
    assert trainable.keys() == {"s"} and trainable["s"].requires_grad and trainable["s"].is_leaf
    assert frozen.keys() == {"w", "theta", "seed"} and not any(tensor.requires_grad for tensor in frozen.values())
    assert optimizers.moments(task.plan, trainable).keys() == {"first s", "second s", "steps"}
    fedsparse.objective(trainable, frozen, images(), uniform(271), PLAIN, task).backward()
    assert frozen["w"].grad is None and trainable["s"].grad is not None
    assert all(p.grad is None for p in task.network.parameters()), "the network's own weights have no part in it"


def test_02_clients_start_from_the_logit_of_theta() -> None:
    """theta is clamped to [delta, 1 - delta] for the scores alone."""
    task, theta = flat_task(5), torch.tensor([0.0, 0.01, 0.5, 0.75, 1.0])
    for delta, edge in ((1e-3, math.log(999)), (0.01, math.log(99)), (0.25, math.log(3))):
        hyper = Hyper(delta=delta)
        trainable, frozen = fedsparse.start(fedsparse.broadcast(state_of(theta), hyper, task), hyper, task, Rng(0))
        expected = [-edge, max(-edge, math.log(0.01 / 0.99)), 0.0, min(edge, math.log(3)), edge]
        assert trainable["s"].tolist() == pytest.approx(expected, abs=1e-4)
        assert torch.equal(frozen["theta"], theta)


@pytest.mark.parametrize("delta", [1e-9, 1e-8, 1e-7, 1e-6])
def test_02_every_allowed_delta_gives_finite_scores(delta: float) -> None:
    task, hyper = flat_task(3), Hyper(delta=delta)
    message = fedsparse.broadcast(state_of(torch.tensor([0.0, 0.5, 1.0])), hyper, task)
    s = fedsparse.start(message, hyper, task, Rng(0))[0]["s"]
    assert bool(torch.isfinite(s).all()), s


def test_initial_probabilities_are_those_of_standard_normal_scores() -> None:
    """Section 4.3: theta has mean 0.5, theta (1 - theta) 0.2066, the entropy of an entry 0.865 bits."""
    theta = fedsparse.initial(PLAIN, flat_task(200_000), Rng(0))["theta"].double()
    assert float(theta.mean()) == pytest.approx(0.5, abs=5 * 0.2083 / 200_000**0.5)
    assert float((theta * (1 - theta)).mean()) == pytest.approx(0.2066, abs=1e-3)
    assert float(binary_entropy(theta).mean()) == pytest.approx(0.865, abs=2e-3)


# 3: straight-through gradients


@each_ste
@pytest.mark.parametrize("draw", range(6))
def test_03_gradient_worked_by_hand(ste: str, draw: int) -> None:
    """Logits a_j = m_j w_j x + m'_j b_j; dL/da = softmax(a) - onehot; a score gets that, times input, w, and slope."""
    task, hyper = make_task(nn.Linear(1, 3)), Hyper(lam=0.0, ste=ste, weight_scale="critical")
    scores = torch.tensor([-2.0, 0.0, 1.5, -0.5, 3.0, 0.7])
    trainable, frozen = begun(hyper, task, scores)
    drawn = uniform(6, seed=draw)
    found = gradient(trainable, frozen, (torch.tensor([[1.7]]), torch.tensor([2])), drawn, hyper, task).tolist()

    theta = [1 / (1 + math.exp(-s)) for s in scores.tolist()]
    m = [float(u < p) for u, p in zip(drawn.tolist(), theta, strict=True)]
    w = frozen["w"].tolist()
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
    task, hyper, batch = small(), Hyper(lam=0.0, ste=ste, weight_scale="fedpm"), images()
    trainable, frozen = begun(hyper, task)
    drawn = uniform(271, seed=4)
    found = gradient(trainable, frozen, batch, drawn, hyper, task)
    theta = torch.sigmoid(trainable["s"].detach())
    mask, w = (drawn < theta).double(), frozen["w"].double()
    assert 100 < int(mask.sum()) < 171

    def loss(m: Tensor) -> float:
        return float(task.loss(layers(w * m, task), (batch[0].double(), batch[1])))

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
    task, hyper = small(), Hyper(lam=0.0, ste=ste, masking=masking, keep=0.25)
    trainable, frozen = begun(hyper, task)
    drawn = uniform(271) if masking == "bernoulli" else uniform(1)
    mask = fedsparse.chosen(torch.sigmoid(trainable["s"].detach()), drawn, hyper, task)
    assert set(mask.tolist()) == {0.0, 1.0}
    found = fedsparse.objective(trainable, frozen, images(), drawn, hyper, task)
    assert torch.equal(found, task.loss(layers(frozen["w"] * mask, task), images()))


# 4: penalties


@each_penalty
def test_04_penalty_gradient_in_closed_form(penalty: str) -> None:
    """lam / n times theta (1 - theta) times 1, log2((1 - p) / p) with p the mean, or -s / ln 2 (section 5.3)."""
    task, hyper = small(), Hyper(lam=40.0, penalty=penalty)
    trainable, frozen = begun(hyper, task)
    s, drawn = trainable["s"].detach(), uniform(271)
    with_penalty = gradient(trainable, frozen, images(), drawn, hyper, task)
    without = gradient(trainable, frozen, images(), drawn, dataclasses.replace(hyper, lam=0.0), task)
    theta = torch.sigmoid(s.double())
    p = float(theta.mean())
    factor = {
        "mean_prob": torch.ones_like(theta),
        "pooled_entropy": torch.full_like(theta, math.log2((1 - p) / p)),
        "mean_entropy": -s.double() / math.log(2),
    }[penalty]
    expected = 40 / 271 * factor * theta * (1 - theta)
    torch.testing.assert_close((with_penalty - without).double(), expected, rtol=1e-4, atol=1e-6)


@each_penalty
def test_04_penalty_gradient_by_finite_differences(penalty: str) -> None:
    hyper, s = Hyper(penalty=penalty), torch.linspace(-4, 3, 15, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(fedsparse.penalty(torch.sigmoid(s), hyper), s)

    def value(entry: int, step: float) -> float:
        moved = s.detach().clone()
        moved[entry] += step
        return float(fedsparse.penalty(torch.sigmoid(moved), hyper))

    slopes = [(value(entry, 1e-5) - value(entry, -1e-5)) / 2e-5 for entry in range(15)]
    assert found.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("penalty", "at_half"), [("mean_prob", 0.5), ("pooled_entropy", 1.0), ("mean_entropy", 1.0)])
def test_04_penalty_values(penalty: str, at_half: float) -> None:
    hyper = Hyper(lam=3.0, penalty=penalty)
    assert float(fedsparse.penalty(torch.full((9,), 0.5), hyper)) == pytest.approx(at_half)
    low = {"mean_prob": 0.25, "pooled_entropy": 0.8112781, "mean_entropy": 0.0}[penalty]
    assert float(fedsparse.penalty(torch.tensor([0.0, 0.0, 0.0, 1.0]), hyper)) == pytest.approx(low, abs=1e-6)
    task, drawn = small(), uniform(271)
    trainable, frozen = begun(hyper, task, torch.zeros(271))
    with_penalty = fedsparse.objective(trainable, frozen, images(), drawn, hyper, task)
    without = fedsparse.objective(trainable, frozen, images(), drawn, dataclasses.replace(hyper, lam=0.0), task)
    assert float((with_penalty - without).detach()) == pytest.approx(3 * at_half, rel=1e-5)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("extreme", [17.0, 30.0, 110.0])
@each_penalty
def test_04_scores_far_out_have_a_finite_gradient(penalty: str, extreme: float, sign: int) -> None:
    """theta is exactly 1 in float32 from a score of about 17 on, and 0 from -104 on: 120 steps of Adam get there."""
    task, hyper = small(), Hyper(lam=1.0, penalty=penalty)
    scores = torch.linspace(-2, 2, 271)
    scores[::5] = sign * extreme
    trainable, frozen = begun(hyper, task, scores)
    assert bool(torch.isfinite(gradient(trainable, frozen, images(), uniform(271), hyper, task)).all())


@pytest.mark.parametrize("extreme", [-110.0, 30.0])
@each_penalty
def test_04_a_mask_of_all_zeros_or_all_ones_has_a_finite_gradient(penalty: str, extreme: float) -> None:
    task, hyper = small(), Hyper(lam=1.0, penalty=penalty)
    trainable, frozen = begun(hyper, task, torch.full((271,), extreme))
    assert bool(torch.isfinite(gradient(trainable, frozen, images(), uniform(271), hyper, task)).all())


@each_penalty
def test_04_lam_0_is_fedpm_bit_for_bit(penalty: str) -> None:
    """Whatever the penalty that is not used, scores and uploaded mask are those of FedPM; lam > 0 moves them."""
    task, shard = small(), images(17)

    def client(hyper: Hyper) -> tuple[Tensor, bytes]:
        trainable, frozen = begun(hyper, task)
        client_side.train(fedsparse, trainable, frozen, shard, hyper, task, Rng(1))
        upload = fedsparse.finish(trainable, frozen, 17, hyper, task, Rng(1))
        sizes = container.section_sizes(upload)
        return trainable["s"].detach(), upload[-4 - sum(sizes) : -4]

    scores, sections = client(Hyper(lam=0.0, penalty=penalty))
    plain_scores, plain_mask = plain_round(begun(PLAIN, task), shard, PLAIN, task, Rng(1), exact=True)
    assert torch.equal(scores, plain_scores)
    assert sections == b"".join(bytes(part) for part in packed_mask(plain_mask.numpy(), None))
    assert not torch.equal(client(Hyper(lam=1.0, penalty=penalty))[0], scores)


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


def plain_round(
    start: tuple[State, State], shard: Shard, hyper: Hyper, task: Task, place: Rng, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Section 4.5 in plain torch, with the network of `small` spelt out: final scores and the uploaded mask [n].

    exact: take the steps of the optimizer from `fedlib.core.optimizers`, which agrees with torch's within rounding
    only.
    """
    s, w = start[0]["s"].detach().clone().requires_grad_(), start[1]["w"]
    order, draws = place.child("order").torch(), place.child("draws").torch()
    adam, moments = torch.optim.Adam([s], lr=task.plan.lr), optimizers.moments(task.plan, {"s": s})
    for _ in range(task.plan.epochs):
        for batch in torch.randperm(len(shard[0]), generator=order).split(task.plan.batch):
            theta = torch.sigmoid(s)
            mask = (torch.rand(len(w), generator=draws) < theta).float()
            through: Any = Through.apply(theta, mask, hyper.ste == "prob")
            effective = w * through
            kernel, bias = effective[SMALL["0.weight"]].view(4, 2, 3, 3), effective[SMALL["0.bias"]]
            hidden = functional.conv2d(shard[0][batch], kernel, bias).relu().flatten(1)
            logits = functional.linear(hidden, effective[SMALL["3.weight"]].view(3, 64), effective[SMALL["3.bias"]])
            loss = functional.cross_entropy(logits, shard[1][batch])
            if hyper.lam:
                loss = loss + hyper.lam * theta.sum() / len(w)
            (s.grad,) = torch.autograd.grad(loss, s)
            if exact:
                optimizers.step(task.plan, {"s": s}, [s.grad], moments)
            else:
                adam.step()
    fresh = torch.rand(len(w), generator=place.child("upload").torch())
    return s.detach(), fresh < torch.sigmoid(s.detach())


@each_ste
@pytest.mark.parametrize("lam", [0.0, 10.0])
def test_client_round_equals_the_pseudo_code(ste: str, lam: float) -> None:
    task, hyper, place = small(), Hyper(lam=lam, ste=ste, weight_scale="fedpm"), Rng(9).child("client", 4, 1)
    shard = images(23)
    expected, mask = plain_round(begun(hyper, task), shard, hyper, task, place)
    trainable, frozen = begun(hyper, task)
    before = trainable["s"].detach().clone()
    client_side.train(fedsparse, trainable, frozen, shard, hyper, task, place)
    torch.testing.assert_close(trainable["s"].detach(), expected, rtol=1e-4, atol=1e-3)
    assert float((expected - before).abs().max()) > 0.5
    upload = fedsparse.finish(trainable, frozen, 23, hyper, task, place)
    assert int((mask_in(upload, hyper, task, seed=frozen) != mask).sum()) <= 1, "a draw on the edge"


def mask_in(upload: Buffer, hyper: Hyper, task: Task, theta: Tensor | None = None, seed: State | None = None) -> Tensor:
    """The mask of an upload, as the server reads it from a cohort of one."""
    n = sum(shape.numel() for shape in task.tensors.values())
    plain = dataclasses.replace(hyper, aggregation="mean")
    state = state_of(torch.full((n,), 0.5) if theta is None else theta)
    sections = container.unpack(
        upload, "fedpm.up", fedsparse.fingerprint(seed or SEED, hyper, task), [4, 10**6]
    ).sections
    again = container.pack("fedpm.up", fedsparse.fingerprint(SEED, plain, task), 1, sections)
    return server(state, plain, task, again)["theta"] > 0.5


# 5: sampling


def test_05_sampled_masks_have_the_means_theta() -> None:
    theta, draws = torch.tensor([0.0, 1e-3, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0]), 100_000
    task = flat_task(8 * draws)
    found = fedsparse.drawn(theta.repeat(draws), PLAIN, task, torch.Generator().manual_seed(0)).view(draws, 8)
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    error = (found.double().mean(0) - theta).abs()
    assert bool((error <= 5 * (theta * (1 - theta) / draws).sqrt() + 1e-7).all())
    assert found[:, 0].sum() == 0 and found[:, 7].sum() == draws


def test_05_uploaded_and_trained_masks_have_the_means_theta() -> None:
    """A hundred thousand draws of each of five scores: at the end of the round, and in a forward pass."""
    task, scores = flat_task(100_000), torch.tensor([-6.0, -1.0, 0.0, 2.0, 5.0]).repeat(20_000)
    theta = torch.sigmoid(scores[:5].double())
    uploaded, trained = torch.zeros(5), torch.zeros(5)
    for number in range(5):
        trainable, frozen = {"s": scores}, {"theta": torch.full((100_000,), 0.5)} | SEED
        upload = fedsparse.finish(trainable, frozen, 1, PLAIN, task, Rng(number))
        uploaded += mask_in(upload, PLAIN, task).view(-1, 5).sum(0)
        drawn = fedsparse.draws(0.5, PLAIN, task, torch.Generator().manual_seed(number))
        trained += fedsparse.chosen(torch.sigmoid(scores), drawn, PLAIN, task).view(-1, 5).sum(0)
    for found in (uploaded, trained):
        assert bool(((found / 1e5 - theta).abs() <= 5 * (theta * (1 - theta) / 1e5).sqrt()).all())
    assert not torch.equal(uploaded, trained)


def test_05_each_client_and_round_draws_its_own_mask() -> None:
    task = flat_task(4000)
    places = [Rng(seed).child("client", number, k) for seed in (0, 1) for number in (1, 2) for k in (0, 1)]
    found = [
        mask_in(
            fedsparse.finish({"s": torch.zeros(4000)}, {"theta": torch.zeros(4000)} | SEED, 1, PLAIN, task, place),
            PLAIN,
            task,
        )
        for place in places
    ]
    assert float((torch.corrcoef(torch.stack(found).float()) - torch.eye(8)).abs().max()) < 5 / 4000**0.5


# 6, 7: aggregation


def test_06_mean_by_hand() -> None:
    task = flat_task(4)
    rows = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    for hyper, expected in (
        (Hyper(weighting="clients"), [1, 1 / 3, 0, 1 / 3]),
        (Hyper(weighting="samples"), [1, 0.3, 0, 0.1]),  # of 10, 30 and 60 samples
    ):
        uploads = [upload_of(row, count, hyper, task) for row, count in zip(rows, (10, 30, 60), strict=True)]
        state = state_of(torch.full((4,), 0.5))
        found = server(state, hyper, task, *uploads)
        assert found["theta"].tolist() == pytest.approx(expected, abs=1e-7)
        assert found["theta"].dtype == torch.float32
        assert found["seed"].tolist() == [7] and torch.equal(state["theta"], torch.full((4,), 0.5))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_06_mean_is_the_weighted_mean_in_any_order(samples: list[int], random: Any) -> None:
    task, rows = flat_task(50), masks(len(samples), 50, seed=len(samples))
    for hyper in (Hyper(), Hyper(weighting="clients"), Hyper(aggregation="bayes", prior=2.0)):
        uploads = [upload_of(row, count, hyper, task) for row, count in zip(rows, samples, strict=True)]
        found = server(state_of(torch.zeros(50), hyper), hyper, task, *uploads)
        shuffled = random.sample(uploads, len(uploads))
        again = server(state_of(torch.zeros(50), hyper), hyper, task, *shuffled)
        assert all(torch.equal(again[name], found[name]) for name in found)
        if hyper.aggregation == "mean":
            weights = samples if hyper.weighting == "samples" else [1] * len(samples)
            expected = sum(k * row.double() for k, row in zip(weights, rows, strict=True)) / sum(weights)
            assert isinstance(expected, Tensor)
            torch.testing.assert_close(found["theta"], expected.float(), rtol=0, atol=1e-7)


def test_06_mean_is_unbiased() -> None:
    """Over 400 cohorts of five clients with thetas of their own: the mean of theta is the mean of theirs."""
    task, thetas = flat_task(500), uniform(5, 500, seed=8)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(500, dtype=torch.float64)
    for _ in range(400):
        uploads = [upload_of(bernoulli(theta, generator), 3, PLAIN, task) for theta in thetas]
        total += server(state_of(thetas[0]), PLAIN, task, *uploads)["theta"]
    error = ((thetas * (1 - thetas)).sum(0) / 25 / 400).sqrt()
    assert bool(((total / 400 - thetas.mean(0)).abs() <= 5 * error).all())


def bayes(**changes: Any) -> Hyper:
    return Hyper(aggregation="bayes", **changes)


@pytest.mark.parametrize("clients", [1, 3, 7, 10, 13, 49])
def test_07_with_prior_1_and_reset_1_the_mode_is_the_mean(clients: int) -> None:
    task, rows = flat_task(300), masks(clients, 300)
    plain = Hyper(weighting="clients")
    mean = server(state_of(torch.zeros(300)), plain, task, *(upload_of(row, 1, plain, task) for row in rows))
    state, hyper = state_of(torch.zeros(300), bayes()), bayes()
    for _ in range(2):
        state = server(state, hyper, task, *(upload_of(row, k + 1, hyper, task) for k, row in enumerate(rows)))
        torch.testing.assert_close(state["theta"], mean["theta"], rtol=1e-6, atol=0)


def test_07_without_reset_the_mode_is_the_mean_of_all_masks() -> None:
    task, hyper = flat_task(200), bayes(reset_period=1000)
    state, seen = state_of(torch.zeros(200), hyper), []
    for number, clients in enumerate((3, 1, 6, 2)):
        rows = masks(clients, 200, seed=number)
        seen += rows
        state = server(state, hyper, task, *(upload_of(row, 5, hyper, task) for row in rows))
        torch.testing.assert_close(state["theta"], torch.stack(seen).float().mean(0), rtol=1e-6, atol=0)


def test_07_counts_by_hand() -> None:
    """kept is alpha - prior, dropped is beta - prior: whole numbers, summed until the period is over."""
    task, hyper = flat_task(3), bayes(reset_period=2)
    state = state_of(torch.zeros(3), hyper)
    for rows, kept, dropped in (
        ([[1, 0, 0], [1, 1, 0], [1, 0, 0]], [3, 1, 0], [0, 2, 3]),
        ([[0, 0, 0], [1, 1, 0]], [4, 2, 0], [1, 3, 5]),
        ([[1, 0, 1]], [1, 0, 1], [0, 1, 0]),  # afresh
        ([[1, 1, 0]], [2, 1, 1], [0, 1, 1]),
    ):
        state = server(state, hyper, task, *(upload_of(torch.tensor(row).bool(), 9, hyper, task) for row in rows))
        assert state["kept"].tolist() == pytest.approx(kept, abs=1e-5)
        assert state["dropped"].tolist() == pytest.approx(dropped, abs=1e-5)
        expected = [a / (a + b) for a, b in zip(kept, dropped, strict=True)]
        assert state["theta"].tolist() == pytest.approx(expected, abs=1e-6)
    assert state["rounds"].tolist() == [4]


@pytest.mark.parametrize("clients", [3, 5, 7, 10, 11])
def test_07_counts_are_whole_numbers_and_the_mode_is_the_mean_to_the_bit(clients: int) -> None:
    """Otherwise equal counts part by a rounding, and a broadcast by levels grows."""
    task, rows = flat_task(300), masks(clients, 300)
    hyper, plain = bayes(), Hyper(weighting="clients")
    found = server(state_of(torch.zeros(300), hyper), hyper, task, *(upload_of(row, 1, hyper, task) for row in rows))
    kept = torch.stack(rows).float().sum(0)
    assert torch.equal(found["kept"], kept)
    assert torch.equal(found["dropped"], clients - kept)
    mean = server(state_of(torch.zeros(300)), plain, task, *(upload_of(row, 1, plain, task) for row in rows))
    assert torch.equal(found["theta"], mean["theta"])


@pytest.mark.parametrize("prior", [1.5, 3.0, 100.0])
def test_07_a_prior_above_1_shrinks_towards_a_half(prior: float) -> None:
    """Mode of Beta(prior + k, prior + K - k): with prior 3 and one of four masks (1 + 2) / (4 + 4) = 3/8."""
    task, rows = flat_task(4), torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0]]).bool()
    hyper = bayes(prior=prior)
    found = server(state_of(torch.zeros(4), hyper), hyper, task, *(upload_of(r, 1, hyper, task) for r in rows))["theta"]
    expected = [(k + prior - 1) / (4 + 2 * prior - 2) for k in (1, 0, 4, 2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert found[3] == 0.5 and 0.25 < found[0] < 0.5 and 0 < found[1] < found[0] and 0.5 < found[2] < 1
    if prior == 3.0:
        assert float(found[0]) == 0.375


def test_uploads_that_cannot_be_read_change_nothing() -> None:
    task = flat_task(40)
    good, bad = upload_of(masks(1, 40)[0], 5, PLAIN, task), b"nothing"
    for hyper in (PLAIN, bayes(reset_period=5)):
        good = upload_of(masks(1, 40)[0], 5, hyper, task)
        state = state_of(torch.zeros(40), hyper)
        uploads = Uploads(enumerate([bad, good, good[:-1], PayloadError("diverged")]))
        found = fedsparse.server(state, uploads, hyper, task)
        assert uploads.accepted == [1] and [k for k, _ in uploads.refused] == [0, 2, 3]
        assert all(torch.equal(found[k], v) for k, v in server(state, hyper, task, good).items())
        with pytest.raises(NoUpdate):
            server(state, hyper, task, bad)


# 8: estimation error


@pytest.mark.parametrize("clients", [1, 4, 10])
def test_08_estimation_error(clients: int) -> None:
    """E || mean of masks - mean of theta ||^2 is the sum of theta (1 - theta) / K^2, at most n / 4K (section 5.4)."""
    n, trials, task = 1000, 60, flat_task(1000)
    thetas = torch.sigmoid(torch.randn(clients, n, generator=torch.Generator().manual_seed(2)))
    generator, errors = torch.Generator().manual_seed(3), []
    for _ in range(trials):
        uploads = [upload_of(bernoulli(theta, generator), 2, PLAIN, task) for theta in thetas]
        found = server(state_of(thetas[0]), PLAIN, task, *uploads)["theta"]
        errors.append(float((found - thetas.mean(0)).double().square().sum()))
    expected = float((thetas * (1 - thetas)).sum()) / clients**2
    assert abs(np.mean(errors) - expected) <= 5 * np.std(errors, ddof=1) / trials**0.5
    assert 5 * np.std(errors, ddof=1) / trials**0.5 < 0.05 * expected, "fine enough to tell"
    assert expected <= n / (4 * clients) and max(errors) < 1.2 * n / (4 * clients)


# 9: the coder


def random_mask(n: int, density: float) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[np.random.default_rng(1).choice(n, round(n * density), replace=False)] = True
    return mask


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 1_000_000])
@pytest.mark.parametrize("density", [0, "1/n", 1e-4, 0.01, 0.3, 0.5, 1])
def test_09_masks_survive_the_coder_in_few_bits(n: int, density: float | str) -> None:
    """n H(k/n) + log2(n) / 2 + 128 bits, and what a range coder of 32 bits with counts of 24 bits loses by truncation:
    of a range between 2^32 and 2^64 half of 2^24, on average 1.3e-4 bits an entry."""
    share = 1 / max(1, n) if density == "1/n" else float(density)
    mask = random_mask(n, share)
    sections = packed_mask(mask, None)
    views = [memoryview(part) for part in sections]
    assert np.array_equal(unpacked_mask(views, n, None), mask)
    k = int(mask.sum())
    p = k / max(1, n)
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q)
    assert 8 * sum(map(len, sections)) <= n * entropy + 0.5 * math.log2(max(1, n)) + 128 + 1.5e-4 * n
    assert len(sections[0]) == 4 and int.from_bytes(sections[0], "little") == k


@pytest.mark.parametrize("value", [False, True])
def test_09_masks_of_one_value_cost_almost_nothing(value: bool) -> None:
    mask = np.full(100_000, value)
    sections = packed_mask(mask, None)
    assert sum(map(len, sections)) <= 12
    assert np.array_equal(unpacked_mask([memoryview(part) for part in sections], 100_000, None), mask)


def test_09_a_mask_whose_entries_the_receiver_foresees_costs_almost_nothing() -> None:
    """By layers: ones in one, none in the other. By the global theta: a mask of density 1/2 that equals it."""
    task = flat_task(4000, 4000)
    mask = torch.arange(8000) < 4000
    assert len(upload_of(mask, 1, Hyper(coding="layers"), task, torch.zeros(8000))) < 80
    assert len(upload_of(mask, 1, Hyper(coding="pooled"), task)) > 1000
    mask = masks(1, 8000, 0.5)[0]
    hyper = Hyper(coding="global")
    upload = upload_of(mask, 1, hyper, task, mask.float())
    assert len(upload) < 80
    assert torch.equal(server(state_of(mask.float()), hyper, task, upload)["theta"], mask.float())


def test_09_contexts() -> None:
    task = flat_task(2, 3)
    theta = torch.tensor([0.0, 1.0, 0.5, 0.1, 0.9])
    assert fedsparse.contexts(theta, Hyper(coding="pooled"), task) is None
    by_layer = fedsparse.contexts(theta, Hyper(coding="layers"), task)
    assert by_layer is not None and by_layer.tolist() == [0, 0, 1, 1, 1]
    dense = torch.linspace(0, 1, 10_001)
    known = fedsparse.contexts(dense, Hyper(coding="global"), flat_task(10_001))
    assert known is not None and known.min() >= 0 and known.max() < 2**16
    low = known[:5001]
    assert bool((np.diff(low) >= 0).all()) and len(set(low.tolist())) > 10, "finer and finer towards 0"
    assert set(low.tolist()).isdisjoint(known[5001:].tolist()), "what is likely to be 1 is apart from what is not"
    assert len(set(known[5001:].tolist())) > 10


# 10: definitions of the bits


def test_10_paper_bits() -> None:
    task = small()
    sizes = []
    for k in range(272):
        mask = torch.arange(271) < k
        sizes.append(fedsparse.paper_bits(upload_of(mask, 1, PLAIN, task), PLAIN, task))
    assert sizes[0] == sizes[271] == 0
    assert all(0 <= size <= 271 for size in sizes)
    assert sizes == pytest.approx(sizes[::-1], abs=1e-9)
    expected = [-k * math.log2(k / 271) - (271 - k) * math.log2(1 - k / 271) for k in range(1, 271)]
    assert sizes[1:271] == pytest.approx(expected, rel=1e-9)
    scattered = masks(1, 271)[0]
    upload = upload_of(scattered, 9, PLAIN, task)
    assert fedsparse.paper_bits(bytearray(upload), PLAIN, task) == pytest.approx(sizes[int(scattered.sum())])


@pytest.mark.parametrize(("density", "bits"), [(0.0, 0.0808), (0.01, 0.140), (0.1, 0.494), (0.5, 1.0), (1.0, 0.0808)])
def test_10_the_official_formula_never_falls_below_its_floor(density: float, bits: float) -> None:
    """Section 8, item 5: the masks hold 0.01 and 0.99; log2(n) bits come on top (5.1)."""
    n, hyper = 100_000, Hyper()
    task = flat_task(n)
    upload = upload_of(torch.from_numpy(random_mask(n, density)), 1, hyper, task)
    (found,) = fedsparse.other_bits(upload, hyper, task).values()
    assert (found - math.log2(n)) / n == pytest.approx(bits, abs=5e-4)
    assert found / n >= 0.0808 - 5e-5


# 11, 12, 14: whole runs


def finished(spec: Spec, root: Path, engine: Any = None) -> dict[str, Any]:
    return record.stable(rounds.run(spec, engine or InProcess(CPU), root=root))


def of_fedpm(tiny: MakeSpec, rounds: int = 3, **hyper: Any) -> Spec:
    """Adam with two local epochs on the small perceptron, n = 4,736."""
    return tiny(method="fedpm", hyper=hyper, optimizer="adam", epochs=2, rounds=rounds, evaluate_every=1)


@pytest.mark.parametrize("hyper", [{}, {"aggregation": "bayes", "reset_period": 2}, {"masking": "top"}], ids=str)
def test_11_the_seed_decides_the_history(tiny: MakeSpec, tmp_path: Path, hyper: dict[str, Any]) -> None:
    spec = of_fedpm(tiny, **hyper)
    torch.manual_seed(1)
    first = json.dumps(finished(spec, tmp_path))
    torch.manual_seed(2)
    assert json.dumps(finished(spec, tmp_path)) == first
    assert json.dumps(finished(spec, tmp_path, Graphed(CPU))) == first
    other = finished(Spec.from_dict(spec.as_dict() | {"seed": 1}), tmp_path)
    assert other["rounds"][0]["loss"] != json.loads(first)["rounds"][0]["loss"]


class Backwards(InProcess):
    """Trains and delivers the cohort from its end."""

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        return super().train(spec, message, round, cohort[::-1], memories)


def test_11_the_order_of_the_clients_does_not_matter(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = of_fedpm(tiny)
    forwards, backwards = finished(spec, tmp_path), finished(spec, tmp_path, Backwards(CPU))
    for one, other in zip(forwards["rounds"], backwards["rounds"], strict=True):
        assert one["clients"] == other["clients"][::-1] != other["clients"]
        assert one["other_bits"] == pytest.approx(other["other_bits"], rel=1e-12)
        assert one["paper_bits"] == pytest.approx(other["paper_bits"], rel=1e-12)
        for name in ("accuracy", "loss", "notes", "uplink_bytes", "downlink_bytes"):
            assert one[name] == other[name]


class Weighing(InProcess):
    """Notes every message beside the reference engine."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.up: list[list[bytes]] = []
        self.down: list[int] = []

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        replies = list(super().train(spec, message, round, cohort, memories))
        assert all(isinstance(upload, bytes) for _, upload in replies)
        self.up.append([bytes(upload) for _, upload in replies])  # type: ignore[arg-type]
        self.down.append(len(message) * len(cohort))
        return iter(replies)


def test_12_the_ledger_adds_up_what_was_passed(tiny: MakeSpec, tmp_path: Path) -> None:
    spec, scale = of_fedpm(tiny), Weighing()
    found = finished(spec, tmp_path, scale)
    task, hyper = task_of(spec.key(), CPU), Hyper()
    seed = registry.initial(spec, task)
    assert [entry["uplink_bytes"] for entry in found["rounds"]] == [sum(map(len, up)) for up in scale.up]
    assert [entry["downlink_bytes"] for entry in found["rounds"]] == scale.down
    assert all(4 * (8 + 4 * 4736) < size <= 4 * (8 + 4 * 4736 + 64) for size in scale.down), "32 n bits a client"
    parts = found["final"]["uplink_parts"]
    assert list(parts) == ["ones", "mask", "container"] and sum(parts.values()) == found["final"]["uplink_bytes"]
    assert parts["ones"] == 4 * 12 and 0 < parts["container"] <= 64 * 12
    for entry, uploads in zip(found["rounds"], scale.up, strict=True):
        kept = [int(mask_in(upload, hyper, task, seed=seed).sum()) for upload in uploads]
        own = [4736 * bits_a_parameter(k / 4736) for k in kept]
        assert entry["paper_bits"] == pytest.approx(sum(own))
        official = [4736 * bits_a_parameter(0.01 + 0.98 * k / 4736) + math.log2(4736) for k in kept]
        assert entry["other_bits"] == {"official code": pytest.approx(sum(official))}


def test_14_evaluation_does_not_change_training(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = of_fedpm(tiny, rounds=4)
    often = finished(spec, tmp_path)
    seldom = finished(Spec.from_dict(spec.as_dict() | {"evaluate_every": 4}), tmp_path)
    assert [entry["accuracy"] is None for entry in seldom["rounds"]] == [True, True, True, False]
    for one, other in zip(often["rounds"], seldom["rounds"], strict=True):
        assert all(one[name] == other[name] for name in ("notes", "uplink_bytes", "paper_bits", "clients"))
    assert often["final"]["loss"] == seldom["final"]["loss"], "and each round's masks are named after the round"


def test_14_the_way_of_evaluating_does_not_change_training(tiny: MakeSpec, tmp_path: Path) -> None:
    found = [finished(of_fedpm(tiny, evaluated=name), tmp_path) for name in ("sampled", "mean", "threshold")]
    for other in found[1:]:
        for one, two in zip(found[0]["rounds"], other["rounds"], strict=True):
            assert one["notes"] == two["notes"] and one["uplink_bytes"] == two["uplink_bytes"]
            assert one["loss"] != two["loss"]


def test_models_that_a_state_stands_for() -> None:
    """Unclamped theta: entries at 0 and 1 are certain. Five masks of their own; or the mean; or theta > 1/2."""
    task = small()
    theta = uniform(271, seed=5)
    theta[:40], theta[40:80], theta[80] = 0.0, 1.0, 0.5
    state = state_of(theta)
    w = fixed_weights(7, PLAIN.weight_scale, task)

    def flat(model: State) -> Tensor:
        assert {name: tensor.shape for name, tensor in model.items()} == task.tensors
        return torch.cat([model[name].flatten() for name in SMALL])

    found = [flat(model) / w for model in fedsparse.models(state, Hyper(), task, Rng(0))]
    assert len(found) == 5
    for mask in found:
        assert set(mask.abs().tolist()) == {0.0, 1.0}
        assert not mask[:40].any() and bool((mask[40:80] == 1).all())
    assert len({tuple(mask.tolist()) for mask in found}) == 5
    again = fedsparse.models(state, Hyper(), task, Rng(0))
    assert all(torch.equal(flat(model) / w, mask) for model, mask in zip(again, found, strict=True))
    (mean,) = fedsparse.models(state, Hyper(evaluated="mean"), task, Rng(0))
    assert torch.equal(flat(mean), w * theta)
    for hyper in (Hyper(evaluated="threshold"), Hyper(masking="threshold")):
        (model,) = fedsparse.models(state, hyper, task, Rng(0))
        assert torch.equal(flat(model), w * (theta > 0.5))
    theta = torch.linspace(0, 1, 271)
    (top,) = fedsparse.models(state_of(theta), Hyper(masking="top", keep=0.25), task, Rng(0))
    for name, count in (("0.weight", 18), ("0.bias", 1), ("3.weight", 48), ("3.bias", 1)):
        kept = top[name].flatten() != 0
        assert int(kept.sum()) == count and bool(kept[-count:].all()), "the largest are the last"


def test_a_round_learns(tiny: MakeSpec, tmp_path: Path) -> None:
    """Ten rounds on digits with the code's scale: far from chance, and in few bits with the penalty."""
    found = {lam: finished(of_fedpm(tiny, rounds=10, lam=lam, weight_scale="fedpm"), tmp_path) for lam in (0.0, 30.0)}
    assert all(run["final"]["accuracy"] > 0.6 for run in found.values())
    dense, sparse = (found[lam]["rounds"][-1] for lam in (0.0, 30.0))
    assert dense["paper_bits"] > 0.99 * 4 * 4736 > 0.9 * 4 * 4736 > sparse["paper_bits"]
    assert sparse["uplink_bytes"] < dense["uplink_bytes"]
    assert all(sparse["notes"]["density"][name] < value for name, value in dense["notes"]["density"].items())


# Coding and downlink


def test_coding_does_not_change_what_is_learned(tiny: MakeSpec, tmp_path: Path) -> None:
    found = {
        coding: finished(of_fedpm(tiny, rounds=6, lam=30.0, weight_scale="fedpm", coding=coding), tmp_path)
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
        finished(of_fedpm(tiny, rounds=4, downlink=downlink, **more), tmp_path) for downlink in ("full", "levels")
    )
    for one, other in zip(full["rounds"], levels["rounds"], strict=True):
        assert all(one[name] == other[name] for name in ("accuracy", "loss", "notes", "uplink_bytes", "refused"))
    assert levels["rounds"][0]["downlink_bytes"] == full["rounds"][0]["downlink_bytes"], "all values differ at first"
    # Four masks of 143 or 144 samples have at most 16 weighted means; masks counted alike, k of 4, 8 or 12.
    most = 26 if more else 16
    for entry in levels["rounds"][1:]:
        assert entry["downlink_bytes"] <= 4 * (4736 * math.log2(most) / 8 + 6 * most + 100)


@pytest.mark.parametrize(
    "theta",
    [
        torch.zeros(3000),
        torch.ones(3000),
        (uniform(3000) * 11).floor() / 10,
        uniform(3000),
        torch.cat([torch.zeros(2999), torch.tensor([1e-45])]),
        torch.tensor([0.0, -0.0, 1.0] * 1000),
    ],
    ids=["zeros", "ones", "eleven values", "all differ", "subnormal", "minus zero"],
)
def test_levels_are_theta_to_the_bit(theta: Tensor) -> None:
    task = flat_task(3000)
    for downlink in ("full", "levels"):
        hyper = Hyper(downlink=downlink)
        message = fedsparse.broadcast(state_of(theta), hyper, task)
        seed, found = fedsparse.read_broadcast(message, 3000, hyper, task)
        assert seed == 7 and torch.equal(found, theta)
        assert len(message) <= 8 + 12_000 + 64


def test_more_levels_than_the_coder_takes_travel_in_full() -> None:
    task, hyper = flat_task(70_000), Hyper(downlink="levels")
    for theta in (torch.linspace(0, 1, 70_000), torch.linspace(0, 1, 65_535).repeat(2)[:70_000]):
        _, found = fedsparse.read_broadcast(fedsparse.broadcast(state_of(theta), hyper, task), 70_000, hyper, task)
        assert torch.equal(found, theta)


# Masks without chance


def test_threshold_by_hand() -> None:
    task, hyper = flat_task(5), Hyper(masking="threshold")
    scores = torch.tensor([-1.0, 0.0, 1e-6, 30.0, -0.0])
    for place in (Rng(0), Rng(1)):
        upload = fedsparse.finish({"s": scores}, {"theta": torch.zeros(5)} | SEED, 1, hyper, task, place)
        assert mask_in(upload, hyper, task).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize(("keep", "kept"), [(0.5, [2, 3]), (0.2, [1, 1]), (1e-6, [1, 1]), (1.0, [4, 6])])
def test_top_by_hand(keep: float, kept: list[int]) -> None:
    """The largest of each layer, never fewer than one."""
    task, hyper = flat_task(4, 6), Hyper(masking="top", keep=keep)
    scores = torch.tensor([-5.0, -4.0, -6.0, -7.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0])
    for place in (Rng(0), Rng(1)):
        mask = mask_in(
            fedsparse.finish({"s": scores}, {"theta": torch.zeros(10)} | SEED, 1, hyper, task, place), hyper, task
        )
        falling = [1, 0, 2, 3], [5, 7, 9, 8, 6, 4]  # places of the scores, the largest first
        expected = {*falling[0][: kept[0]], *falling[1][: kept[1]]}
        assert set(mask.nonzero().flatten().tolist()) == expected


def test_top_keeps_its_share_where_scores_are_equal() -> None:
    """A mean of masks has many equal entries: none of them may bring in all others of its size."""
    task, hyper = flat_task(100, 50), Hyper(masking="top", keep=0.2)
    theta = torch.cat([(torch.arange(100) < 10).float(), torch.full((50,), 0.5)])
    (model,) = fedsparse.models(state_of(theta), hyper, task, Rng(0))
    assert [int((tensor != 0).sum()) for tensor in model.values()] == [20, 10]
    assert all(bool((tensor.flatten()[:10] != 0).all()) for tensor in list(model.values())[:1])
    for scores in (torch.zeros(150), torch.logit(theta.clamp(1e-3, 1 - 1e-3))):
        mask = fedsparse.chosen(torch.sigmoid(scores), uniform(1), hyper, task)
        assert [int(mask[:100].sum()), int(mask[100:].sum())] == [20, 10]


@pytest.mark.parametrize("masking", ["threshold", "top"])
def test_masks_without_chance_are_learned_and_agree_between_engines(
    tiny: MakeSpec, tmp_path: Path, masking: str
) -> None:
    spec = of_fedpm(tiny, rounds=6, lam=0.0, masking=masking, weight_scale="fedpm")
    found = finished(spec, tmp_path)
    assert found["final"]["accuracy"] > 0.5
    assert finished(spec, tmp_path, Graphed(CPU)) == found
    stacked = finished(spec, tmp_path, Stacked(CPU))
    assert stacked["rounds"][0]["uplink_bytes"] == pytest.approx(found["rounds"][0]["uplink_bytes"], rel=1e-2)
    assert stacked["rounds"][0]["loss"] == pytest.approx(found["rounds"][0]["loss"], rel=0.1)


# The stored model


def network_of(mask: Tensor, hyper: Hyper, task: Task, seed: int = 7) -> State:
    return layers(fixed_weights(seed, hyper.weight_scale, task) * mask, task)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_a_stored_model_is_a_seed_and_a_mask(density: float) -> None:
    task, hyper = small(), Hyper()
    theta = (uniform(271) < density).float()
    file = fedsparse.save_model(state_of(theta, seed=-3), hyper, task, Rng(0))
    ones, mask = packed_mask((theta > 0.5).numpy(), None)
    assert container.section_sizes(file) == (8, 4, len(mask)) and len(ones) == 4
    assert 0 < len(file) - 12 - len(mask) <= 64
    loaded, expected = fedsparse.load_model(file, hyper, task), network_of(theta, hyper, task, seed=2**64 - 3)
    x = images()[0]
    assert torch.equal(task.logits(loaded, x), task.logits(expected, x))
    assert list(loaded) == list(SMALL)


def test_a_stored_model_is_drawn_from_theta_unclamped() -> None:
    task, theta = flat_task(100_000), torch.cat([torch.zeros(40_000), torch.ones(40_000), torch.full((20_000,), 0.3)])
    files = [fedsparse.save_model(state_of(theta), PLAIN, task, Rng(number)) for number in (0, 0, 1)]
    assert files[0] == files[1] != files[2]
    kept = fedsparse.load_model(files[0], PLAIN, task)["0.weight"].flatten() != 0
    assert not kept[:40_000].any() and bool(kept[40_000:80_000].all())
    assert abs(int(kept[80_000:].sum()) - 6000) < 5 * 4200**0.5


@pytest.mark.parametrize(
    "hyper", [Hyper(masking="threshold"), Hyper(masking="top", keep=0.25)], ids=lambda h: h.masking
)
def test_a_model_of_masks_without_chance_is_stored_as_it_is_evaluated(hyper: Hyper) -> None:
    task, state = small(), state_of(torch.rand(271, generator=torch.Generator().manual_seed(1)))
    (expected,) = fedsparse.models(state, hyper, task, Rng(0))
    found = fedsparse.load_model(fedsparse.save_model(state, hyper, task, Rng(1)), hyper, task)
    assert all(torch.equal(found[name], expected[name]) for name in SMALL)


def test_a_stored_model_of_another_kind_is_refused() -> None:
    task, hyper = small(), Hyper()
    state = state_of(uniform(271))
    file = fedsparse.save_model(state, hyper, task, Rng(0))
    with pytest.raises(PayloadError, match="another model"):
        fedsparse.load_model(file, Hyper(lam=2.0), task)
    with pytest.raises(PayloadError, match="another model"):
        fedsparse.load_model(file, hyper, flat_task(271))
    for foreign in (fedsparse.broadcast(state, hyper, task), upload_of(masks(1, 271)[0], 1, hyper, task)):
        with pytest.raises(PayloadError, match="kind"):
            fedsparse.load_model(foreign, hyper, task)
    fingerprint = task.fingerprint("fedpm", hyper)
    ones, mask = packed_mask(masks(1, 271)[0].numpy(), None)
    for sections in (
        [bytes(8), ones],
        [bytes(8), bytes(4), mask],
        [bytes(8), ones, mask + b"x"],
        [bytes(8), ones, b""],
    ):
        with pytest.raises(PayloadError):
            fedsparse.load_model(container.pack("fedpm.model", fingerprint, 0, sections), hyper, task)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_stored_model_with_part_of_a_seed_is_refused(size: int) -> None:
    task, hyper = small(), Hyper()
    sections = [bytes(size), *packed_mask(masks(1, 271)[0].numpy(), None)]
    with pytest.raises(PayloadError, match="seed"):
        fedsparse.load_model(container.pack("fedpm.model", task.fingerprint("fedpm", hyper), 0, sections), hyper, task)


# Notes


def test_notes_name_the_density_and_collapsed_layers(caplog: pytest.LogCaptureFixture) -> None:
    task, theta = (
        flat_task(100, 200, 40),
        torch.cat([torch.full((100,), 0.25), torch.full((200,), 0.01), torch.ones(40)]),
    )
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = fedsparse.notes(state_of(theta), PLAIN, task)
    assert found["density"] == {"0.weight": 0.25, "1.weight": 0.01, "2.weight": 1.0}
    assert found["collapsed"] == ["1.weight"]
    (line,) = [r.getMessage() for r in caplog.records]
    assert "fewer than 10 weights" in line and "1.weight" in line and "0.weight" not in line
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = fedsparse.notes(state_of(torch.full((271,), 0.5)), PLAIN, small())
    assert found["density"] == {"0.weight": 0.5, "3.weight": 0.5}, "biases aside"
    assert "collapsed" not in found
    file = fedsparse.save_model(state_of(torch.full((271,), 0.5)), PLAIN, small(), Rng(0))
    assert found["model file"] == pytest.approx(len(file), abs=12)
    assert not caplog.records


def test_a_collapse_shows_in_the_record_and_in_the_log(
    tiny: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A penalty that outweighs the data by far, from scores that fall by half a unit a step."""
    spec = of_fedpm(tiny, rounds=2, lam=1e6)
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = finished(Spec.from_dict(spec.as_dict() | {"lr": 1.0, "epochs": 4}), tmp_path)
    assert found["rounds"][-1]["notes"]["collapsed"] == ["1.weight", "3.weight"]
    assert any("collapsed" in line.getMessage() for line in caplog.records)
    assert found["rounds"][-1]["uplink_bytes"] < 4 * 200


# Messages that nobody sends


def test_networks_with_batchnorm_are_refused() -> None:
    task = make_task(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(SpecError, match="model: fedpm masks networks without BatchNorm"):
        fedsparse.initial(PLAIN, task, Rng(0))
    message = fedsparse.broadcast(fedsparse.initial(PLAIN, small(), Rng(0)), PLAIN, small())
    with pytest.raises(SpecError, match="model: fedpm masks networks without BatchNorm"):
        fedsparse.start(message, PLAIN, task, Rng(0))


def pack_broadcast(*sections: bytes, hyper: Hyper, task: Task) -> bytes:
    return container.pack("fedpm.down", task.fingerprint("fedpm", hyper), 0, sections)


def float_bytes(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


BAD_THETA = {
    "not a number": ([0.5, math.nan, 0.5], "nan"),
    "infinite": ([0.5, math.inf, 0.5], "inf"),
    "above one": ([0.5, 1.5, 0.5], "expected probabilities"),
    "just above one": ([0.5, 1.0000001, 0.5], "expected probabilities"),
    "negative": ([0.5, -0.001, 0.5], "expected probabilities"),
    "too few": ([0.5, 0.5], "expected 12"),
    "too many": ([0.5, 0.5, 0.5, 0.5], "at most"),
}


@pytest.mark.parametrize(("values", "complaint"), BAD_THETA.values(), ids=BAD_THETA)
def test_a_theta_that_is_none_is_refused(values: list[float], complaint: str) -> None:
    task = flat_task(3)
    for hyper in (Hyper(), Hyper(downlink="levels")):
        with pytest.raises(PayloadError, match=complaint):
            fedsparse.start(pack_broadcast(bytes(8), float_bytes(*values), hyper=hyper, task=task), hyper, task, Rng(0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_theta_that_is_no_number_is_not_sent(value: float) -> None:
    task = flat_task(3)
    for downlink in ("full", "levels"):
        with pytest.raises(PayloadError, match="theta"):
            fedsparse.broadcast(state_of(torch.tensor([0.5, value, 0.5])), Hyper(downlink=downlink), task)


LEVELS = {
    "index past the values": (float_bytes(0.5), b"\x00\x02"),
    "no values": (b"", b"\x00"),
    "no index": (float_bytes(0.5, 1.0), b""),
    "part of a value": (float_bytes(0.5, 1.0)[:7], b"\x00\x00"),
    "level above one": (float_bytes(0.5, 1.5), b"\x00\x02"),
    "level not a number": (float_bytes(0.5, math.nan), b"\x00\x02"),
    "more values than entries": (float_bytes(0.1, 0.2, 0.3, 0.4, 0.5), b"\x00\x00\x00"),
    "unknown codec": (float_bytes(0.5, 1.0), b"\x07\x02"),
}


@pytest.mark.parametrize(("values", "index"), LEVELS.values(), ids=LEVELS)
def test_levels_that_nobody_sends_are_refused(values: bytes, index: bytes) -> None:
    task, hyper = flat_task(3), Hyper(downlink="levels")
    good = pack_broadcast(bytes(8), float_bytes(0.5, 1.0), b"\x00\x02", hyper=hyper, task=task)
    assert fedsparse.read_broadcast(good, 3, hyper, task)[1].tolist() == [0.5, 1.0, 0.5]
    with pytest.raises(PayloadError):
        fedsparse.read_broadcast(pack_broadcast(bytes(8), values, index, hyper=hyper, task=task), 3, hyper, task)
    with pytest.raises(PayloadError):
        fedsparse.read_broadcast(pack_broadcast(bytes(8), values, index, hyper=Hyper(), task=task), 3, Hyper(), task)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_broadcast_with_a_seed_of_another_length_is_refused(size: int) -> None:
    task = flat_task(3)
    with pytest.raises(PayloadError):
        fedsparse.start(pack_broadcast(bytes(size), float_bytes(0, 0, 0), hyper=PLAIN, task=task), PLAIN, task, Rng(0))


def test_uploads_for_another_run_are_refused() -> None:
    """Another number of parameters, another architecture with as many, other settings, weights or method."""
    task, hyper = flat_task(30, 10), Hyper()
    mask = masks(1, 40)[0]
    good = upload_of(mask, 5, hyper, task)
    bad = [
        upload_of(masks(1, 41)[0], 5, hyper, flat_task(30, 11)),
        upload_of(mask, 5, hyper, flat_task(10, 30)),
        *(upload_of(mask, 5, Hyper(**change), task, torch.zeros(40)) for change in CHANGES),
        container.pack("fedavg.up", task.fingerprint("fedavg", hyper), 5, [bytes(160)]),
        fedsparse.broadcast(state_of(torch.zeros(40)), hyper, task),
        upload_of(mask, 0, hyper, task),
        upload_of(mask, 5, hyper, task, seed={"seed": torch.tensor([8])}),
    ]
    uploads = Uploads(enumerate([*bad, good]))
    found = fedsparse.server(state_of(torch.zeros(40)), uploads, hyper, task)
    assert uploads.accepted == [len(bad)]
    assert torch.equal(found["theta"], mask.float())


CHANGES: list[dict[str, Any]] = [
    {"lam": 2.0}, {"penalty": "mean_entropy"}, {"masking": "top"}, {"keep": 0.4}, {"ste": "prob"},
    {"weight_scale": "fedpm"}, {"aggregation": "bayes"}, {"weighting": "clients"}, {"prior": 2.0}, {"reset_period": 2},
    {"delta": 0.01}, {"coding": "layers"}, {"coding": "global"}, {"downlink": "levels"}, {"evaluated": "mean"},
]  # fmt: skip


def test_the_changes_above_are_of_every_setting() -> None:
    assert {name for change in CHANGES for name in change} == {field.name for field in dataclasses.fields(Hyper)}


def test_an_upload_that_lies_about_its_ones_is_refused() -> None:
    task, mask = flat_task(40), masks(1, 40)[0]
    ones, coded = packed_mask(mask.numpy(), None)
    count = int(mask.sum())
    fingerprint = fedsparse.fingerprint(SEED, PLAIN, task)
    lies = [(count + 1).to_bytes(4, "little"), bytes(4), b"\xff" * 4, ones[:1], b"", ones[:3]]
    sections = [[lie, coded] for lie in lies] + [[ones, coded[:-1]], [ones, coded + b"\0"], [ones, b""], [ones]]
    sections += [[ones, coded, b""], [coded, ones]]
    bad = [container.pack("fedpm.up", fingerprint, 5, parts) for parts in sections]
    uploads = Uploads(enumerate([*bad, container.pack("fedpm.up", fingerprint, 5, [ones, coded])]))
    fedsparse.server(state_of(torch.zeros(40)), uploads, PLAIN, task)
    assert uploads.accepted == [len(bad)] and len(uploads.refused) == len(bad)
    assert "ones: the message states" in uploads.refused[0][1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_not_sent(value: float) -> None:
    for masking in ("bernoulli", "threshold", "top"):
        s = torch.tensor([0.0, value, 0.0])
        with pytest.raises(PayloadError, match="not finite: local training diverged"):
            fedsparse.finish(
                {"s": s}, {"theta": torch.zeros(3)} | SEED, 1, Hyper(masking=masking), flat_task(3), Rng(0)
            )


def test_diverged_training_is_not_sent() -> None:
    task, (x, y) = small(), images()
    x[3, 0, 0, 0] = math.nan
    with pytest.raises(PayloadError, match="diverged"):
        client_side.client(
            fedsparse, fedsparse.broadcast(state_of(uniform(271)), PLAIN, task), (x, y), PLAIN, task, Rng(0)
        )


HYPERS = [Hyper(), Hyper(coding="layers"), Hyper(coding="global"), Hyper(downlink="levels")]
THETA = (uniform(271, seed=6) * 8).floor() / 7


@functools.cache
def honest(which: int, kind: str) -> bytes:
    task, hyper = small(), HYPERS[which]
    if kind == "down":
        return fedsparse.broadcast(state_of(THETA), hyper, task)
    if kind == "model":
        return fedsparse.save_model(state_of(THETA), hyper, task, Rng(0))
    return upload_of(bernoulli(THETA, torch.Generator().manual_seed(1)), 9, hyper, task, THETA)


def read(message: Buffer, which: int, kind: str) -> Tensor:
    """Whatever the message carries, as probabilities or weights. PayloadError."""
    task, hyper = small(), HYPERS[which]
    if kind == "down":
        return torch.sigmoid(fedsparse.start(bytes(message), hyper, task, Rng(0))[0]["s"].detach())
    if kind == "model":
        model = fedsparse.load_model(bytes(message), hyper, task)
        return torch.cat([tensor.flatten() for tensor in model.values()])
    uploads = Uploads([(0, message)])
    try:
        return fedsparse.server(state_of(THETA), uploads, hyper, task)["theta"]
    except NoUpdate:
        raise PayloadError(uploads.refused[0][1]) from None


whichever = st.integers(0, len(HYPERS) - 1)
kinds = st.sampled_from(["up", "down", "model"])


@settings(deadline=None, max_examples=150)
@given(whichever, kinds, st.integers(0, 10**6))
def test_truncated_messages_are_payload_errors(which: int, kind: str, at: int) -> None:
    message = honest(which, kind)
    assert len(read(message, which, kind)) == 271
    with pytest.raises(PayloadError):
        read(message[: at % len(message)], which, kind)


@settings(deadline=None, max_examples=300)
@given(whichever, kinds, st.integers(0, 10**6), st.integers(0, 7))
def test_messages_with_a_flipped_bit_are_payload_errors(which: int, kind: str, at: int, bit: int) -> None:
    altered = bytearray(honest(which, kind))
    altered[at % len(altered)] ^= 1 << bit
    with pytest.raises(PayloadError):
        read(altered, which, kind)


@settings(deadline=None, max_examples=300)
@given(whichever, st.sampled_from(["up", "down"]), st.lists(st.binary(max_size=24), min_size=1, max_size=4))
@example(3, "down", [bytes(8), b"", b"\0"])
@example(3, "down", [bytes(8), float_bytes(0.5), b"\x01\x8f\x02"])
@example(0, "up", [bytes(4), b"\x01\x8f\x02\x00"])
def test_sections_of_any_bytes_are_read_or_payload_errors(which: int, kind: str, sections: list[bytes]) -> None:
    """With a right checksum: what is read nevertheless is 271 probabilities."""
    fingerprint = small().fingerprint("fedpm", HYPERS[which])
    if kind == "up":
        fingerprint = fedsparse.fingerprint(SEED, HYPERS[which], small())
    message = container.pack(f"fedpm.{kind}", fingerprint, 9 * (kind == "up"), sections)
    try:
        found = read(message, which, kind)
    except PayloadError:
        return
    assert len(found) == 271 and bool(((found >= 0) & (found <= 1)).all())


@settings(deadline=None, max_examples=200)
@given(whichever, st.integers(0, 10**6), st.integers(1, 255))
def test_altered_sections_with_a_right_checksum(which: int, at: int, change: int) -> None:
    """The code of a mask stands for one mask only: another byte is refused, or another mask with as many ones."""
    message = honest(which, "up")
    size = sum(container.section_sizes(message))
    body = bytearray(message[-4 - size : -4])
    body[at % size] ^= change
    fingerprint = fedsparse.fingerprint(SEED, HYPERS[which], small())
    altered = container.pack("fedpm.up", fingerprint, 9, [bytes(body[:4]), bytes(body[4:])])
    before = read(message, which, "up")
    try:
        found = read(altered, which, "up")
    except PayloadError:
        return
    assert int(found.sum()) == int(before.sum()) and not torch.equal(found, before)


# Settings


@pytest.mark.parametrize(
    "values",
    [
        *({"lam": v} for v in (-0.1, math.nan, math.inf, "x", True)),
        *({"keep": v} for v in (0, 1.1, math.nan)),
        *({"prior": v} for v in (0.5, 0, math.nan)),
        *({"reset_period": v} for v in (0, -1, 1.5)),
        *({"delta": v} for v in (0, 0.5, math.nan)),
        *({name: v} for name in ("penalty", "masking", "ste", "weight_scale", "aggregation") for v in ("other", None)),
        *({name: v} for name in ("weighting", "coding", "downlink", "evaluated") for v in ("other", None)),
    ],
    ids=str,
)
def test_bad_settings_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"hyper.{next(iter(values))}: "):
        registry.hyper("fedpm", values)
