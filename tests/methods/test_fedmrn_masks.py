"""FedMRN's noise and masks: properties 1 to 4, 6, 8, 13, 14 and 16 of its specification (section 10), by number, and
the options of `masking`.

The oracles are numbers worked by hand and the closed forms of the lemmas in section 6.2.
"""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedmrn_references import begun_at, each_mask, entries, of, plain_update, received, uniform
from small_task import begun
from torch import Tensor

from fedlib import rng
from fedlib.errors import SpecError
from fedlib.methods import fedmrn
from fedlib.methods.fedmrn import FedMRN
from fedlib.rng import Rng

pytestmark = pytest.mark.usefixtures("one_thread")

# Noise


def noise(method: FedMRN, seed: int, *shape: int) -> Tensor:
    return method.drawn_noise(seed, method.magnitude, {"x": torch.Size(shape)})


# Begin of the SHA-256 over two layers of 288 and 70 entries.
KNOWN_NOISE = {"uniform": "d4678f9eb98319ef", "gauss": "6e54b9df76196f11", "bernoulli": "1250ce5182b25115"}


def test_08_same_noise_in_another_process() -> None:
    """And on every machine: the server makes these bytes again from the seed that travelled."""
    code = """
import hashlib
import torch
from fedlib.methods.fedmrn import FedMRN
def digest(law):
    shapes = {"a": torch.Size([32, 1, 3, 3]), "b": torch.Size([10, 7])}
    n = FedMRN(noise=law).drawn_noise(2**63 + 5, 0.005, shapes)
    return hashlib.sha256(n.numpy().astype("<f4").tobytes()).hexdigest()[:16]
found = {law: digest(law) for law in ("uniform", "gauss", "bernoulli")}
"""
    here: dict[str, Any] = {}
    exec(code, here)
    assert here["found"] == KNOWN_NOISE
    command, root = [sys.executable, "-c", code + "print(found, end='')"], Path(fedmrn.__file__).parents[2]
    there = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert there.stdout == str(KNOWN_NOISE)


def test_08_every_client_round_and_layer_has_noise_of_its_own() -> None:
    method = of("binary")
    places = [Rng(seed).child("client", number, k) for seed in (0, 1) for number in (1, 2) for k in (0, 1, 2)]
    noises = [begun(method, rng=place).frozen["n"] for place in places]
    assert torch.equal(noises[0], begun(method, rng=places[0]).frozen["n"])
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert float(correlations.abs().max()) < 5 / 4736**0.5
    layers = method.drawn_noise(1, 0.05, {str(layer): torch.Size([4000]) for layer in range(6)}).view(6, 4000)
    assert float((torch.corrcoef(layers) - torch.eye(6)).abs().max()) < 5 / 4000**0.5


