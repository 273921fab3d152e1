"""Federated learning on quadratics, against numbers by hand, plain numpy loops and the statements of the theory."""

import dataclasses
import itertools
from math import erf, exp, pi, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlib import rng
from fedlib.errors import SpecError
from fedlib.methods import fedmrn
from fedlib.rng import Rng
from fedlib.theory.fedmrn import (
    STEEPEST,
    Problem,
    Setting,
    curves,
    errors,
    mask_variance,
    moments,
    noise,
    sent,
    settled,
    squared_gradient,
    transmitted,
    walk,
    weights,
)

PLACE = Rng(7)
# Client A: (w - 1)^2 / 2. Client B: 3 (w - 5)^2 / 2. Together the best w is (1 + 3 * 5) / 4 = 4.
CURVATURE, WISH = (
    torch.tensor([[[[1.0]], [[3.0]]]], dtype=torch.float64),
    torch.tensor([[[1.0], [5.0]]], dtype=torch.float64),
)
TOY = Problem(CURVATURE, WISH, mu=1.0, smoothness=3.0, deviation=0.0)
ORIGIN = torch.zeros(1, 1, 1, dtype=torch.float64)
both_masks = pytest.mark.parametrize("mask", ["binary", "signed"])


def servers(problem: Problem, setting: Setting, rounds: int, w: Tensor | None = None) -> Tensor:
    """The server's model [rounds + 1, R, 1, d] at the start of each round."""
    w = torch.zeros_like(problem.wish[:, :1]) if w is None else w
    path = itertools.islice(walk(problem, setting, PLACE, w), 0, rounds * setting.local_steps + 1, setting.local_steps)
    return torch.stack([server for server, _ in path])


def test_optimum_and_loss_of_two_clients_by_hand() -> None:
    assert TOY.optimum().item() == 4
    assert TOY.loss(ORIGIN).item() == (0.5 + 37.5) / 2
    assert TOY.gradients(ORIGIN).flatten().tolist() == [-1, -15]


def test_optimum_solves_the_normal_equations_and_eigenvalues_keep_their_bounds() -> None:
    problem = Problem.draw(PLACE, repetitions=3, clients=4, d=5, mu=2.0, smoothness=7.0)
    for r in range(3):
        a, b = problem.curvature[r].numpy(), problem.wish[r].numpy()
        expected = np.linalg.inv(a.sum(0)) @ sum(a[k] @ b[k] for k in range(4))
        assert np.allclose(problem.optimum()[r, 0], expected, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(problem.curvature)
    assert 2 - 1e-9 < eigenvalues.min() < 3 < 6 < eigenvalues.max() < 7 + 1e-9
    assert problem.gradients(problem.optimum()).mean(1).abs().max() < 1e-12
    assert problem.gradients(problem.optimum()).abs().max() > 1  # the clients disagree


def test_gradients_are_those_of_the_loss() -> None:
    problem = dataclasses.replace(Problem.draw(PLACE, repetitions=2, clients=3, d=4), depth=1.5)
    w = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 1, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(w).sum(), w)
    torch.testing.assert_close(problem.gradients(w).mean(1, keepdim=True), gradient)


def test_wells_are_non_convex_and_as_smooth_and_steep_as_stated() -> None:
    problem = dataclasses.replace(Problem.wells(PLACE, 1, 1, 1), wish=ORIGIN)
    z = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    slope = torch.tensor([problem.gradients(point.view(1, 1, 1)).item() for point in z[::10]])
    assert slope.max().item() == pytest.approx(STEEPEST, abs=1e-4)
    bend = slope.diff() / (z[10] - z[0])
    assert bend.max().item() == pytest.approx(2, abs=1e-3)
    assert bend.min().item() == pytest.approx(-0.5, abs=1e-3)


def stands_in(u: float, n: float, progress: float, chance: float, mask: str) -> float:
    """One entry of a masked update, by the definition."""
    if mask == "none":
        return u
    ratio = min(max(u / n, 0.0 if mask == "binary" else -1.0), 1.0)
    keep = ratio if mask == "binary" else (ratio + 1) / 2
    if chance >= progress:
        return ratio * n
    return n if chance < progress * keep else 0.0 if mask == "binary" else -n


SHRINKING = Setting(law="uniform", magnitude=20.0, scaled=True, local_steps=3)
CONSTANT = Setting(magnitude=0.3, local_steps=1, rate=0.05)


