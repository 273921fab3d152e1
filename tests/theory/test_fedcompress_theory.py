"""Numbers behind the chapter on clusters, codebooks and distillation, against closed forms, hand-worked values and
brute force."""

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlib.core.plan import Tensors
from fedlib.core.task import Task
from fedlib.methods.fedcompress import clustering
from fedlib.methods.fedcompress.adaptive_clusters import Rule, effective_rank, gram
from fedlib.rng import Rng
from fedlib.theory import fedcompress as theory
from fedlib.wire import codebook

PLACE = Rng(5)
F64 = torch.float64


# Distortion. -------------------------------------------------------------------------------------


def test_least_distortion_of_a_normal_law() -> None:
    """Two values by hand; four and eight as in the table of Max, IRE Trans. 1960; many by the high-rate law."""
    assert theory.least_distortion(1) == pytest.approx(1)
    assert theory.least_distortion(2) == pytest.approx(1 - 2 / math.pi)
    assert theory.least_distortion(4) == pytest.approx(0.1175, abs=5e-5)
    assert theory.least_distortion(8) == pytest.approx(0.03454, abs=1e-5)
    ratios = [theory.least_distortion(C) * C**2 / theory.HIGH_RATE["normal"] for C in (2, 8, 32, 64)]
    assert ratios == sorted(ratios) and 0.96 < ratios[-1] < 1


@pytest.mark.parametrize("law", theory.HIGH_RATE)
def test_the_high_rate_factor_by_integration(law: str) -> None:
    x = (
        torch.linspace(-2, 2, 200_001, dtype=F64)
        if law == "cut normal"
        else torch.linspace(-40, 40, 800_001, dtype=F64)
    )
    p = torch.exp(-x.abs() * math.sqrt(2)) if law == "Laplace" else torch.exp(-(x**2) / 2)
    p = p / torch.trapezoid(p, x)
    variance = torch.trapezoid(p * x**2, x)
    factor = torch.trapezoid(p ** (1 / 3), x) ** 3 / 12 / variance
    assert float(factor) == pytest.approx(theory.HIGH_RATE[law], rel=1e-4)


def test_drawn_laws() -> None:
    n = 100_000
    for law, absolute, fourth in (("normal", math.sqrt(2 / math.pi), 3), ("Laplace", 1 / math.sqrt(2), 6)):
        x = theory.drawn(law, n, PLACE).double()
        assert float(x.mean()) == pytest.approx(0, abs=5 / math.sqrt(n))
        assert float(x.square().mean()) == pytest.approx(1, abs=5 * math.sqrt((fourth - 1) / n))
        assert float(x.abs().mean()) == pytest.approx(absolute, abs=5 / math.sqrt(n))


def test_a_tensor_described_by_hand() -> None:
    """0, 0, 1, 3 with centroids 0 and 2: the tie of 1 goes down; squares 0, 0, 1, 1; variance 1.5; shares 3/4, 1/4."""
    found = theory.described(torch.tensor([0.0, 0, 1, 3]), np.array([0, 2], np.float32))
    assert found["D"] == pytest.approx(0.5 / 1.5)
    assert found["entropy"] == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    sent = sum(map(len, codebook.encode([np.array([0, 0, 0, 2], np.float32)])))
    assert found["sent"] == 8 * sent / 4


def test_points_against_brute_force() -> None:
    tensor = theory.drawn("normal", 3000, PLACE.child("points"))
    found = theory.points(tensor, (2, 5, 16), (0, 1, 20), PLACE)
    assert found[["C", "steps"]].to_numpy().tolist() == [[C, n] for C in (2, 5, 16) for n in (0, 1, 20)]
    for C in (2, 5, 16):
        own = found[found["C"] == C]
        assert own["D"].is_monotonic_decreasing and own["entropy"].max() <= math.log2(C) + 1e-12
        assert (own["sent"] >= own["entropy"]).all()
        begun = torch.from_numpy(clustering.seeds(tensor, C, PLACE))
        means = begun
        for at in range(2):
            label = (tensor[:, None] - means).abs().argmin(1)
            D = (tensor - means[label]).double().square().mean() / tensor.double().var(unbiased=False)
            assert own["D"].iloc[at] == pytest.approx(float(D), rel=1e-4)
            means = torch.stack([tensor[label == j].mean() for j in range(C)])