@pytest.mark.parametrize(
    ("law", "variance", "fourth"), [("uniform", 1 / 3, 1 / 5), ("gauss", 1.0, 3.0), ("bernoulli", 1.0, 1.0)]
)
def test_13_noise_law(law: str, variance: float, fourth: float) -> None:
    a, d = 0.02, 400_000
    n = noise(FedMRN(noise=law, magnitude=a), 11, d // 4, 4).double() / a
    assert n.shape == (d,)
    assert abs(float(n.mean())) < 5 * (variance / d) ** 0.5
    assert abs(float((n**2).mean()) - variance) <= 5 * ((fourth - variance**2) / d) ** 0.5 + 1e-6
    assert float(n.abs().min()) * a >= 1e-8 * (1 - 1e-6)
    largest = float(n.abs().max())
    assert (0.9999 < largest <= 1.000001) if law != "gauss" else (4 < largest < 6.5)


def test_13_tiny_noise_is_replaced() -> None:
    """Uniform on +-1e-6: one entry in a hundred lies below 1e-8 and becomes +1e-8, the others stay as drawn."""
    n = noise(FedMRN(magnitude=1e-6), 11, 40_000).numpy()
    drawn = rng.uniform(11, 0, 40_000) * np.float32(1e-6)
    tiny = np.abs(drawn) < 1e-8
    assert abs(int(tiny.sum()) - 400) < 100 and bool((drawn[tiny] < 0).any())
    assert np.array_equal(n[~tiny], drawn[~tiny])
    assert set(n[tiny].tolist()) == {float(np.float32(1e-8))}


def g(u: float, law: str, a: float) -> float:
    """Lemma 4: E min(|u|, |n|)."""
    size = abs(u)
    if law == "uniform":
        return size - size**2 / (2 * a)
    if law == "bernoulli":
        return min(size, a)
    return a * math.sqrt(2 / math.pi) * (1 - math.exp(-(size**2) / (2 * a**2))) + size * (
        1 - math.erf(size / a / math.sqrt(2))
    )


@pytest.mark.parametrize("law", ["uniform", "gauss", "bernoulli"])
@pytest.mark.parametrize("u", [0.7, -0.3])
def test_14_average_over_fresh_noise(law: str, u: float) -> None:
    """A binary mask passes half of what a signed one passes: half of the noise has the wrong sign."""
    a, d = 0.02, 400_000
    for mask, share in (("signed", 1.0), ("binary", 0.5)):
        method = FedMRN(mask=mask, noise=law, magnitude=a)
        drawn = method.masked_update(torch.full((d,), u * a), noise(method, 5, d), 1.0, uniform(d)).double()
        expected = math.copysign(share * g(u * a, law, a), u)
        assert abs(float(drawn.mean()) - expected) < 5 * float(drawn.std()) / d**0.5
        assert 5 * float(drawn.std()) / d**0.5 < 0.05 * abs(expected), "fine enough to tell"


def test_16_with_two_valued_noise_the_sign_of_the_noise_does_not_matter() -> None:
    """The transmitted entry is +alpha with probability (1 + u / alpha) / 2: FedBAT's binarisation with a fixed step."""
    method, samples = FedMRN(mask="signed", noise="bernoulli", magnitude=0.03), 100_000
    for ratio in (-1.2, -1.0, -0.4, 0.0, 0.7, 1.0):
        n = noise(method, 2, samples)
        assert set(n.abs().tolist()) == {float(np.float32(0.03))}
        update = method.masked_update(torch.full((samples,), ratio * 0.03), n, 1.0, uniform(samples))
        chance = min(max((1 + ratio) / 2, 0), 1)
        for side in (n > 0, n < 0):
            up = int((update[side] > 0).sum())
            assert abs(up - chance * int(side.sum())) <= 5 * (int(side.sum()) * chance * (1 - chance)) ** 0.5


# Masks


def by_lemma_2(u: Tensor, n: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Mean (lemma 1) and variance (lemma 2) of the masked update, in float64."""
    ratio = (u.double() / n.double()).clamp(-1 if signed else 0, 1)
    c = ratio * n.double()
    return c, n.double() ** 2 - c**2 if signed else c.abs() * (n.double().abs() - c.abs())


@each_mask
@pytest.mark.parametrize("p", [1.0, 0.3])
def test_01_02_mean_and_variance_of_many_samples(mask: str, p: float) -> None:
    (u, n), samples = entries(), 4000
    mean, variance = by_lemma_2(u, n, mask == "signed")
    drawn = of(mask).masked_update(u, n, p, uniform(samples, len(u))).double()
    error = drawn.mean(0) - mean
    standard_error = (p * variance / samples).sqrt()
    rare = 8 * n.abs() / samples * (variance > 0)  # near the ends one event in 4,000 exceeds the standard error
    assert bool((error.abs() <= 5 * standard_error + rare + 1e-8).all()), "5, not 4: 2,000 entries at once"
    inside = standard_error > 0.02 * n.abs() / samples**0.5
    assert float((error / standard_error)[inside].square().mean()) == pytest.approx(1, abs=0.15), "nor is it too exact"
    assert float((drawn - mean).square().mean() / (p * variance).mean()) == pytest.approx(1, rel=0.02)


@each_mask
def test_01_the_mask_of_the_upload_follows_the_same_law(mask: str) -> None:
    (u, n), samples = entries(), 4000
    mean, variance = by_lemma_2(u, n, mask == "signed")
    hits = of(mask).masks(u, n, uniform(samples, len(u), seed=1)).double()
    update = n.double() * (2 * hits - 1 if mask == "signed" else hits)
    rare = 8 * n.abs() / samples * (variance > 0)
    assert bool(((update.mean(0) - mean).abs() <= 5 * (variance / samples).sqrt() + rare + 1e-8).all())


def test_03_alphabet() -> None:
    u, n = entries()
    for mask, alphabet in (("binary", {0.0, 1.0}), ("signed", {-1.0, 1.0})):
        assert set((of(mask).masked_update(u, n, 1.0, uniform(2000)) / n).tolist()) == alphabet


def test_03_at_zero_the_binary_update_is_zero_and_the_signed_one_a_coin() -> None:
    u, n, binary = torch.zeros(2000), entries()[1], of("binary")
    for p in (0.01, 0.5, 1.0):
        assert not binary.masked_update(u, n, p, uniform(2000)).any()
    assert not binary.masks(u, n, uniform(2000)).any()
    assert abs(int(of("signed").masks(u, n, uniform(2000)).sum()) - 1000) < 5 * 500**0.5


@each_mask
def test_04_saturation(mask: str) -> None:
    n, method = entries()[1], of(mask)
    extremes = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24]).repeat(500)  # of what torch.rand can give
    low = 0.0 if mask == "binary" else -1.0
    assert method.masks(2 * n, n, extremes).all()
    assert not method.masks(-2 * n, n, extremes).any()
    for p in (1e-7, 0.1, 1 / 3, 0.7, 1.0):
        assert torch.equal(method.masked_update(2 * n, n, p, extremes), n)
        assert torch.equal(method.masked_update(-2 * n, n, p, extremes), low * n)


def test_06_the_share_of_masked_entries_is_the_progress() -> None:
    n = entries()[1]
    for p in (1 / 12, 0.5, 1.0):
        update = of("binary").masked_update(0.5 * n, n, p, uniform(2000))
        masked = int((update != 0.5 * n).sum())
        assert abs(masked - 2000 * p) <= 5 * (2000 * p * (1 - p)) ** 0.5


def test_masked_update_worked_by_hand() -> None:
    """At progress 1/2 a draw below 1/2 masks: u/n = 1/2 passes below 1/4 (binary) or 3/8 (signed), -1/2 below 1/8."""
    n = torch.tensor([0.5, -0.5, -0.5, 0.5, -0.5, 0.5, -0.5])
    u = torch.tensor([0.25, -0.25, -0.25, 0.25, 0.25, 2.0, 0.25])  # u/n: four times 1/2, then -1/2, 4, -1/2
    draw = torch.tensor([0.2, 0.3, 0.45, 0.9, 0.1, 0.9, 0.6])
    binary, signed = of("binary"), of("signed")
    assert binary.masked_update(u, n, 0.5, draw).tolist() == [0.5, 0.0, 0.0, 0.25, 0.0, 0.5, 0.0]
    assert signed.masked_update(u, n, 0.5, draw).tolist() == [0.5, -0.5, 0.5, 0.25, -0.5, 0.5, 0.25]
    sampled = signed.masks(u, n, draw).tolist()
    assert sampled == [True, True, True, False, True, True, False], "below 3/4, or 1/4, or always"


# Options


@each_mask
def test_progressive_masking_is_the_default(mask: str) -> None:
    """U < p selects masking and given that U < p q has probability q, all with one draw."""
    assert FedMRN().masking == "psm"
    u, n = entries()
    for seed, p in enumerate((0.05, 0.3, 0.75, 1.0)):
        draw = uniform(2000, seed=seed)
        torch.testing.assert_close(of(mask).masked_update(u, n, p, draw), plain_update(u, n, p, draw, mask))


@pytest.mark.parametrize(("masking", "shares"), [("psm", [0.25, 1.0]), ("pm", [0.25, 1.0]), ("sm", [1.0, 1.0])])
def test_share_of_masked_entries(masking: str, shares: list[float]) -> None:
    """SM masks all entries from the first step on, whatever is drawn."""
    method = of(masking=masking)
    for progress, expected in zip((0.25, 1.0), shares, strict=True):
        share, chance = method.draw(progress, Rng(1).stream())
        assert share == expected
        assert chance.shape == (4736,) and float(chance.min()) >= 0 and float(chance.max()) < 1
        n = torch.full((4736,), 0.05)
        found = method.masked_update(0.3 * n, n, share, chance)
        masked = int(((found == 0) | (found == n)).sum())
        assert abs(masked - 4736 * share) <= 5 * (4736 * share * (1 - share)) ** 0.5
    everything = method.masked_update(0.3 * n, n, 1.0, torch.full((4736,), 1 - 2**-24))
    assert set((everything / n).tolist()) <= {0.0, 1.0}


def test_likelier_values_worked_by_hand() -> None:
    """u / n = 0.25, 0.75, -0.25, -0.75, 2, -2, 0, with both signs of n; binary needs 1/2, signed 0."""
    n = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0]) * 0.5
    u = n * torch.tensor([0.25, 0.75, -0.25, -0.75, 2.0, -2.0, 0.0])
    binary, signed = of("binary", masking="pm"), of("signed", masking="pm")
    for draw in (torch.zeros(7), torch.full((7,), 0.4), torch.full((7,), 1 - 2**-24)):
        assert binary.masks(u, n, draw).tolist() == [False, True, False, False, True, False, False]
        assert signed.masks(u, n, draw).tolist() == [True, True, False, False, True, False, False]
        assert binary.masked_update(u, n, 1.0, draw).tolist() == [0, -0.5, 0, 0, 0.5, 0, 0]
        assert signed.masked_update(u, n, 1.0, draw).tolist() == [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5]


@each_mask
@pytest.mark.parametrize("p", [0.1, 0.3, 2 / 3])
def test_likelier_values_are_not_drawn_but_which_entries_are_masked_is(mask: str, p: float) -> None:
    (u, n), method = entries(), of(mask, masking="pm")
    clipped = (u / n).clamp(-1.0 if mask == "signed" else 0.0, 1.0) * n
    whole = method.masked_update(u, n, 1.0, torch.zeros(2000))
    for seed in range(3):
        draw = uniform(2000, seed=seed)
        found = method.masked_update(u, n, p, draw)
        torch.testing.assert_close(found, torch.where(draw < p, whole, clipped))
        assert torch.equal(method.masked_update(u, n, 1.0, draw), whole)
        # Of the draw, only on which side of p it lies may matter.
        coarse = torch.where(draw < p, 0.0, p + 0.01)
        assert torch.equal(method.masked_update(u, n, p, coarse), found)


@each_mask
def test_upload_of_likelier_values_draws_nothing(mask: str) -> None:
    """Same noise, other draws: the same bytes. With psm they differ."""
    same, ratio = {}, torch.linspace(-1.2, 1.2, 4736)
    for masking in ("pm", "psm"):
        method = of(mask, masking=masking)
        local = begun_at(method, ratio, Rng(1))
        u, n = local.trainable["u"].detach(), local.frozen["n"]
        drawn = {method.masks(u, n, uniform(4736, seed=seed)).numpy().tobytes() for seed in range(3)}
        sent = received(method, method.upload(local, method.task.held(0), Rng(1)))
        likelier = n * torch.where(ratio > (0.0 if mask == "signed" else 0.5), 1.0, -1.0 if mask == "signed" else 0.0)
        same[masking] = (len(drawn), torch.equal(sent, likelier))
    assert same == {"pm": (1, True), "psm": (3, False)}


@pytest.mark.parametrize(
    ("values", "field"),
    [({"mask": "ternary"}, "mask"), ({"noise": "laplace"}, "noise"), ({"magnitude": 0.0}, "magnitude")],
)
def test_bad_settings_are_named(values: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError, match=f"hyper.{field}: .*"):
        FedMRN(**values)
