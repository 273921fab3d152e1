"""FedPM's messages, malformed ones among them, and what the server makes of them: properties 6 to 10 of the
specification's section 9, by number."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from fedsparse_toys import State, flat, masks, send, server, small, state_of, uniform, upload_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import images
from torch import Tensor

from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.fedsparse.masks import pack_mask, unpack_mask
from fedlib.methods.fedsparse.method import FedPM
from fedlib.rng import Rng
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")
bayes = functools.partial(flat, aggregation="bayes")

# The coder


def unpack(sections: list[bytes], n: int, contexts: np.ndarray | None = None) -> Tensor:
    return unpack_mask([memoryview(section) for section in sections], n, contexts)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 1_000_000])
@pytest.mark.parametrize("density", [0.0, "1/n", 1e-4, 0.01, 0.3, 0.5, 1.0])
def test_09_masks_survive_the_coder_in_few_bits(n: int, density: float | str) -> None:
    """n H(k/n) + log2(n) / 2 + 128 bits, and what a range coder of 32 bits with counts of 24 bits loses by truncation:
    of a range between 2^32 and 2^64 half of 2^24, on average 1.3e-4 bits an entry."""
    mask = np.zeros(n, dtype=bool)
    k = round(n * density) if isinstance(density, float) else min(n, 1)
    mask[np.random.default_rng(1).choice(n, k, replace=False)] = True
    sections = pack_mask(mask, None)
    assert np.array_equal(unpack(sections, n).numpy(), mask)
    p = k / max(1, n)
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q)
    size = sum(map(len, sections))
    assert 8 * size <= n * entropy + 0.5 * math.log2(max(1, n)) + 128 + 1.5e-4 * n
    assert len(sections[0]) == 4 and int.from_bytes(sections[0], "little") == k
    assert size <= 12 or 0 < k < n, "masks of one value cost almost nothing"


def test_09_a_mask_whose_entries_the_receiver_foresees_costs_almost_nothing() -> None:
    """By layers: ones in one, none in the other. By the global theta: a mask of density 1/2 that equals it."""
    mask = torch.arange(8000) < 4000
    assert len(upload_of(flat(4000, 4000, coding="layers"), mask, theta=torch.zeros(8000))) < 80
    assert len(upload_of(flat(4000, 4000), mask)) > 1000
    mask, method = masks(1, 8000, 0.5)[0], flat(4000, 4000, coding="global")
    upload = upload_of(method, mask, theta=mask.float())
    assert len(upload) < 80
    assert torch.equal(server(method, state_of(mask.float()), upload).model["theta"], mask.float())


def test_09_contexts() -> None:
    theta = torch.tensor([0.0, 1.0, 0.5, 0.1, 0.9])
    assert flat(2, 3).contexts(theta) is None
    by_layer = flat(2, 3, coding="layers").contexts(theta)
    assert by_layer is not None and by_layer.tolist() == [0, 0, 1, 1, 1]
    known = flat(10_001, coding="global").contexts(torch.linspace(0, 1, 10_001))
    assert known is not None and known.min() >= 0 and known.max() < 2**16
    low = known[:5001]
    assert bool((np.diff(low) >= 0).all()) and len(set(low.tolist())) > 10, "finer and finer towards 0"
    assert set(low.tolist()).isdisjoint(known[5001:].tolist()), "what is likely to be 1 is apart from what is not"
    assert len(set(known[5001:].tolist())) > 10


# Definitions of the bits


def test_10_paper_bits() -> None:
    method = small()
    sizes = [method.sizes(upload_of(method, torch.arange(271) < k)).paper for k in range(272)]
    assert sizes[0] == sizes[271] == 0
    assert all(0 <= size <= 271 for size in sizes)
    assert sizes == pytest.approx(sizes[::-1], abs=1e-9)
    expected = [-k * math.log2(k / 271) - (271 - k) * math.log2(1 - k / 271) for k in range(1, 271)]
    assert sizes[1:271] == pytest.approx(expected, rel=1e-9)
    scattered = masks(1, 271)[0]
    upload = upload_of(method, scattered, 9)
    assert method.sizes(bytearray(upload)).paper == pytest.approx(sizes[int(scattered.sum())])


@pytest.mark.parametrize(("density", "bits"), [(0.0, 0.0808), (0.01, 0.140), (0.1, 0.494), (0.5, 1.0), (1.0, 0.0808)])
def test_10_the_official_formula_never_falls_below_its_floor(density: float, bits: float) -> None:
    """Section 8, item 5: the masks hold 0.01 and 0.99; log2(n) bits come on top (5.1)."""
    n = 100_000
    upload = upload_of(flat(n), torch.arange(n) < n * density)
    (found,) = flat(n).sizes(upload).others.values()
    assert (found - math.log2(n)) / n == pytest.approx(bits, abs=5e-4)
    assert found / n >= 0.0808 - 5e-5


# The broadcast


@pytest.mark.parametrize(
    "theta",
    [
        torch.zeros(3000),
        torch.ones(3000),
        (uniform(3000) * 11).floor() / 10,
        uniform(3000),
        torch.cat([torch.zeros(2999), torch.tensor([1e-45])]),
        torch.tensor([0.0, -0.0, 1.0] * 1000),
        torch.linspace(0, 1, 70_000),  # more values than the coder takes
        torch.linspace(0, 1, 65_535).repeat(2)[:70_000],
    ],
    ids=["zeros", "ones", "eleven values", "all differ", "subnormal", "minus zero", "too many", "almost too many"],
)
@pytest.mark.parametrize("downlink", ["full", "levels"])
def test_levels_are_theta_to_the_bit(theta: Tensor, downlink: str) -> None:
    method = flat(len(theta), downlink=downlink)
    message = method.broadcast(state_of(theta))
    local = method.begin(message, images(10), Rng(0))
    assert local.seed == 7 and torch.equal(local.frozen["theta"], theta)
    assert len(message) <= 8 + 4 * len(theta) + 64


def pack_down(method: FedPM, *sections: bytes) -> bytes:
    return container.pack("fedpm.down", method.fingerprint(), 0, sections)


def float_bytes(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize("value", [1.5, 1.0000001, -0.001])
@pytest.mark.parametrize("downlink", ["full", "levels"])
def test_a_theta_that_is_none_is_refused(value: float, downlink: str) -> None:
    method = flat(3, downlink=downlink)
    with pytest.raises(PayloadError, match="expected probabilities"):
        method.begin(pack_down(method, bytes(8), float_bytes(0.5, value, 0.5)), images(10), Rng(0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("downlink", ["full", "levels"])
def test_a_theta_that_is_no_number_is_not_sent(value: float, downlink: str) -> None:
    with pytest.raises(PayloadError, match="theta"):
        flat(3, downlink=downlink).broadcast(state_of(torch.tensor([0.5, value, 0.5])))


LEVELS = {
    "index past the values": (float_bytes(0.5), b"\x00\x02"),
    "no values": (b"", b"\x00"),
    "level above one": (float_bytes(0.5, 1.5), b"\x00\x02"),
    "more values than entries": (float_bytes(0.1, 0.2, 0.3, 0.4, 0.5), b"\x00\x00\x00"),
    "unknown codec": (float_bytes(0.5, 1.0), b"\x07\x02"),
}


@pytest.mark.parametrize(("values", "index"), LEVELS.values(), ids=LEVELS)
def test_malformed_levels_are_refused(values: bytes, index: bytes) -> None:
    method = flat(3, downlink="levels")
    good = pack_down(method, bytes(8), float_bytes(0.5, 1.0), b"\x00\x02")
    assert method.begin(good, images(10), Rng(0)).frozen["theta"].tolist() == [0.5, 1.0, 0.5]
    for other in (method, flat(3)):
        with pytest.raises(PayloadError):
            other.begin(pack_down(other, bytes(8), values, index), images(10), Rng(0))


# Malformed uploads


def test_an_upload_that_lies_about_its_ones_is_refused() -> None:
    method, mask = flat(40), masks(1, 40)[0]
    ones, coded = pack_mask(mask.numpy(), None)
    lies = [(int(mask.sum()) + 1).to_bytes(4, "little"), bytes(4), b"\xff" * 4, ones]
    messages = [container.pack("fedpm.up", method.fingerprint("fedpm 7"), 5, [lie, coded]) for lie in lies]
    uploads = Uploads(enumerate(messages))
    method.aggregate(state_of(torch.zeros(40)), uploads)
    assert uploads.accepted == [3] and all("ones: the message states" in reason for _, reason in uploads.refused)


METHODS = [small(), small(coding="layers"), small(coding="global")]
THETA = (uniform(271, seed=6) * 8).floor() / 7


@functools.cache
def honest(which: int) -> list[bytes]:
    mask = torch.bernoulli(THETA, generator=torch.Generator().manual_seed(1))
    return pack_mask(mask.bool().numpy(), METHODS[which].contexts(THETA))


@settings(max_examples=200)
@given(st.integers(0, len(METHODS) - 1), st.integers(0, 10**6), st.integers(1, 255))
def test_the_code_of_a_mask_stands_for_one_mask_only(which: int, at: int, change: int) -> None:
    """Another byte is refused, or is another mask with as many ones."""
    (ones, coded), contexts = honest(which), METHODS[which].contexts(THETA)
    altered = bytearray(coded)
    altered[at % len(coded)] ^= change
    before = unpack([ones, coded], 271, contexts)
    try:
        after = unpack([ones, bytes(altered)], 271, contexts)
    except PayloadError:
        return
    assert int(after.sum()) == int(before.sum()) and not torch.equal(after, before)


# The server


def aggregate(method: FedPM, rows: list[Tensor], samples: int = 1, state: State | None = None) -> State:
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


@pytest.mark.parametrize("more", [{}, {"aggregation": "bayes"}, {"aggregation": "bayes", "reset_period": 4}])
def test_softened_masks_are_averaged_as_the_official_code_does(more: dict[str, Any]) -> None:
    """Of masks whose 0 and 1 are replaced by 0.01 and 0.99, as its clients send them: 0.01 + 0.98 times the mean."""
    rows = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    found = aggregate(flat(4, soften=0.01, **more), [torch.tensor(row).bool() for row in rows], 7).model["theta"]
    assert found.tolist() == pytest.approx([0.99, 0.5, 0.255, 0.01], abs=1e-7)


@pytest.mark.parametrize("clients", [1, 3, 5, 7, 10, 11, 13, 49])
def test_07_with_prior_1_and_reset_1_the_mode_is_the_mean_to_the_bit(clients: int) -> None:
    """Counts are whole numbers: otherwise equal ones part by a rounding, and a broadcast by levels grows."""
    rows, method = masks(clients, 300), bayes(300)
    mean = aggregate(flat(300, weighting="clients"), rows).model["theta"]
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
        state = aggregate(method, [torch.tensor(row).bool() for row in rows], 9, state)
        assert kept_in(state).tolist() == kept
        assert (state.own.masks - kept_in(state)).tolist() == dropped
        expected = [a / (a + b) for a, b in zip(kept, dropped, strict=True)]
        assert state.model["theta"].tolist() == pytest.approx(expected, abs=1e-6)
    assert state.own.rounds == 4 and state.own.seed == 7


@pytest.mark.parametrize("prior", [1.5, 3.0, 100.0])
def test_07_a_prior_above_1_shrinks_towards_a_half(prior: float) -> None:
    """Mode of Beta(prior + k, prior + K - k): with prior 3 and one of four masks (1 + 2) / (4 + 4) = 3/8."""
    rows = [*torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0]]).bool()]
    found = aggregate(bayes(4, prior=prior), rows).model["theta"]
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
        uploads = [send(method, s, Rng(trial).child(k)) for k, s in enumerate(scores)]
        found = server(method, state, *uploads).model["theta"]
        errors.append(float((found - thetas.mean(0)).double().square().sum()))
    expected = float((thetas * (1 - thetas)).sum()) / clients**2
    assert abs(np.mean(errors) - expected) <= 5 * np.std(errors, ddof=1) / trials**0.5
    assert 5 * np.std(errors, ddof=1) / trials**0.5 < 0.05 * expected, "fine enough to tell"
    assert expected <= n / (4 * clients) and max(errors) < 1.2 * n / (4 * clients)
