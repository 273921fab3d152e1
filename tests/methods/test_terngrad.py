"""TernGrad: messages worked by hand and their law."""

import math

import numpy as np
import pytest
import torch
from common import range_coded
from small_task import coded, layers_task, noise, received

from fedlib.methods.baselines.terngrad import TernGrad
from fedlib.rng import Rng
from fedlib.wire import entropy


def of(*shapes: tuple[int, int]) -> TernGrad:
    """On weights of the given shapes and nothing else."""
    return TernGrad().bind(layers_task(*shapes))


def test_certain_entries_are_exact() -> None:
    """All |u| are 0 or s, so nothing is left to chance; layer scales 2 and 0.5, and a layer of zeros."""
    method = of((2, 2), (1, 2), (3, 1))
    u = torch.tensor([2.0, -2.0, 0.0, 2.0, -0.5, 0.5, 0.0, 0.0, 0.0])
    symbols, scales = coded(method, u)
    assert bytes(scales) == np.array([2, 0.5, 0], "<f4").tobytes()
    # Symbols 2 0 1 2 | 0 2 | 1 1 1 in two bits each, lowest first: 01 00 10 01, 00 01 10 10, 10.
    assert bytes(symbols) == bytes([0, 0b10010010, 0b01011000, 0b01])
    assert received(method, u).tolist() == u.tolist()
    assert method.sizes(b"").paper == pytest.approx(9 * 1.5849625 + 3 * 32)


def test_mean_and_variance() -> None:
    """Every entry takes -s, 0 or s with its own sign; mean u, variance |u| (s - |u|)."""
    method, draws = of((4, 10), (2, 5)), 4000
    u = torch.cat([torch.linspace(-0.3, 0.3, 40), torch.linspace(-0.02, 0.01, 10)])
    s = torch.tensor([0.3] * 40 + [0.02] * 10)
    seen = torch.stack([received(method, u, Rng(i)) for i in range(draws)]).double()
    assert bool(((seen == 0) | (seen == u.sign() * s)).all())
    variance = (u.abs() * (s - u.abs())).double()
    error = seen.mean(0) - u.double()
    assert bool((error.abs() <= 4 * (variance / draws).sqrt() + 1e-8).all())
    assert float(seen.var(0).sum()) == pytest.approx(float(variance.sum()), rel=0.02)
    assert seen.var(0).tolist() == pytest.approx(variance.tolist(), rel=0.25, abs=1e-8)
    assert float((error / s).abs().max()) > 1e-4, "nor is it too exact"


def test_draws_the_named_stream() -> None:
    method, u = of((100, 10)), torch.linspace(-1, 1, 1000)
    chance = Rng(3).child("upload").stream().uniform(1000)
    expected = [math.copysign(1, v) if c < abs(v) else 0 for c, v in zip(chance.tolist(), u.tolist(), strict=True)]
    assert received(method, u, Rng(3)).tolist() == expected
    assert received(method, u, Rng(4)).tolist() != expected


@range_coded
def test_near_the_entropy_of_its_layers() -> None:
    """A layer of normal entries and one, a thousand times smaller, where half of the entries are certain."""
    method = of((100, 200), (50, 200))
    u = torch.cat([noise(20_000), torch.ones(10_000) * 1e-3])
    u[20_000::2] *= -1e-3
    symbols, _ = coded(method, u)
    signs = received(method, u).sign().add(1).int().numpy()
    counts = [np.bincount(part, minlength=3) for part in (signs[:20_000], signs[20_000:])]
    bound = sum(entropy.entropy_bits(part) for part in counts) / 8
    assert bound <= len(symbols) <= 1.01 * bound + 32
    assert 8 * len(symbols) < 1.3 * 30_000, "less than log2(3) bits"
