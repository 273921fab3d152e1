"""The randomised Hadamard rotation against Sylvester's matrix in integers, and a rotation worked by hand."""

import math

import numpy as np
import pytest
import torch
from common import sylvester
from torch import Tensor

from fedlib import rng
from fedlib.wire import rotation

PLUS_MINUS_PLUS_PLUS = 37  # a seed whose first four signs are these


def noise(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(n))


def whole(n: int, largest: int) -> Tensor:
    """Integers from -largest to largest, which float32 adds up without rounding."""
    return torch.randint(-largest, largest + 1, (n,), generator=torch.Generator().manual_seed(n)).float()


@pytest.mark.parametrize(("d", "n"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1024, 1024), (389_920, 524_288)])
def test_padded_length(d: int, n: int) -> None:
    assert rotation.padded(d) == n


@pytest.mark.parametrize("n", [2**k for k in range(11)])
def test_transform_is_sylvesters_matrix(n: int) -> None:
    x, h = whole(n, 100), sylvester(n)
    assert rotation.transform(x).tolist() == (h @ x.long().numpy()).tolist(), "integers come out exactly"
    y = noise(n, torch.float64)
    np.testing.assert_allclose(rotation.transform(y).numpy(), h @ y.numpy(), atol=1e-12 * n)


@pytest.mark.parametrize("n", [1, 2, 32, 2**13])
def test_transform_twice_is_n_times_the_vector(n: int) -> None:
    x = whole(n, 5)
    kept = x.clone()
    assert torch.equal(rotation.transform(rotation.transform(x)), n * x)
    assert torch.equal(x, kept), "the argument is left alone"


def test_signs_add_up_to_the_same_bytes_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 2**17
    y = torch.from_numpy(rng.signs(3, 0, n))
    found = []
    for radix in (2, 16, 64):
        monkeypatch.setattr(rotation, "RADIX", radix)
        found.append(rotation.unrotate(y, 5, n - 1000, 0.37))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("n", [0, 3, 12, 1000])
def test_other_lengths_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"vector of {n} entries, expected a power of two"):
        rotation.transform(torch.zeros(n))


def test_rotation_worked_by_hand() -> None:
    """D u = (1, -2, 3, 4); the rows of H give 6, 2, -8, 4; half of it is R u."""
    assert rng.signs(PLUS_MINUS_PLUS_PLUS, 0, 4).tolist() == [1, -1, 1, 1]
    u = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rotation.rotate(u, PLUS_MINUS_PLUS_PLUS).tolist() == [3, 1, -4, 2]
    assert rotation.unrotate(torch.tensor([3.0, 1.0, -4.0, 2.0]), PLUS_MINUS_PLUS_PLUS, 4).tolist() == [1, 2, 3, 4]
    assert rotation.unrotate(torch.tensor([3.0, 1.0, -4.0, 2.0]), PLUS_MINUS_PLUS_PLUS, 2, 3.0).tolist() == [3, 6]
    assert rotation.rotate(u[:3], PLUS_MINUS_PLUS_PLUS).tolist() == [1, 3, -2, 0], "the same without the 4"


@pytest.mark.parametrize("d", [1, 5, 64])
def test_rotation_is_h_times_d(d: int) -> None:
    """R e_i for every i are the columns of H D / sqrt(n), which are orthonormal."""
    n, seed = rotation.padded(d), 11
    r = torch.stack([rotation.rotate(e, seed) for e in torch.eye(d, dtype=torch.float64)], 1).numpy()
    np.testing.assert_allclose(r, sylvester(n)[:, :d] * rng.signs(seed, 0, d) / math.sqrt(n), atol=1e-14)
    np.testing.assert_allclose(r.T @ r, np.eye(d), atol=1e-14)


@pytest.mark.parametrize("d", [1, 2, 3, 17, 1000, 4736])
def test_inverse(d: int) -> None:
    u = noise(d)
    y = rotation.rotate(u, 7)
    assert len(y) == rotation.padded(d)
    assert float(y.norm()) == pytest.approx(float(u.norm()), rel=1e-5)
    torch.testing.assert_close(rotation.unrotate(y, 7, d), u)
    torch.testing.assert_close(rotation.unrotate(y, 7, d, -2.5), -2.5 * u)


def test_rotation_spreads_a_single_entry_and_depends_on_the_seed() -> None:
    one = torch.zeros(1000)
    one[123] = 32.0
    assert set(rotation.rotate(one, 0).abs().tolist()) == {1.0}
    u = noise(1000)
    assert torch.equal(rotation.rotate(u, 0), rotation.rotate(u, 0))
    correlation = float(rotation.rotate(u, 0) @ rotation.rotate(u, 1)) / float(u.square().sum())
    assert abs(correlation) < 5 / 1000**0.5