@pytest.mark.parametrize("law", ["normal", "Laplace"])
def test_even_steps_have_their_gap(law: str) -> None:
    tensor, step = theory.drawn(law, 100_000, PLACE.child("even")), 0.125
    found = theory.evenly(tensor, step)
    rounded = (tensor / step).double().round() * step
    assert found["D"] == pytest.approx(float((rounded - tensor).square().mean() / tensor.double().var()), rel=1e-4)
    assert found["D"] == pytest.approx(step**2 / 12, rel=0.02)
    gap = theory.GAP * (math.e / math.pi if law == "Laplace" else 1)
    assert found["D"] * 4 ** found["entropy"] == pytest.approx(gap, rel=0.02)


def test_the_gap_in_decibel_and_bits() -> None:
    assert 10 * math.log10(theory.GAP) == pytest.approx(1.53, abs=0.005)
    assert math.log2(theory.GAP) / 2 == pytest.approx(0.2546, abs=5e-5)


# Bytes. ------------------------------------------------------------------------------------------


def test_sizes_of_two_kernels() -> None:
    state = {"a.weight": torch.randn(8, 4, 3, 3), "norm.weight": torch.ones(4), "b.weight": torch.randn(4, 8, 3, 3)}
    assert theory.kernels(state) == ["a.weight", "b.weight"]
    found, n = theory.sizes(state, 5, PLACE), 2 * 288
    assert found["fixed"] == 2 * (5 * 4 + 288 * 3 / 8) + 16, "codebooks, indexes of 3 bits, BatchNorm"
    assert found["sent"] >= found["entropy"] * n / 8 + 40 + 16
    assert found["huffman"] >= found["entropy"] * n / 8 and found["bytes"] > 40 + 16
    clustered = theory.clustered_by(state, 5, PLACE)
    assert all(len(torch.unique(clustered[name])) == 5 for name in theory.kernels(state))
    assert torch.equal(clustered["norm.weight"], state["norm.weight"])
    off = [
        float((clustered[k] - state[k]).double().square().mean() / state[k].double().var(unbiased=False))
        for k in theory.kernels(state)
    ]
    assert found["D"] == pytest.approx(sum(off) / 2, rel=0.01)
    file = theory.file_of(clustered)
    assert len(file) == 4 * (n + 4) and found["file"] == theory.deflated(file) == len(zlib.compress(file, 6))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_kraft_by_brute_force(lengths: list[int]) -> None:
    """Words taken shortest first, each the least that none before begins: possible exactly if the sum is 1 or less."""
    words: list[str] = []
    for length in sorted(lengths):
        free = (f"{i:0{length}b}" for i in range(2**length))
        word = next((w for w in free if not any(w.startswith(before) for before in words)), None)
        if word is None:
            break
        words.append(word)
    assert (len(words) == len(lengths)) == (sum(2.0**-length for length in lengths) <= 1)
    assert 2**-1 + 2**-1 + 2**-2 == 1.25


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(1, 50)), min_size=1, max_size=6), st.floats(1, 20))
def test_the_mediant(schedule: list[tuple[int, int]], scale: float) -> None:
    """CCR between the ratios of the last and the first number of clusters; one direction alone below 2."""
    ratios = [1 + scale / C for C, rounds in sorted(schedule) for _ in range(rounds)]
    both = len(ratios) / sum(1 / c for c in ratios)
    assert ratios[-1] <= both * (1 + 1e-12) and both <= ratios[0] * (1 + 1e-12)
    upload_only = 2 * len(ratios) / sum(1 + 1 / c for c in ratios)
    assert upload_only < 2 and upload_only == pytest.approx(2 * both / (1 + both))


def test_exercises() -> None:
    p, counted, prefix = (0.8, 0.12, 0.08), (1, 1, 2), (1, 2, 2)
    assert [sum(a * b for a, b in zip(p, bits, strict=True)) for bits in (counted, prefix)] == pytest.approx(
        [1.08, 1.2]
    )
    assert sum(-v * math.log2(v) for v in p) < 1.08
    few = {tuple(sorted(c)) for c in itertools.product(range(3), repeat=4)}
    assert len(few) == math.comb(4 + 3 - 1, 3 - 1) and math.comb(27, 7) == 888_030
    ccr = 100 / (50 / 10 + 50 / 8)
    assert (ccr, 2 / (1 + 1 / ccr)) == pytest.approx((80 / 9, 160 / 89))


