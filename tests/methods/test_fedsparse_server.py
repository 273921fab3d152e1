"""FedPM's server: properties 6, 7 and 8 of the specification's section 9, by number."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from fedsparse_toys import State, flat, masks, server, state_of, upload_of, uploaded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.fedsparse.method import FedPM
from fedlib.rng import Rng

pytestmark = pytest.mark.usefixtures("one_thread")
bayes = functools.partial(flat, aggregation="bayes")


def aggregated(method: FedPM, rows: list[Tensor], samples: int = 1, state: State | None = None) -> State:
    """After a round in which each client sends one of the masks."""
    state = state or state_of(torch.zeros(method.n))
    return server(method, state, *(upload_of(method, row, samples) for row in rows))


def kept_in(state: State) -> Tensor:
    assert state.own.kept is not None
    return state.own.kept


# The mean


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("clients", [1, 1 / 3, 0, 1 / 3]), ("samples", [1, 0.3, 0, 0.1])],  # of 10, 30 and 60 samples
)
def test_06_mean_by_hand(weighting: str, expected: list[float]) -> None:
    method, state = flat(4, weighting=weighting), state_of(torch.full((4,), 0.5))
    rows = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    uploads = [upload_of(method, row, count) for row, count in zip(rows, (10, 30, 60), strict=True)]
    found = server(method, state, *uploads)
    assert found.model["theta"].tolist() == pytest.approx(expected, abs=1e-7)
    assert found.model["theta"].dtype == torch.float32
    assert found.own.seed == 7 and torch.equal(state.model["theta"], torch.full((4,), 0.5))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_06_mean_is_the_weighted_mean_in_any_order(samples: list[int], random: Any) -> None:
    rows, nothing = masks(len(samples), 50, seed=len(samples)), state_of(torch.zeros(50))
    for method in (flat(50), flat(50, weighting="clients"), bayes(50, prior=2.0)):
        uploads = [upload_of(method, row, count) for row, count in zip(rows, samples, strict=True)]
        found = server(method, nothing, *uploads)
        again = server(method, nothing, *random.sample(uploads, len(uploads)))
        assert torch.equal(again.model["theta"], found.model["theta"])
        if method.aggregation == "bayes":
            assert torch.equal(kept_in(again), kept_in(found)) and again.own.masks == found.own.masks == len(samples)
            continue
        weights = samples if method.weighting == "samples" else [1] * len(samples)
        expected = sum(k * row.double() for k, row in zip(weights, rows, strict=True)) / sum(weights)
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(found.model["theta"], expected.float(), rtol=0, atol=1e-7)


# The mode of the posterior


@pytest.mark.parametrize("clients", [1, 3, 5, 7, 10, 11, 13, 49])
def test_07_with_prior_1_and_reset_1_the_mode_is_the_mean_to_the_bit(clients: int) -> None:
    """Counts are whole numbers: otherwise equal ones part by a rounding, and a broadcast by levels grows."""
    rows, method = masks(clients, 300), bayes(300)
    mean = aggregated(flat(300, weighting="clients"), rows).model["theta"]
    state = state_of(torch.zeros(300))
    for _ in range(2):
        state = server(method, state, *(upload_of(method, row, k + 1) for k, row in enumerate(rows)))
        assert torch.equal(state.model["theta"], mean)
        assert torch.equal(kept_in(state), torch.stack(rows).float().sum(0)) and state.own.masks == clients


def test_07_counts_by_hand() -> None:
    """kept is alpha - prior, the other masks are beta - prior: whole numbers, summed until the period is over."""
    method, state = bayes(3, reset_period=2), state_of(torch.zeros(3))
    for rows, kept, dropped in (
        ([[1, 0, 0], [1, 1, 0], [1, 0, 0]], [3, 1, 0], [0, 2, 3]),
        ([[0, 0, 0], [1, 1, 0]], [4, 2, 0], [1, 3, 5]),
        ([[1, 0, 1]], [1, 0, 1], [0, 1, 0]),  # afresh
        ([[1, 1, 0]], [2, 1, 1], [0, 1, 1]),
    ):
        state = aggregated(method, [torch.tensor(row).bool() for row in rows], 9, state)
        assert kept_in(state).tolist() == kept
        assert (state.own.masks - kept_in(state)).tolist() == dropped
        expected = [a / (a + b) for a, b in zip(kept, dropped, strict=True)]
        assert state.model["theta"].tolist() == pytest.approx(expected, abs=1e-6)
    assert state.own.rounds == 4 and state.own.seed == 7


@pytest.mark.parametrize("prior", [1.5, 3.0, 100.0])
def test_07_a_prior_above_1_shrinks_towards_a_half(prior: float) -> None:
    """Mode of Beta(prior + k, prior + K - k): with prior 3 and one of four masks (1 + 2) / (4 + 4) = 3/8."""
    rows = [*torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0]]).bool()]
    found = aggregated(bayes(4, prior=prior), rows).model["theta"]
    expected = [(k + prior - 1) / (4 + 2 * prior - 2) for k in (1, 0, 4, 2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert found[3] == 0.5 and 0.25 < found[0] < 0.5 and 0 < found[1] < found[0] and 0.5 < found[2] < 1
    if prior == 3.0:
        assert float(found[0]) == 0.375


@pytest.mark.parametrize("method", [flat(40), bayes(40, reset_period=5)], ids=["mean", "bayes"])
def test_uploads_that_cannot_be_read_change_nothing(method: FedPM) -> None:
    """Among them one for other weights and one of no sample."""
    mask, state = masks(1, 40)[0], state_of(torch.zeros(40))
    good, bad = upload_of(method, mask, 5), b"nothing"
    others = [upload_of(method, mask, 5, seed=8), upload_of(method, mask, 0), good[:-1]]
    uploads = Uploads(enumerate([bad, good, *others, PayloadError("diverged")]))
    found, alone = method.aggregate(state, uploads), server(method, state, good)
    assert uploads.accepted == [1] and [k for k, _ in uploads.refused] == [0, 2, 3, 4, 5]
    assert torch.equal(found.model["theta"], alone.model["theta"])
    assert (found.own.seed, found.own.rounds, found.own.masks) == (alone.own.seed, alone.own.rounds, alone.own.masks)
    if method.aggregation == "bayes":
        assert torch.equal(kept_in(found), kept_in(alone))
    with pytest.raises(NoUpdate):
        server(method, state, bad)


# Estimation error


@pytest.mark.parametrize("clients", [1, 4, 10])
def test_08_estimation_error(clients: int) -> None:
    """E || mean of masks - mean of theta ||^2 is the sum of theta (1 - theta) / K^2, at most n / 4K (section 5.4)."""
    n, trials, method = 1000, 60, flat(1000)
    scores = torch.randn(clients, n, generator=torch.Generator().manual_seed(2))
    thetas, errors, state = torch.sigmoid(scores), [], state_of(torch.zeros(n))
    for trial in range(trials):
        uploads = [uploaded(method, s, Rng(trial).child(k)) for k, s in enumerate(scores)]
        found = server(method, state, *uploads).model["theta"]
        errors.append(float((found - thetas.mean(0)).double().square().sum()))
    expected = float((thetas * (1 - thetas)).sum()) / clients**2
    assert abs(np.mean(errors) - expected) <= 5 * np.std(errors, ddof=1) / trials**0.5
    assert 5 * np.std(errors, ddof=1) / trials**0.5 < 0.05 * expected, "fine enough to tell"
    assert expected <= n / (4 * clients) and max(errors) < 1.2 * n / (4 * clients)
