"""Numbers behind the chapter on training a part: the kernel identity (property 16 of FedPT's specification), the factor
of a layer, activations that are kept, noisy descent, and the exact epsilon, against closed forms and brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from fedlib.methods.fedpt import accounting
from fedlib.models import initializers, macs
from fedlib.models.freezing import frozen_names
from fedlib.models.registry import build
from fedlib.rng import Rng
from fedlib.theory import fedpt

PLACE = Rng(11)
F64 = torch.float64
KINDS = [["layer1"], ["layer2"], ["layer3"], ["layer1", "layer3"], ["layer1", "layer2"], ["layer2", "layer3"]]


def net(width: int = 12) -> tuple[nn.Sequential, Tensor]:
    x = torch.randn(9, 6, generator=PLACE.child("x").torch(), dtype=F64)
    return fedpt.layers((6, 5, width, 2), "he", PLACE), x


def spectrum(kernel: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(kernel).flip(0)


# The kernel of a part. ---------------------------------------------------------------------------


def test_a_jacobian_is_the_gradient_of_each_output() -> None:
    network, x = net()
    found = fedpt.jacobians(network, x)
    assert {name: part.shape for name, part in found.items()} == {
        name: (18, p.numel()) for name, p in network.named_parameters()
    }
    for row, output in enumerate(network(x).flatten()):
        gradients = torch.autograd.grad(output, list(network.parameters()), retain_graph=True)
        for part, gradient in zip(found.values(), gradients, strict=True):
            torch.testing.assert_close(part[row], gradient.flatten())


@pytest.mark.parametrize("trained", KINDS)
def test_16_the_kernel_is_the_sum_of_its_parts_and_no_part_has_larger_eigenvalues(trained: list[str]) -> None:
    J = fedpt.jacobians(*net())
    own = {name for name in J if name.split(".")[0] in trained}
    K, K_y, K_z = (fedpt.kernel(J, names) for names in (J, own, J.keys() - own))
    whole = torch.cat(list(J.values()), 1)
    torch.testing.assert_close(K, whole @ whole.T)
    torch.testing.assert_close(K, K_y + K_z)
    slack = 1e-10 * float(spectrum(K)[0])
    assert float(spectrum(K_y)[-1]) > -slack and float(spectrum(K_z)[-1]) > -slack
    assert (spectrum(K_y) <= spectrum(K) + slack).all()
    assert (spectrum(K) <= spectrum(K_y) + spectrum(K_z)[0] + slack).all()
    assert float((spectrum(K) - spectrum(K_y)).max()) > 1e-3 * float(spectrum(K)[0]), "something is missing"


def test_too_few_trained_entries_leave_directions_that_cannot_be_learnt() -> None:
    J = fedpt.jacobians(*net(width=3))
    last = ["layer3.weight", "layer3.bias"]  # 8 entries, 18 outputs
    ranks = (spectrum(fedpt.kernel(J, last)) > 1e-9).sum()
    assert int(ranks) == 8


def test_shares_of_a_network_spelt_out() -> None:
    x = torch.randn(15, 6, generator=PLACE.child("shares").torch(), dtype=F64)
    found = fedpt.shares(x, {"all": ["layer1", "layer2", "layer3"], "last": ["layer3"]}, [8, 64], PLACE)
    assert found.columns[1] == "log₂ of the width m" and found.iloc[:, 1].tolist() == [3] * 6 + [6] * 6
    assert found[found["what"] == "all"].iloc[:, 2:].to_numpy() == pytest.approx(1)
    last = found[found["what"] == "last"]
    assert last["smallest"][:3].to_numpy() == pytest.approx(0, abs=1e-9), "9 entries, 15 outputs"
    assert (last["smallest"][3:] > 1e-3).all() and (last["largest ratio"] <= 1).all()
    network = fedpt.layers((6, 32, 64, 1), "he", PLACE.child(2))
    hidden = torch.cat([network[:4](x), torch.ones(15, 1, dtype=F64)], 1).detach()
    J = fedpt.jacobians(network, x)
    share = spectrum(hidden @ hidden.T)[-1] / spectrum(fedpt.kernel(J, J))[-1]
    assert last["smallest"].iloc[-1] == pytest.approx(float(share))


def test_a_small_step_moves_the_outputs_by_the_kernel() -> None:
    network, x = net()
    J = fedpt.jacobians(network, x)
    own, r = ["layer1.weight", "layer3.weight"], torch.randn(18, generator=PLACE.child("r").torch(), dtype=F64)
    errors = []
    for rate in (1e-3, 1e-4):
        tensors = {name: p.detach().clone() for name, p in network.named_parameters()}
        for name in own:
            tensors[name] -= rate * (J[name].T @ r).view(tensors[name].shape)
        moved = (functional_call(network, tensors, (x,)) - network(x)).flatten().detach()
        predicted = -rate * fedpt.kernel(J, own) @ r
        errors.append(float((moved - predicted).norm() / predicted.norm()))
    assert errors[0] < 0.05 and errors[1] < 0.2 * errors[0], "what is missed is of second order"


# Initial values. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", initializers.LAWS)
@pytest.mark.parametrize(("fan_in", "fan_out"), [(300, 100), (100, 300)])
def test_the_factor_of_a_layer(law: str, fan_in: int, fan_out: int) -> None:
    x = torch.randn(fan_in, generator=PLACE.child("in").torch())
    outputs = torch.cat([initializers.values(seed, "a.weight", (fan_out, fan_in), law) @ x for seed in range(60)])
    outputs /= x.square().mean().sqrt()
    expected, n = fedpt.gain(law, fan_in, fan_out), len(outputs)
    assert abs(float(outputs.square().mean()) / expected - 1) < 5 * math.sqrt(2 / n)
    halves = outputs.relu().square()
    assert abs(float(halves.mean()) / (expected / 2) - 1) < 5 * math.sqrt(5 / n)


def test_a_scaled_frozen_layer_is_a_learning_rate() -> None:
    """The exercise on a faint layer: scaled by g, V trains as U = g V does with g^2 times the rate."""
    scale, rate = 0.4, 0.05
    x = torch.randn(20, 6, generator=PLACE.child("faint").torch(), dtype=F64)
    losses = []
    for gamma, first, rates in ((scale, 1.0, (rate, rate)), (1.0, scale, (rate, scale**2 * rate))):
        network = fedpt.layers((6, 8, 8, 1), "he", PLACE)
        below, frozen, above = (network.get_parameter(f"layer{i}.weight") for i in (1, 2, 3))
        with torch.no_grad():
            frozen.mul_(gamma)
            above.mul_(first)
        for _ in range(30):
            loss = (network(x) - x[:, :1]).square().mean()
            gradients = torch.autograd.grad(loss, [below, above])
            with torch.no_grad():
                for p, gradient, own in zip((below, above), gradients, rates, strict=True):
                    p.sub_(own * gradient)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0] < 0.9 * float((x[:, :1]).square().mean()), "it learns"


# Activations. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "emnist/dense1", "emnist/conv", "emnist/all_but_head"])
def test_kept_activations_are_those_of_a_real_forward_pass(policy: str) -> None:
    network = build("emnist-narrow", 1, 8, 5, Rng(0))
    frozen = frozen_names(policy, {name: p.shape for name, p in network.named_parameters()})
    for name, p in network.named_parameters():
        p.requires_grad_(name not in frozen)
    x, held = torch.randn(3, 1, 8, 8, generator=PLACE.child("images").torch()), {}
    own = {p.data_ptr() for p in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x)
    assert sum(s.nbytes() for at, s in held.items() if at not in own) == fedpt.kept(network, x, frozen) > 0


def test_kept_activations_by_hand() -> None:
    network, x = net(width=12)
    everything = fedpt.kept(network, x, ())
    assert everything == 8 * 9 * (6 + 5 + 12), (
        "inputs of the three layers; a ReLU keeps its output, the next one's input"
    )
    assert fedpt.kept(network, x, ["layer1.weight", "layer1.bias"]) == 8 * 9 * (5 + 12)
    assert fedpt.kept(network, x, ["layer2.weight", "layer2.bias"]) == everything
    below = ["layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias"]
    assert fedpt.kept(network, x, below) == 8 * 9 * 12


@pytest.mark.parametrize(("frozen", "saved"), [((2, 3, 4), 3), ((1, 2, 3, 4), 8), ((1,), 2), ((2,), 1), ((3, 5), 2)])
def test_what_five_equal_layers_save(frozen: tuple[int, ...], saved: int) -> None:
    """Of 14 products: the exercise on five equal layers, and other choices of frozen ones."""
    network, x = fedpt.layers((8,) * 6, "he", PLACE), torch.zeros(1, 8, dtype=F64)
    names = {f"layer{i}.{kind}" for i in frozen for kind in ("weight", "bias")}
    full, part = (macs.total(macs.count(network, x, chosen)).total for chosen in ((), names))
    assert (full, part) == (14 * 64, (14 - saved) * 64)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_what_a_new_tree_saves(k: int) -> None:
    """The exercise: two participations, one in each half."""
    assert (2 * accounting.kappa(2 ** (k - 1)), accounting.kappa(2**k, 2, 1 if k == 1 else 2 ** (k - 1))) == (
        2 * k,
        2 * k + 4,
    )


# Noise. ------------------------------------------------------------------------------------------


@given(share=st.floats(0.01, 0.99), fraction=st.floats(0.001, 0.9), noise=st.floats(0, 1))
def test_the_crossing_is_where_two_bounds_meet(share: float, fraction: float, noise: float) -> None:
    entries = 10_000

    def gained(share: float, entries: float, ratio: float) -> float:
        return share / (1 + entries * ratio**2)

    point = fedpt.crossing(share, fraction * entries, entries)
    assert (point == math.inf) == (share <= fraction) or share == pytest.approx(fraction)
    if abs(noise - point) > 1e-6 * point:
        better = gained(share, fraction * entries, noise) > gained(1, entries, noise)
        assert better == (noise > point) or gained(share, fraction * entries, noise) == pytest.approx(
            gained(1, entries, noise), rel=1e-9
        )


def test_the_expected_norm_at_known_dimensions() -> None:
    assert fedpt.expected_norm(1, 2.0) == pytest.approx(2 * math.sqrt(2 / math.pi))
    assert fedpt.expected_norm(2, 2.0) == pytest.approx(2 * math.sqrt(math.pi / 2))
    assert fedpt.expected_norm(3, 2.0) == pytest.approx(2 * math.sqrt(8 / math.pi))
    assert fedpt.expected_norm(11_227_812, 1.0) == pytest.approx(math.sqrt(11_227_812 - 0.5), rel=1e-7)


def test_descent_without_noise_and_far_from_the_bound_is_a_power() -> None:
    h, start = torch.tensor([1.0, 0.5, 0.2], dtype=F64), torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    rates = torch.tensor([0.1, 1.0], dtype=F64)
    found = fedpt.descent(h, start, torch.tensor([0, 2]), 0.0, rates, PLACE, rounds=7)
    losses = h * start.square() / 2
    for rate, value in zip(rates, found, strict=True):
        left = losses * (1 - rate * h) ** 14
        assert float(value) == pytest.approx(float((left[0] + losses[1] + left[2]) / losses.sum()))


def test_a_long_step_is_clipped_and_the_noise_has_its_deviation() -> None:
    h, start = torch.ones(2, dtype=F64), torch.tensor([30.0, 40.0], dtype=F64)
    found = fedpt.descent(h, start, torch.arange(2), 0.0, torch.tensor([5.0], dtype=F64), PLACE, rounds=1)
    assert float(found) == pytest.approx((45 / 50) ** 2)
    d, ratio, rate = 40_000, 0.3, 0.5
    start = torch.zeros(d, dtype=F64)
    start[0] = 1e-3
    found = fedpt.descent(
        torch.ones(d, dtype=F64), start, torch.arange(d), ratio, torch.tensor([rate], dtype=F64), PLACE, rounds=1
    )
    assert float(found) * 1e-6 / (d * (rate * ratio) ** 2) == pytest.approx(1, abs=5 * math.sqrt(2 / d))


@pytest.mark.parametrize("shift", [0.1, 0.5, 1.3, 4.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-6])
def test_no_conversion_is_below_the_exact_epsilon_of_a_gaussian(shift: float, delta: float) -> None:
    rho, exact = shift**2 / 2, accounting.package().get_epsilon_gaussian(1 / shift, delta)
    assert exact <= fedpt.sharper_epsilon(rho, delta) <= fedpt.classic_epsilon(rho, delta)
