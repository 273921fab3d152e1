"""FedSparsify: rounds worked by hand, how many weights are left, and malformed messages."""

import copy
import math

import numpy as np
import pytest
import torch
from fedsparsify_toys import (
    ALL,
    HALF,
    MODEL,
    NONE,
    TASK,
    begun,
    broadcast,
    flat,
    layers_task,
    sent,
    served,
    values_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlib.core.method import ServerState
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.baselines.fedsparsify import FedSparsify
from fedlib.methods.messages import largest
from fedlib.rng import Rng
from fedlib.wire import container, entropy


def test_broadcast_worked_by_hand() -> None:
    read = container.unpack(broadcast(HALF, MODEL), "fedsparsify.down", HALF.fingerprint(), [64] * 3)
    assert entropy.decode(read.sections[0], 6, 2).tolist() == [1, 0, 1, 1, 0, 1]
    assert np.frombuffer(read.sections[1], "<f4").tolist() == [0.5, -0.25, 2, -1]
    assert len(read.sections[2]) == 0
    local = begun(HALF, MODEL)
    u, alive = local.trainable["u"], local.frozen["alive"]
    assert local.frozen["w"].tolist() == [0.5, 0, -0.25, 2, 0, -1] and alive.tolist() == [1, 0, 1, 1, 0, 1]
    assert u.tolist() == [0] * 6 and u.requires_grad and not alive.requires_grad


def test_round_worked_by_hand() -> None:
    """Four weights are left; 1 and 3 samples; the mean of what was sent is 3, 0.125, -2, 2.5. Two of four stay."""
    weights = (([0.0, 9, 0.5, -2, 9, 1], 1), ([4.0, 9, 0, -2, 9, 3], 3))  # what a pruned one has become does not travel
    messages, before = [sent(HALF, MODEL, *each) for each in weights], copy.deepcopy(MODEL)
    assert [values_of(HALF, message) for message in messages] == [[0, 0.5, -2, 1], [4, 0, -2, 3]]
    after = served(HALF, MODEL, *messages)
    assert after["0"].tolist() == [[3, 0], [0, 0]] and after["1"].tolist() == [[0, 2.5]]
    assert all(torch.equal(MODEL[name], before[name]) for name in MODEL), "the old state is left alone"
    kept = served(ALL, MODEL, *(sent(ALL, MODEL, *each) for each in weights))
    assert flat(kept, TASK).tolist() == [3, 0, 0.125, -2, 0, 2.5]


def test_a_weight_trained_to_zero_keeps_its_place() -> None:
    """Zeros of one client, in front, in the middle and at the end, shift nothing; the weight lives on in the mean."""
    zeros = sent(ALL, MODEL, [0, 0, 0, 2, 0, 0], 1)
    assert values_of(ALL, zeros) == [0, 0, 2, 0], "alive, though zero: it travels"
    other = sent(ALL, MODEL, [1, 0, 3, 4, 0, 5], 1)
    assert flat(served(ALL, MODEL, zeros, other), TASK).tolist() == [0.5, 0, 1.5, 3, 0, 2.5]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_mean_of_exactly_zero_is_a_pruned_weight_to_both_sides(zero: float) -> None:
    """The state has no other sign for pruned than zero: the weight is gone, and no value lands in a wrong place."""
    after = served(ALL, MODEL, *(sent(ALL, MODEL, [1, 0, third, 2, 0, 5], 1) for third in (-3, 3)))
    after["0"][1, 0] = zero
    assert flat(after, TASK).tolist() == [1, 0, 0, 2, 0, 5]
    assert begun(ALL, after).frozen["alive"].tolist() == [1, 0, 0, 1, 0, 1]
    upload = sent(ALL, after, [10, 11, 12, 13, 14, 15], 1)
    assert values_of(ALL, upload) == [10, 13, 15]
    assert flat(served(ALL, after, upload), TASK).tolist() == [10, 0, 0, 13, 0, 15]


def test_when_nothing_is_left_the_round_still_goes_round() -> None:
    nothing = {name: torch.zeros(shape) for name, shape in TASK.weights.items()}
    upload = sent(HALF, nothing, [1.0] * 6, 2)
    assert values_of(HALF, upload) == []
    assert not flat(served(HALF, nothing, upload), TASK).any()


# Pruning


def test_prune_worked_by_hand() -> None:
    values = torch.tensor([1.0, -5.0, 0.5, 3.0, -0.25])
    assert largest(values, 2).tolist() == [0, -5, 0, 3, 0]
    assert largest(values, 4).tolist() == [1, -5, 0.5, 3, 0]
    assert largest(values, 0).tolist() == [0] * 5
    for left in (5, 6, 100):
        assert largest(values, left).tolist() == values.tolist()
    assert largest(torch.zeros(0), 0).tolist() == []
    assert values.tolist() == [1, -5, 0.5, 3, -0.25]


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3) | st.floats(-9, 9, width=32), min_size=1, max_size=60), st.data())
def test_prune_keeps_the_largest(entries: list[float], data: st.DataObject) -> None:
    """Also with ties: exactly `left` stay (or are zero themselves), none smaller than one that goes."""
    left, values = data.draw(st.integers(0, len(entries))), torch.tensor(entries, dtype=torch.float32)
    found = largest(values, left)
    assert bool(((found == 0) | (found == values)).all())
    assert int((found != 0).sum()) == min(left, int((values != 0).sum()))
    sizes = values.abs().sort(descending=True).values
    torch.testing.assert_close(found.abs().sort(descending=True).values[:left], sizes[:left], rtol=0, atol=0)