# Averages. ---------------------------------------------------------------------------------------


def test_the_same_tensor_with_shared_draws_has_one_error() -> None:
    start = theory.drawn("normal", 2000, PLACE.child("start"))
    found = theory.averaged(start, 4, 6, 0.0, True, PLACE)
    assert found["K"].tolist() == [1, 2, 3, 4] and found["distinct"].tolist() == [6] * 4
    assert found["mse"].to_numpy() == pytest.approx([found["one"][0]] * 4)


@pytest.mark.parametrize("shared", [True, False])
def test_the_error_of_an_average_spelt_out(shared: bool) -> None:
    start, K = theory.drawn("normal", 2000, PLACE.child("start")), 3
    found = theory.averaged(start, K, 6, 0.3, shared, PLACE)
    generator = PLACE.child("drift").torch()
    weights = [start + 0.3 * torch.randn(2000, generator=generator) for _ in range(K)]
    seeds = [clustering.seeds(w, 6, PLACE.child("centroids", 0 if shared else k)) for k, w in enumerate(weights)]
    hat = [theory.nearest(w, c) for w, c in zip(weights, seeds, strict=True)]
    errors = torch.stack([(a - w).double() for a, w in zip(hat, weights, strict=True)])
    variance = float(start.double().var(unbiased=False))
    assert found["mse"][K - 1] == pytest.approx(float(errors.mean(0).square().mean()) / variance, rel=1e-6)
    D = float(errors.square().mean())
    pairs = [float((errors[i] * errors[j]).mean()) for i, j in itertools.combinations(range(K), 2)]
    rho = sum(pairs) / len(pairs) / D
    assert found["one"][K - 1] == pytest.approx(D / variance, rel=1e-6)
    assert found["mse"][K - 1] == pytest.approx(D * (rho + (1 - rho) / K) / variance, rel=1e-6), "the lemma"
    assert 6 < found["distinct"][1] <= 36 < found["distinct"][2] <= 216


# Straight through. -------------------------------------------------------------------------------


def test_bounced_by_hand() -> None:
    """From 0.3 down by 0.5 * 0.8 a step at the upper value, up by 0.5 * 1.2 at the lower."""
    assert theory.bounced(0.2, 0.5, 6).tolist() == [1, -1, 1, 1, -1, 1]


@pytest.mark.parametrize("target", [-0.9, 0.0, 0.37])
@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_the_mean_over_time_is_the_target(target: float, rate: float) -> None:
    steps = 400
    path = theory.bounced(target, rate, steps)
    assert abs(path.mean() - target) <= (0.3 + 2 * rate) / (rate * steps) + 1e-9, "|w_0 - w_T| / (rate T)"
    assert set(path) == {-1.0, 1.0}


def test_three_weights() -> None:
    targets, flat = torch.tensor([-1.0, 0.1, 1.0], dtype=F64), torch.ones(3, dtype=F64)
    found = theory.three_weights(targets, flat, torch.tensor([-1.0, 1.0], dtype=F64), 0.05, 1500)
    assert found.iloc[0].to_numpy() == pytest.approx([0.405, -1, 1, -1, 0.1, 1])
    assert found.iloc[1, 1:].to_numpy() == pytest.approx([-1, 0.955, -1, 0.055, 1]), "only the middle one has an error"
    best = math.inf
    for label in itertools.product((0, 1), repeat=3):
        parts = [[t for t, j in zip(targets.tolist(), label, strict=True) if j == side] for side in (0, 1)]
        best = min(best, sum(sum((t - np.mean(part)) ** 2 for t in part) for part in parts if part) / 2)
    assert best == pytest.approx(0.2025)
    assert found["loss"][500:].min() > 1.2 * best
    assert found["w3"].is_monotonic_increasing and found["w3"].iloc[-1] > 10


# Score and rule. ---------------------------------------------------------------------------------