@pytest.mark.parametrize("mask", ["none", "binary", "signed"])
@pytest.mark.parametrize("cohort, feedback", [(None, False), (2, False), (None, True), (2, True)])
@pytest.mark.parametrize("setting", [SHRINKING, CONSTANT], ids=["shrinking", "constant"])
def test_walk_equals_a_plain_loop_over_entries(setting: Setting, cohort: int | None, feedback: bool, mask: str) -> None:
    """Every step and the upload have their own draws; step sizes fall within a round, the noise is drawn anew between
    rounds. With feedback the cohort keeps what its uploads lack, and who is not in it what it had."""
    problem, steps = Problem.draw(PLACE, 1, 3, 2), setting.local_steps
    setting = dataclasses.replace(setting, mask=mask, cohort=cohort, feedback=feedback)
    path, generator, w = servers(problem, setting, rounds=6), PLACE.child("walk").torch(), np.zeros(2)
    a, b, shape = problem.curvature[0].numpy(), problem.wish[0].numpy(), torch.Size([1, 3, 2])
    kept = np.zeros((3, 2))
    for start in range(0, 6 * steps, steps):
        rates = [2 / (80 + start + step) if setting.scaled else 0.05 for step in range(steps)]
        n = noise(setting.law, 20 * rates[0] if setting.scaled else 0.3, shape, generator)[0].numpy()
        chance = torch.rand(steps + 1, *shape, generator=generator)[:, 0].numpy()
        disturbance = torch.randn(steps, *shape, generator=generator)[:, 0].numpy()
        share = weights(cohort, shape, generator)[0, :, 0].numpy()
        uploads = []
        for k in range(3):
            u = kept[k]
            for step in range(steps + 1):
                draws = zip(u, n[k], chance[step, k], strict=True)
                seen = np.array([stands_in(x, y, min(step + 1, steps) / steps, z, mask) for x, y, z in draws])
                if step < steps:
                    u = u - rates[step] * (a[k] @ (w + seen - b[k]) + disturbance[step, k])
            uploads.append(seen)
            if feedback and share[k]:
                kept[k] = u - seen
        w = w + share @ uploads
        assert np.allclose(path[start // steps + 1, 0, 0], w, atol=1e-10)


def test_step_size_of_theorem_a() -> None:
    problem = Problem.draw(PLACE, 1, 1, 1)
    assert Setting().step_size(0, problem) == 2 / 80  # mu = 1, L = 10, gamma = 80
    assert Setting().step_size(20, problem) == 2 / 100
    assert Setting(local_steps=90).step_size(0, problem) == 2 / 90
    assert Setting(rate=0.3).step_size(20, problem) == 0.3


@pytest.mark.parametrize("law", ["bernoulli", "uniform"])
def test_noise_law(law: str) -> None:
    n = noise(law, 0.5, torch.Size([100_000]), PLACE.torch())
    variance = 0.25 if law == "bernoulli" else 0.25 / 3
    assert n.mean().item() == pytest.approx(0, abs=5 * sqrt(variance / 1e5))
    assert n.square().mean().item() == pytest.approx(variance, rel=0.01)
    assert n.abs().max() <= 0.5
    assert law == "uniform" or n.abs().min() == 0.5


def test_noise_that_would_divide_by_zero_is_replaced() -> None:
    assert noise("uniform", 1e-12, torch.Size([1000]), PLACE.torch()).unique().tolist() == [float(fedmrn.FLOOR)]


@both_masks
@pytest.mark.parametrize("progress", [0.3, 1.0])
def test_lemma_mean_and_variance(mask: str, progress: float) -> None:
    u, n = (
        torch.tensor([-0.9, -0.5, 0.0, 0.2, 0.7, 1.3], dtype=torch.float64),
        torch.tensor([0.6, -1.0, 1.0, 1.0, -1.0, 1.0], dtype=torch.float64),
    )
    clip = {"binary": [0, -0.5, 0, 0.2, 0, 1], "signed": [-0.6, -0.5, 0, 0.2, 0.7, 1]}[mask]
    variance = {"binary": [0, 0.25, 0, 0.16, 0, 0], "signed": [0, 0.75, 1, 0.96, 0.51, 0]}[mask]
    expected = progress * torch.tensor(variance).double()
    torch.testing.assert_close(mask_variance(u, n, progress, mask), expected)
    draws = sent(u, n, progress, torch.rand(200_000, 6, generator=PLACE.torch()), Setting(mask=mask))
    assert (draws.mean(0) - torch.tensor(clip)).abs().max() < 5 * sqrt(1 / 200_000)
    torch.testing.assert_close(draws.var(0), expected, rtol=0.02, atol=1e-9)


def test_lemma_binary_is_signed_at_half_the_magnitude_around_half_the_noise() -> None:
    u, n = torch.linspace(-2, 2, 33).double(), torch.full((33,), 1.5).double()
    chance = torch.rand(500, 33, generator=PLACE.torch())
    binary = sent(u, n, 1.0, chance, Setting(mask="binary"))
    signed = sent(u - n / 2, n / 2, 1.0, chance, Setting(mask="signed"))
    torch.testing.assert_close(binary, n / 2 + signed)


def test_lemma_average_over_symmetric_noise() -> None:
    u = torch.tensor([-1.5, -0.6, 0.0, 0.3, 2.0], dtype=torch.float64)
    assert transmitted(u, 0.5, "bernoulli").tolist() == [0.5, 0.5, 0, 0.3, 0.5]
    assert transmitted(u, 1.0, "uniform").tolist() == pytest.approx([0.5, 0.42, 0, 0.255, 0.5])
    normal = 2 * sqrt(2 / pi) * (1 - exp(-0.045)) + 0.6 * (1 - erf(0.6 / 2 / sqrt(2)))
    assert transmitted(u, 2.0, "gauss")[1].item() == pytest.approx(normal)
    for law, draw in {"bernoulli": rng.signs, "uniform": rng.uniform, "gauss": rng.normal}.items():
        n = torch.from_numpy(draw(5, 0, 200_000)).double().unsqueeze(-1)
        chance = torch.rand(200_000, 5, generator=PLACE.torch())
        signed = sent(u, n, 1.0, chance, Setting(mask="signed")).mean(0)
        binary = sent(u, n, 1.0, chance, Setting(mask="binary", doubled=True)).mean(0)
        expected = u.sign() * transmitted(u, 1.0, law)
        torch.testing.assert_close(signed, expected, atol=0.02, rtol=0)
        torch.testing.assert_close(binary, expected, atol=0.03, rtol=0)


def test_lemma_what_q_is() -> None:
    u, alpha = torch.tensor([0.3, -0.1, 0.4], dtype=torch.float64), 0.5
    n = noise("bernoulli", alpha, torch.Size([400_000, 3]), PLACE.torch())
    chance = torch.rand(400_000, 3, generator=PLACE.child("chance").torch())
    signed = (sent(u, n, 1.0, chance, Setting(mask="signed")) - u).square().sum(1).mean() / 0.26
    binary = (sent(u, n, 1.0, chance, Setting(mask="binary", doubled=True)) - u).square().sum(1).mean() / 0.26
    assert signed.item() == pytest.approx(3 * 0.25 / 0.26 - 1, rel=0.01)  # ||u||^2 = 0.26
    assert binary.item() == pytest.approx(2 * 0.5 * 0.8 / 0.26 - 1, rel=0.01)


def test_many_signed_clients_tend_to_plain_averaging() -> None:
    """Lemma on independent clients: the difference to the plain average has variance alpha^2 - u^2 over N."""
    copies = 20_000
    problem = Problem(
        CURVATURE.repeat(1, copies, 1, 1), WISH.repeat(1, copies, 1), mu=1.0, smoothness=3.0, deviation=0.0
    )
    plain = servers(problem, Setting(rate=0.01), rounds=1)[1]
    signed = servers(problem, Setting(mask="signed", magnitude=3.0, rate=0.01), rounds=1)[1]
    assert 0 < (signed - plain).abs().item() < 5 * 3 / sqrt(2 * copies)


def test_cohort_is_drawn_without_replacement() -> None:
    share = weights(3, torch.Size([2000, 10, 1]), PLACE.torch())
    assert share.unique().tolist() == [0, 1 / 3]
    assert (share.sum(1) - 1).abs().max() < 1e-12
    assert share.mean(0).flatten().tolist() == pytest.approx([0.1] * 10, abs=0.02)
    assert weights(None, torch.Size([2, 4, 1]), PLACE.torch()).flatten().tolist() == [0.25] * 8


def test_residual_stays_below_twice_the_noise_while_moves_stay_below_the_noise() -> None:
    problem = dataclasses.replace(Problem.draw(PLACE, 2, 5, 4), deviation=0.0)
    setting = Setting(mask="signed", magnitude=2.0, feedback=True, rate=0.005)
    kept = torch.stack(
        [u for _, u in itertools.islice(walk(problem, setting, PLACE, torch.zeros(2, 1, 4).double()), 0, 500, 5)]
    )
    assert 2 < kept.abs().max() <= 4


def test_same_seed_same_numbers() -> None:
    problem, setting = Problem.draw(PLACE, 2, 3, 4), Setting(mask="binary", cohort=2)
    first = errors(problem, setting, PLACE, 100)
    assert first.equals(errors(Problem.draw(PLACE, 2, 3, 4), setting, PLACE, 100))
    assert not first["error"].equals(errors(problem, setting, Rng(8), 100)["error"])


def test_errors_are_taken_at_the_ends_of_rounds() -> None:
    frame = curves(TOY, {"plain": Setting(rate=0.1), "one step": Setting(rate=0.1, local_steps=1)}, PLACE, 100)
    plain, one = (frame[frame["variant"] == name].set_index("t")["error"] for name in ("plain", "one step"))
    assert plain.index.tolist() == [5, 10, 15, 20, 30, 45, 70, 100]  # rounds 20 / 10^(j/6)
    assert one.loc[1] == pytest.approx((4 - 0.1 * (1 + 15) / 2) ** 2)
    path = servers(TOY, Setting(rate=0.1), rounds=3)
    assert plain.loc[15] == pytest.approx((path[3].item() - 4) ** 2)


def test_mean_squared_gradient_by_hand() -> None:
    # F' = 2 (w - 4): at 0 it is -8; after one step of rate 1/4 the mean of 0.25 and 3.75 is 2, where it is -4.
    setting = Setting(local_steps=2, rate=0.25)
    assert squared_gradient(TOY, setting, PLACE, 2, ORIGIN).item() == (64 + 16) / 2


def test_plain_averaging_keeps_the_rate_of_theorem_a() -> None:
    """Without drift the error falls like 1 / (gamma + t), by 2080 / 280 = 7.4; with a constant step size it stays."""
    problem = Problem.draw(PLACE, 20, 10, 5)
    falling, constant = (
        errors(problem, setting, PLACE, 2000).groupby("t")["error"].mean()
        for setting in (Setting(local_steps=1), Setting(local_steps=1, rate=0.02))
    )
    assert falling.loc[200] / falling.loc[2000] == pytest.approx(7.4, rel=0.3)
    assert constant.loc[200] / constant.loc[2000] == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("bad", [{"mask": "ternary"}, {"law": "gauss"}, {"magnitude": 0.0}])
def test_bad_settings_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(bad))):
        Setting(**bad)  # type: ignore[arg-type]