def test_all_layers_are_pruned_together() -> None:
    method = FedSparsify(keep=0.4).bind(layers_task((4, 5), (2, 5)))
    low, high = torch.linspace(0.01, 0.1, 20), -torch.linspace(1, 2, 10)
    model = {"0": low.view(4, 5), "1": high.view(2, 5)}
    after = served(method, model, sent(method, model, [*low.tolist(), *high.tolist()], 1))
    assert int((after["0"] != 0).sum()) == 2 and bool((after["1"] != 0).all()), "12 of 30: all of the second layer"


def pruned_counts(d: int, number: int, keep: float, density: float = 1 / 32) -> list[int]:
    """Weights left after each round in which the only client sends back what it got."""
    method = FedSparsify(keep=keep, density=density).bind(layers_task((1, d)))
    model = {"0": torch.randn(1, d, generator=torch.Generator().manual_seed(0))}
    counts = []
    for _ in range(number):
        after = served(method, model, method.upload(begun(method, model), NONE, Rng(0)))
        assert bool(((after["0"] == model["0"]) | (after["0"] == 0)).all())
        model = after
        counts.append(int(model["0"].count_nonzero()))
    return counts


@pytest.mark.parametrize(
    ("keep", "density", "number"), [(0.8, 1 / 32, 20), (0.5, 0.2, 6), (0.3, 0.9, 3), (0.7, 0.01, 15), (0.95, 0.25, 40)]
)
def test_density_is_the_larger_of_its_floor_and_a_power_of_keep(keep: float, density: float, number: int) -> None:
    """Counts are whole numbers: each round adds an error of one at most, of which `keep` outlives the next round."""
    d = 4736
    counts = pruned_counts(d, number, keep, density)
    for t, left in enumerate(counts, 1):
        assert abs(left - d * max(density, keep**t)) <= 1 / (1 - keep)
    assert counts[-1] == counts[-2] == pytest.approx(d * density, abs=1), "and there it stays"


def test_nothing_is_pruned_at_keep_one() -> None:
    assert pruned_counts(100, 3, keep=1.0) == [100] * 3


@pytest.mark.parametrize(("keep", "number"), [(0.95, 100), (0.99, 400)])
def test_slow_pruning_reaches_its_density_too(keep: float, number: int) -> None:
    """1,000 weights to 10 (less than half a weight a round near the end): rounding must not hold it up."""
    assert pruned_counts(1000, number, keep, 0.01)[-1] == 10


def test_fast_pruning_leaves_a_weight() -> None:
    counts = pruned_counts(40, 8, keep=0.4, density=1e-6)
    assert counts[0] == 16 and min(counts) >= 1, "a network without weights learns nothing more"


# Malformed messages


def flipped(good: bytes) -> list[bytes]:
    """With a bit of each of its bytes the other way round."""
    return [good[:n] + bytes([good[n] ^ 1]) + good[n + 1 :] for n in range(len(good))]