def rank_of(singular: Tensor) -> float:
    p = singular / singular.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=8), st.floats(0, 1))
def test_a_flatter_spectrum_has_the_larger_score(singular: list[float], part: float) -> None:
    values = torch.tensor(singular, dtype=F64)
    score = effective_rank(torch.diag(values.square()))
    assert score == pytest.approx(rank_of(values))
    assert 1 - 1e-9 <= score <= len(singular) + 1e-9
    high, low = int(values.argmax()), int(values.argmin())
    moved, given_ = values.clone(), part * float(values[high] - values[low])
    moved[high] -= given_
    moved[low] += given_
    assert rank_of(moved) >= score - 1e-9


def test_stacked_rows_against_the_mean_of_scores() -> None:
    def score(*parts: Tensor) -> float:
        return effective_rank(torch.stack([gram(part) for part in parts]).sum(0))

    along, across = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])
    assert (score(along), score(across), score(along, across)) == pytest.approx((1, 1, 2))
    many = along.expand(100, 2)
    stacked = rank_of(torch.tensor([math.sqrt(101), 1], dtype=F64))
    assert score(torch.eye(2), many) == pytest.approx(stacked)
    assert stacked < (score(torch.eye(2)) + score(many)) / 2


def test_the_four_histories() -> None:
    """Growths as the specification works them out."""
    expected = {
        "both flat": ([*range(4, 89, 4)], 30),
        "accuracy rising by 0.011": ([], 8),
        "saturating after 6 and 10 rounds": ([18, 22, 27, *range(31, 101, 4)], 29),
        "saturating after 12 and 20 rounds": ([26, 35, 43, 48, *range(52, 101, 4)], 25),
    }
    for name, (rounds, final) in expected.items():
        numbers = theory.followed(name, Rule())
        assert len(numbers) == 101 and numbers[-1] == final
        assert [r for r in range(1, 101) if numbers[r] > numbers[r - 1]] == rounds


# Distillation and BatchNorm. ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson() -> tuple[Task, Tensors]:
    return theory.digits(1, 0)


def test_a_trained_network_is_better_than_chance(lesson: tuple[Task, Tensors]) -> None:
    task, state = lesson
    assert state.keys() == task.tensors.keys() and not any(t.requires_grad for t in state.values())
    assert theory.accuracy(task, state) > 0.5 > theory.accuracy(task, task.initial())
    assert not torch.equal(state["norm1.running_mean"], torch.zeros(16))


def test_foreign_statistics_and_their_repair(lesson: tuple[Task, Tensors]) -> None:
    task, state = lesson
    images = 2 * torch.randn(100, 1, 8, 8, generator=PLACE.child("images").torch()) + 0.5
    foreign, repaired = theory.restated(task, state, images, 100), theory.absorbed(task, state, images)
    first = nn.functional.conv2d(images, state["conv1.weight"], padding=1)
    for found in (foreign, repaired):
        torch.testing.assert_close(found["norm1.running_mean"], first.mean((0, 2, 3)))
        torch.testing.assert_close(found["norm1.running_var"], first.var((0, 2, 3)))
    assert all(torch.equal(foreign[name], state[name]) for name in task.parameters)
    task.network.eval()
    x = task.test[0][:50]
    with torch.no_grad():
        logits, changed, same = (task.logits(model, x) for model in (state, foreign, repaired))
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-4)
    assert float((changed - logits).abs().max()) > 0.1
    assert all(torch.equal(repaired[name], state[name]) for name in task.weights)


def test_one_layer_by_hand() -> None:
    """The exercise: m' = m + s, s' = 2 s, gamma = 1, beta = 0 need gamma' = 2, beta' = 1."""
    m, s, a = 0.7, 1.5, torch.linspace(-3, 3, 7, dtype=F64)
    z = (a - m) / s
    torch.testing.assert_close(2 * (a - (m + s)) / (2 * s) + 1, z)
    foreign = (a - (m + s)) / (2 * s)
    torch.testing.assert_close(foreign, z + (s / (2 * s) - 1) * z + (m - (m + s)) / (2 * s)), "part 1, beta = 0"
    assert 0.9**43 > 0.01 > 0.9**44 and 0.99**458 > 0.01 > 0.99**459