def test_a_binary_mask_under_uniform_noise_has_the_mean_and_square_of_the_lemma() -> None:
    """Drawn, and by integrals over the noise: E s = (u - b) / 2, E s^2 = alpha u / 4 - u^3 / (12 alpha) up to alpha."""
    alpha, count, generator = 0.4, 400_000, torch.Generator().manual_seed(5)
    u = torch.tensor([0.0, 0.05, 0.2, 0.39, 0.5, 2.0], dtype=torch.float64)
    n = noise("uniform", alpha, torch.Size((count, 1)), generator)
    s = sent(u, n, 1.0, torch.rand(count, len(u), generator=generator), Setting("binary"))
    b = u - transmitted(u, alpha, "uniform")
    square = torch.where(u < alpha, alpha * u / 4 - u**3 / (12 * alpha), torch.full_like(u, alpha**2 / 6))
    for values, exact in ((s, (u - b) / 2), (s.square(), square)):
        assert ((values.mean(0) - exact).abs() <= 4.5 * values.std(0) / sqrt(count)).all()
    assert (b <= torch.minimum(u, u**2 / (2 * alpha)) + 1e-12).all() and (square <= alpha * u / 4 + 1e-12).all()


def test_one_step_a_round_settles_where_theorem_c_says() -> None:
    """Below its bound, in proportion to a noise that clips nothing, and inversely to the number of clients."""
    step = {"local_steps": 1, "rate": 0.005}
    problem = Problem.draw(Rng(3), repetitions=4, clients=10, d=6)
    first, second, fourth = moments(problem, Rng(3))
    found = {}
    for alpha in (1.0, 3.0):
        found[alpha] = settled(problem, Setting("binary", "uniform", alpha, **step), Rng(3), 1600)  # type: ignore[arg-type]
        bound = alpha * first / (2 * 10) + 0.005 * second / 2 + 0.005**2 * fourth / (4 * alpha**2)
        assert bound / 40 < found[alpha] < bound
    assert found[3.0] / found[1.0] == pytest.approx(3, rel=0.25)
    many = Problem.draw(Rng(3), repetitions=4, clients=40, d=6)
    assert settled(many, Setting("binary", "uniform", 3.0, **step), Rng(3), 1600) < found[3.0] / 2.5  # type: ignore[arg-type]