def test_broadcasts_that_nobody_sends_are_refused() -> None:
    fingerprint = HALF.fingerprint()
    mask, values = np.array([1, 0, 1, 1, 0, 1]), np.array([0.5, -0.25, 2, -1], "<f4")

    def made(mask: np.ndarray, values: np.ndarray, full: bytes = b"", print_: bytes = fingerprint) -> bytes:
        return container.pack("fedsparsify.down", print_, 0, [entropy.encode(mask, 2), values.tobytes(), full])

    good, short = made(mask, values), entropy.encode(mask, 2)[:-1]
    assert good == broadcast(HALF, MODEL)
    for bad, complaint in (
        (made(mask, values[:3]), "3 weights, but 4 are left"),
        (made(mask, np.append(values, np.float32(1))), "5 weights, but 4 are left"),
        (made(1 - mask, values), "4 weights, but 2 are left"),
        (made(mask, np.array([0.5, np.nan, 2, -1], "<f4")), "weights: value 1 is nan"),
        (made(mask, np.array([0.5, 1, np.inf, -1], "<f4")), "weights: value 2 is inf"),
        (made(mask, values, bytes(4)), "section 2: 4 bytes, the model allows at most 0"),
        (made(np.repeat(mask, 2), values), "expected 1 for 6 entries|altered|counts"),
        (
            container.pack("fedsparsify.down", fingerprint, 0, [short, values.tobytes(), b""]),
            "bits|altered|codec|counts",
        ),
        (container.pack("fedsparsify.down", fingerprint, 0, [values.tobytes(), b""]), "2 sections, expected 3"),
        (made(mask, values, print_=FedSparsify().bind(TASK).fingerprint()), "other settings"),
        (sent(HALF, MODEL, [0.0] * 6, 1), "'fedsparsify.up', expected 'fedsparsify.down'"),
        (good[:-1], "truncated"),
        *((bad, "message") for bad in flipped(good)),
    ):
        with pytest.raises(PayloadError, match=complaint):
            HALF.begin(bad, NONE, Rng(0))


def test_uploads_that_nobody_sends_are_refused() -> None:
    def made(values: list[float], samples: int = 3, full: bytes = b"") -> bytes:
        sections = [np.array(values, "<f4").tobytes(), full]
        return container.pack("fedsparsify.up", HALF.fingerprint(), samples, sections)

    good = sent(HALF, MODEL, [1, 0, 2, 3, 0, 4], 3)
    assert good == made([1, 2, 3, 4])
    bad = [
        made([1, 2, 3]),
        made([1, 2, 3, 4, 5]),
        made([1, 2, 3, 4, 5, 6]),  # of a client that has not heard of the pruning
        made([]),
        made([1, math.nan, 3, 4]),
        made([1, 2, 3, -math.inf]),
        made([1, 2, 3, 4], samples=0),
        made([1, 2, 3, 4], full=bytes(4)),
        container.pack("fedsparsify.up", HALF.fingerprint(), 3, [bytes(15), b""]),
        container.pack("fedsparsify.up", HALF.fingerprint(), 3, [bytes(16)]),
        broadcast(HALF, MODEL),
        *flipped(good),
        *(good[:n] for n in range(len(good))),
    ]
    uploads = Uploads([*enumerate(bad), (1000, good)])
    found = HALF.aggregate(ServerState(MODEL, None), uploads).model
    assert uploads.accepted == [1000] and len(uploads.refused) == len(bad)
    assert flat(found, TASK).tolist() == [0, 0, 0, 3, 0, 4]
    with pytest.raises(NoUpdate):
        served(HALF, MODEL, *bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_client_sends_nothing(value: float) -> None:
    with pytest.raises(PayloadError, match="u is not finite: local training diverged"):
        sent(HALF, MODEL, [1, 0, 2, value, 0, 4], 1)


def test_weights_that_overflow_are_not_sent() -> None:
    local = begun(HALF, {"0": torch.full((2, 2), 3e38), "1": torch.ones(1, 2)})
    assert local.trainable["u"].tolist() == [0] * 6
    local.trainable["u"] = torch.full((6,), 3e38)
    with pytest.raises(PayloadError, match="weights: value 0 is inf"):
        HALF.upload(local, NONE, Rng(0))
