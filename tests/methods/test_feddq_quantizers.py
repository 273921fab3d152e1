"""Quantizers of one tensor: golden examples of FedDQ's specification (its sections 3.2 and 3.6), and of its section 7.3
the properties 1 to 5 and 8; 7 is in test_feddq_schedules.py, 9 to 12 in test_feddq_rounds.py, 5 and 6 (bytes) in
test_feddq_messages.py.

The oracles are the formulas in float64.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedlib.errors import PayloadError
from fedlib.methods.feddq import quantizers
from fedlib.methods.feddq.schedules import Rule
from fedlib.rng import Rng
from fedlib.wire import levels
from fedlib.wire.levels import Levels

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = torch.tensor([-0.0200, -0.0071, 0.0, 0.0032, 0.0110, 0.0300])
RHO = 0.005
DRAWS = 20_000
floats = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
arrays = hnp.arrays(np.float32, st.integers(2, 30), elements=floats)
widths = st.integers(1, 16)


def normal(*shape: int, seed: int = 0, scale: float = 0.01) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def affine(x: Tensor, width: int, rng: Rng | None = None) -> Levels:
    return quantizers.affine(x, *quantizers.extent(x), 2**width - 1, rng)


def codes(found: Levels) -> np.ndarray:
    return found.levels.astype(np.int64)


def positions(x: Tensor, found: Levels) -> np.ndarray:
    """y = (x - lo) / step, in float64."""
    return (x.double().numpy() - found.first) / found.second


def slack(x: Tensor) -> float:
    """What float32 may add to an error: a few units in the last place of the bounds and of the range."""
    return 5e-7 * float(x.abs().max() + x.max() - x.min())


# Golden examples


@pytest.mark.parametrize(
    "quantizer, shift, expected, values",
    [
        ("affine_nearest", 0, [0, 4, 6, 7, 9, 15], [-0.02, -0.0066667, 0, 0.0033333, 0.01, 0.03]),
        ("symmetric_nearest", 8, [-6, -2, 0, 1, 3, 7], [-0.02, -0.0066667, 0, 0.0033333, 0.01, 0.0233333]),
    ],
)
def test_golden_example(quantizer: str, shift: int, expected: list[int], values: list[float]) -> None:
    """3.6: R / rho = 10, so b = 4 and step = 0.05 / 15; three bytes of levels after nine of header."""
    found, scales = Rule(quantizer=quantizer, resolution=RHO).quantize(GOLDEN, 0, Rng(0))
    assert found.width == 4 and found.second == pytest.approx(0.05 / 15) and scales.size == 0
    assert (codes(found) - shift).tolist() == expected
    assert quantizers.restore(found, 6, quantizer).tolist() == pytest.approx(values, abs=5e-8)
    packed = levels.pack([found], coded=False)
    assert int.from_bytes(packed, "little") == sum((k + shift) << 4 * i for i, k in enumerate(expected))
    assert (len(packed) * 8, len(levels.headers([found]) + packed)) == (24, 12)


def test_golden_example_rounded_stochastically() -> None:
    """Entry 2 lies at 3.87: level 3 with probability 0.13. The first and the last lie on the grid."""
    x = GOLDEN.repeat(DRAWS)
    found, _ = Rule(resolution=RHO).quantize(x, 0, Rng(0))
    assert found.width == 4 and Rule().quantizer == "affine_stochastic"
    drawn = codes(found).reshape(DRAWS, 6)
    assert set(drawn[:, 0]) == {0} and set(drawn[:, 5]) == {15}
    assert set(drawn[:, 1]) == {3, 4}
    assert float((drawn[:, 1] == 3).mean()) == pytest.approx(0.13, abs=4 * math.sqrt(0.13 * 0.87 / DRAWS))


def test_golden_example_that_a_symmetric_grid_clips() -> None:
    """3.2: three steps of 0.011 / 3; of levels -2 to 1 the highest stands for 0.003667, and 0.012 is lost."""
    x = torch.tensor([0.001, 0.002, 0.004, 0.012])
    found = quantizers.symmetric(x, quantizers.extent(x)[1], 2)
    assert (codes(found) - 2).tolist() == [0, 1, 1, 1]
    expected = [0, 0.0036667, 0.0036667, 0.0036667]
    assert quantizers.restore(found, 4, "symmetric_nearest").tolist() == pytest.approx(expected, abs=5e-8)


# 7.3: properties


@pytest.mark.parametrize("width", [1, 2, 4, 7, 8, 9, 12])
def test_01_02_unbiased_with_the_exact_variance(width: int) -> None:
    """1: mean of 20,000 draws; 2: mean squared error, against step^2 sum f (1 - f) and d step^2 / 4."""
    d = 40
    x = normal(d, seed=width)
    found = affine(x.repeat(DRAWS), width, Rng(width))
    drawn = quantizers.restore(found, d * DRAWS, "affine_stochastic").double().view(DRAWS, d)
    step, f = found.second, positions(x, found) % 1
    assert float((drawn.mean(0) - x.double()).abs().max()) <= 4 * step / (2 * math.sqrt(DRAWS))
    error = float((drawn - x.double()).square().sum(1).mean())
    assert error == pytest.approx(step**2 * float((f * (1 - f)).sum()), rel=0.01)
    assert error <= d * step**2 / 4


@pytest.mark.parametrize("quantizer", ["affine", "symmetric"])
def test_nearest_rounding_takes_ties_to_the_even_level(quantizer: str) -> None:
    if quantizer == "affine":
        assert codes(affine(torch.tensor([0.0, 0.5, 1.5, 2.5, 7.0]), 3)).tolist() == [0, 0, 2, 2, 7]
    else:
        found = quantizers.symmetric(torch.tensor([-3.5, -1.5, -0.5, 0.5, 2.5, 3.5]), 7.0, 3)
        assert (codes(found) - 4).tolist() == [-4, -2, 0, 0, 2, 3]


def test_draws_go_on_from_block_to_block() -> None:
    """Tensors are rounded piece by piece: the pieces share no draws."""
    x = torch.full((3 * quantizers._BLOCK + 11,), 0.5)
    x[0], x[1] = 0, 1
    found = codes(affine(x, 1, Rng(5)))
    parts = [found[start : start + quantizers._BLOCK] for start in range(0, len(found), quantizers._BLOCK)][:3]
    agreement = [float((a == b).mean()) for a, b in ((parts[0], parts[1]), (parts[1], parts[2]))]
    assert agreement == pytest.approx([0.5, 0.5], abs=0.01)


@given(arrays, widths, st.integers(0, 9))
def test_03_05_error_below_a_step_and_codes_within_bounds(values: np.ndarray, width: int, seed: int) -> None:
    x = torch.from_numpy(values)
    assume(float(x.max() - x.min()) > 1e-3)
    for quantizer, rng, share in (("affine_stochastic", Rng(seed), 1.0), ("affine_nearest", None, 0.5)):
        found = affine(x, width, rng)
        assert found.width == width and codes(found).min() >= 0 and codes(found).max() <= 2**width - 1
        error = (quantizers.restore(found, x.numel(), quantizer).double() - x.double()).abs()
        assert float(error.max()) <= share * found.second + slack(x)
    found = quantizers.symmetric(x, quantizers.extent(x)[1], width)
    half = 2 ** (width - 1)
    expected = np.rint(x.double().numpy() / found.second).clip(-half, half - 1) + half
    assert np.abs(codes(found) - expected).max() <= 1, "one where float32 and float64 differ on a tie"
    assert codes(found).min() >= 0 and codes(found).max() <= 2**width - 1


@given(arrays, widths)
def test_03_bounds_come_back(values: np.ndarray, width: int) -> None:
    """Lowest and highest entry exactly, but for one unit in the last place of step * s (and the sum's own rounding)."""
    x = torch.from_numpy(values)
    low, high = x.argmin(), x.argmax()
    span = float(x[high]) - float(x[low])
    assume(span > 1e-3)
    back = quantizers.restore(affine(x, width), x.numel(), "affine_nearest")
    assert back[low] == x[low]
    ulp = float(np.spacing(np.float32(span))) + float(np.spacing(np.abs(np.float32(x[high])))) / 2
    assert abs(float(back[high]) - float(x[high])) <= ulp
    if width <= 8:
        drawn = codes(affine(x, width, Rng(0)))
        assert drawn[low] == 0 and drawn[high] == 2**width - 1


@given(arrays, widths)
def test_04_nearest_is_idempotent(values: np.ndarray, width: int) -> None:
    x = torch.from_numpy(values)
    low, span = quantizers.extent(x)
    assume(span > 1e-3)
    found = affine(x, width)
    back = quantizers.restore(found, x.numel(), "affine_nearest")
    again = quantizers.affine(back, low, span, 2**width - 1, None)
    assert (again.width, again.first, again.second) == (found.width, found.first, found.second)
    assert codes(again).tolist() == codes(found).tolist()


@given(arrays, widths, st.integers(-30, 30), st.integers(0, 9))
def test_08_scale_law(values: np.ndarray, width: int, shift: int, seed: int) -> None:
    """c = 2^shift: the same draws give the same codes."""
    x = torch.from_numpy(values)
    assume(float(x.max() - x.min()) > 1e-3)
    assume(not ((x != 0) & (x.abs() < 1e-20)).any())  # below float32's normal numbers a shift is not exact
    for rng in (Rng(seed), None):
        one, other = affine(x, width, rng), affine(x * 2.0**shift, width, rng)
        assert codes(one).tolist() == codes(other).tolist()
        assert (other.first, other.second) == (one.first * 2.0**shift, one.second * 2.0**shift)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantizer", [*quantizers.AFFINE, *quantizers.NORMED])
def test_what_is_not_finite_is_never_quantized(bad: float, quantizer: str) -> None:
    rule = Rule(quantizer=quantizer, schedule="fixed", most=15)
    for place in range(3):
        x = torch.zeros(3)
        x[place] = bad
        with pytest.raises(PayloadError, match="not finite"):
            rule.quantize(x, 3, Rng(0))


@pytest.mark.parametrize("values", [[-3e38, 0.0, 3e38], [1e38] * 99 + [0.0]])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("quantizer", [*quantizers.AFFINE, *quantizers.NORMED])
def test_finite_entries_near_the_end_of_float32_are_refused_or_read(
    quantizer: str, width: int, values: list[float]
) -> None:
    """Their range, their norm or a product on the way to the levels may not be finite."""
    rule, x = Rule(quantizer=quantizer, schedule="fixed", width=width, most=15), torch.tensor(values)
    try:
        found, scales = rule.quantize(x, 3, Rng(0))
    except PayloadError:
        return
    back = rule.restore([found], {"x": x.shape}, scales.tobytes())
    assert bool(torch.isfinite(back["x"]).all())


# Quantizers by norm


def signed(found: Levels, scales: np.ndarray, n: int, bucket: int) -> np.ndarray:
    """What levels stand for, in float64: lowest bit the sign, the rest in steps of scale / intervals."""
    k = codes(found)
    step = np.repeat(scales.astype(np.float64), bucket or n)[:n] / found.first
    return (1 - 2 * (k & 1)) * (k >> 1) * step


@pytest.mark.parametrize("s", [1, 2, 3, 7, 15, 100])
def test_norm_quantizer_is_unbiased_and_within_qsgd_s_variance(s: int) -> None:
    """Lemma 3.1 of QSGD: variance at most min(d / s^2, sqrt(d) / s) |x|^2; and the exact one."""
    d, draws = 50, 3000
    x = normal(d, seed=s)
    norm = float(x.double().norm())
    drawn = np.empty((draws, d))
    for i in range(draws):
        found, scales = quantizers.norm(x, s, Rng(i), 0)
        assert codes(found).max() >> 1 <= s
        drawn[i] = signed(found, scales, d, 0)
    assert found.width == math.ceil(math.log2(s + 1)) + 1 and found.first == s
    assert scales.tolist() == pytest.approx([norm], rel=1e-6)
    y = np.abs(x.double().numpy()) * s / norm
    f = y % 1
    deviation = norm / s * np.sqrt(f * (1 - f) / draws)
    assert (np.abs(drawn.mean(0) - x.double().numpy()) <= 4.5 * deviation + 1e-9).all()
    error = float(((drawn - x.double().numpy()) ** 2).sum(1).mean())
    assert error == pytest.approx((norm / s) ** 2 * float((f * (1 - f)).sum()), rel=0.03)
    assert error <= min(d / s**2, math.sqrt(d) / s) * norm**2


def test_buckets_are_scaled_by_their_largest_entry() -> None:
    """1300 entries: buckets of 512, 512 and 276; the second is a thousand times larger, the third zero."""
    x = normal(1300)
    x[512:1024] *= 1000
    x[1024:] = 0
    found, scales = quantizers.norm(x, 7, Rng(0), quantizers.BUCKET)
    assert scales.tolist() == [float(x[:512].abs().max()), float(x[512:1024].abs().max()), 0]
    assert found.width == 4 and len(found.levels) == 1300 and codes(found).max() <= 15
    back = quantizers.restore_norm(found, 1300, scales, quantizers.BUCKET)
    assert back.numpy() == pytest.approx(signed(found, scales, 1300, 512), rel=1e-6)
    for part in (slice(0, 512), slice(512, 1024)):
        top = x[part].abs().argmax()
        assert back[part][top] == pytest.approx(float(x[part][top]), rel=1e-6), "the largest is exact"
        assert float((back[part] - x[part]).abs().max()) <= float(x[part].abs().max()) / 7 * (1 + 1e-6)
    assert not back[1024:].any()


@given(arrays, st.integers(1, 2**15 - 1), st.sampled_from([0, 4]))
def test_norm_levels_and_signs(values: np.ndarray, s: int, bucket: int) -> None:
    x = torch.from_numpy(values)
    assume(bool(x.any()))
    found, scales = quantizers.norm(x, s, Rng(0), bucket)
    assert len(scales) == quantizers.scales_of(len(x), bucket) == (math.ceil(len(x) / bucket) if bucket else 1)
    assert found.width == s.bit_length() + 1 <= 16
    assert (codes(found) >> 1).min() >= 0 and (codes(found) >> 1).max() <= s
    assert ((codes(found) & 1).astype(bool) == (values < 0)).all()
    error = np.abs(signed(found, scales, len(x), bucket) - values)
    assert (error <= np.repeat(scales, bucket or len(x))[: len(x)] / s * (1 + 1e-6) + slack(x)).all()


@pytest.mark.parametrize("bucket", [0, 512])
@pytest.mark.parametrize("n", [1, 513])
def test_norm_of_a_zero_tensor_and_of_equal_entries(bucket: int, n: int) -> None:
    found, scales = quantizers.norm(torch.zeros(n), 3, Rng(0), bucket)
    count = 2 if bucket and n > 512 else 1
    assert (found.width, found.levels.size, scales.tolist()) == (0, 0, [0.0] * count)
    assert quantizers.restore_norm(found, n, scales, bucket).tolist() == [0.0] * n
    if bucket:  # each is the largest of its bucket, and exact, however many the intervals
        found, _ = quantizers.norm(torch.full((40 * bucket,), 0.3), 2**15 - 1, Rng(0), bucket)
        assert set(codes(found)) == {2**16 - 2}
    if bucket or n == 1:
        found, scales = quantizers.norm(torch.full((n,), -0.7), 3, Rng(0), bucket)
        assert quantizers.restore_norm(found, n, scales, bucket).tolist() == pytest.approx([-0.7] * n)
    found, scales = quantizers.norm(torch.full((n,), 1e-41), 3, Rng(0), bucket)  # below float32's normal numbers
    assert float(quantizers.restore_norm(found, n, scales, bucket).abs().max()) <= 1e-41 * n * (1 + 1e-3)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2**16, 2**16 + 1, 3 * 2**16 + 5])
def test_a_gpu_s_one_block_gives_the_levels_of_a_cpu_s_many_and_is_read_once(
    monkeypatch: pytest.MonkeyPatch, n: int, stochastic: bool
) -> None:
    x, rng = normal(n), Rng(3) if stochastic else None
    found = []
    for on_cpu, reads in ((True, -(-n // 2**16)), (False, min(n, 1))):
        monkeypatch.setattr(Tensor, "is_cpu", on_cpu)
        with Reads() as counted:
            found.append(quantizers._round(x, -0.04, 0.0003, 255, 8, rng, 0 if rng else 3))
        assert counted.found == reads
    many, one = found
    assert np.array_equal(many, one)


class Reads(TorchFunctionMode):
    """Counts how often tensors are sent to the host."""

    found = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.found += function is Tensor.cpu
        return function(*arguments, **(options or {}))
