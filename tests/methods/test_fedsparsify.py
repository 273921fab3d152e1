"""FedSparsify: rounds worked by hand, how many weights are left, a plain loop with masked gradients, and messages."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_task
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import (
    CPU,
    NONE,
    begun,
    flat,
    images,
    layers_task,
    make_task,
    plain_training,
    served,
    state_of,
    trained,
    uploaded,
)

from fedlib.core.plan import Plan, Tensors
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError
from fedlib.methods.baselines.fedsparsify import FedSparsify
from fedlib.methods.messages import largest
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container, entropy

# Six weights in two layers, of which the second and the fifth have been pruned
TASK = layers_task((2, 2), (1, 2))
MODEL = {"0": torch.tensor([[0.5, 0.0], [-0.25, 2.0]]), "1": torch.tensor([[0.0, -1.0]])}
HALF, ALL = FedSparsify(keep=0.5, density=0.1).bind(TASK), FedSparsify(keep=1.0).bind(TASK)


def broadcast(method: FedSparsify, model: Tensors) -> bytes:
    return method.broadcast(state_of(method, model))


def sent(method: FedSparsify, model: Tensors, weights: list[float], samples: int = 1) -> bytes:
    """The upload of a client whose weights, pruned ones included, have become the given ones."""
    return small_task.sent(method, torch.tensor(weights) - flat(model, method.task), samples, model=model)


def values_of(method: FedSparsify, upload: bytes) -> list[float]:
    read = container.unpack(upload, "fedsparsify.up", method.fingerprint(), [10**6] * 2)
    values: list[float] = np.frombuffer(read.sections[0], "<f4").tolist()
    return values


# By hand


def test_broadcast_worked_by_hand() -> None:
    read = container.unpack(broadcast(HALF, MODEL), "fedsparsify.down", HALF.fingerprint(), [64] * 3)
    assert entropy.decode(read.sections[0], 6, 2).tolist() == [1, 0, 1, 1, 0, 1]
    assert np.frombuffer(read.sections[1], "<f4").tolist() == [0.5, -0.25, 2, -1]
    assert len(read.sections[2]) == 0
    local = begun(HALF, model=MODEL)
    u, alive = local.trainable["u"], local.frozen["alive"]
    assert local.frozen["w"].tolist() == [0.5, 0, -0.25, 2, 0, -1] and alive.tolist() == [1, 0, 1, 1, 0, 1]
    assert u.tolist() == [0] * 6 and u.requires_grad and not alive.requires_grad


def test_round_worked_by_hand() -> None:
    """Four weights are left; 1 and 3 samples; the mean of what was sent is 3, 0.125, -2, 2.5. Two of four stay."""
    weights = (([0.0, 9, 0.5, -2, 9, 1], 1), ([4.0, 9, 0, -2, 9, 3], 3))  # what a pruned one has become does not travel
    messages, before = [sent(HALF, MODEL, *each) for each in weights], copy.deepcopy(MODEL)
    assert [values_of(HALF, message) for message in messages] == [[0, 0.5, -2, 1], [4, 0, -2, 3]]
    after = served(HALF, *messages, model=MODEL)
    assert after["0"].tolist() == [[3, 0], [0, 0]] and after["1"].tolist() == [[0, 2.5]]
    assert all(torch.equal(MODEL[name], before[name]) for name in MODEL), "the old state is left alone"
    kept = served(ALL, *(sent(ALL, MODEL, *each) for each in weights), model=MODEL)
    assert flat(kept, TASK).tolist() == [3, 0, 0.125, -2, 0, 2.5]


def test_a_weight_trained_to_zero_keeps_its_place() -> None:
    """Zeros of one client, in front, in the middle and at the end, shift nothing; the weight lives on in the mean."""
    zeros = sent(ALL, MODEL, [0, 0, 0, 2, 0, 0], 1)
    assert values_of(ALL, zeros) == [0, 0, 2, 0], "alive, though zero: it travels"
    other = sent(ALL, MODEL, [1, 0, 3, 4, 0, 5], 1)
    assert flat(served(ALL, zeros, other, model=MODEL), TASK).tolist() == [0.5, 0, 1.5, 3, 0, 2.5]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_mean_of_exactly_zero_is_a_pruned_weight_to_both_sides(zero: float) -> None:
    """The state has no other sign for pruned than zero: the weight is gone, and no value lands in a wrong place."""
    after = served(ALL, *(sent(ALL, MODEL, [1, 0, third, 2, 0, 5], 1) for third in (-3, 3)), model=MODEL)
    after["0"][1, 0] = zero
    assert flat(after, TASK).tolist() == [1, 0, 0, 2, 0, 5]
    assert begun(ALL, model=after).frozen["alive"].tolist() == [1, 0, 0, 1, 0, 1]
    upload = sent(ALL, after, [10, 11, 12, 13, 14, 15], 1)
    assert values_of(ALL, upload) == [10, 13, 15]
    assert flat(served(ALL, upload, model=after), TASK).tolist() == [10, 0, 0, 13, 0, 15]


def test_when_nothing_is_left_the_round_still_goes_round() -> None:
    nothing = {name: torch.zeros(shape) for name, shape in TASK.weights.items()}
    upload = sent(HALF, nothing, [1.0] * 6, 2)
    assert values_of(HALF, upload) == []
    assert not flat(served(HALF, upload, model=nothing), TASK).any()


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
    after = served(method, sent(method, model, [*low.tolist(), *high.tolist()]), model=model)
    assert int((after["0"] != 0).sum()) == 2 and bool((after["1"] != 0).all()), "12 of 30: all of the second layer"


def pruned_counts(d: int, number: int, keep: float, density: float = 1 / 32) -> list[int]:
    """Weights left after each round in which the only client sends back what it got."""
    method = FedSparsify(keep=keep, density=density).bind(layers_task((1, d)))
    model = {"0": torch.randn(1, d, generator=torch.Generator().manual_seed(0))}
    counts = []
    for _ in range(number):
        after = served(method, small_task.sent(method, torch.zeros(d), model=model), model=model)
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


# Training


def convolutional(plan: Plan, **settings: Any) -> FedSparsify:
    """72 weights, BatchNorm, 192 weights, a bias."""
    return FedSparsify(**settings).bind(make_task(small_task.convolutional(), plan))


def test_three_rounds_equal_plain_ones() -> None:
    """Two clients, 23 and 11 samples; 264 weights, of which 158, 95 and 57 outlive the rounds."""
    method = convolutional(plan := Plan(epochs=2, batch=5, lr=0.05), keep=0.6)
    task = method.task
    model, network = task.initial(), copy.deepcopy(task.network)
    for number, expected_left in enumerate((158, 95, 57), 1):
        alive = {name: (model[name] != 0).float() for name in task.weights}
        messages, after = [], []
        for k, n in enumerate((23, 11)):
            rng = Rng(0).child(number, k)
            messages.append(uploaded(method, images(n, seed=n), rng, model))
            after.append(plain_training(network, images(n, seed=n), plan, rng, alive))
        found = served(method, *messages, model=model)
        mean = {name: (23 * after[0][name] + 11 * after[1][name]) / 34 for name in after[0]}
        left = int(flat(found, task).count_nonzero())
        assert abs(left - expected_left) <= 1
        threshold = flat(mean, task).abs().sort(descending=True).values[left - 1]
        for name in task.weights:
            mean[name] = torch.where(mean[name].abs() >= threshold * (1 - 1e-6), mean[name], torch.zeros(()))
        assert found.keys() == mean.keys()
        for name in mean:
            torch.testing.assert_close(found[name], mean[name], rtol=1e-4, atol=1e-5)
        assert not flat(found, task)[flat(model, task) == 0].any(), "what was pruned stays pruned"
        model = found
        network.load_state_dict(found, strict=False)  # BatchNorm's counter is left out


def test_pruned_weights_do_not_move_at_a_client() -> None:
    method = convolutional(Plan(epochs=2, batch=5, lr=0.1))
    model = method.task.initial()
    model["0.weight"].view(-1)[::2] = 0
    model["4.weight"][:, ::3] = 0
    local = trained(method, images(23), Rng(0), model)
    pruned, u = flat(model, method.task) == 0, local.trainable["u"].detach()
    assert int(pruned.sum()) == 36 + 66 and not u[pruned].any()
    assert int((u[~pruned] != 0).sum()) > 150
    assert torch.equal(local.frozen["w"], flat(model, method.task)), "w is frozen"


def test_without_pruning_it_is_fedavg() -> None:
    method = convolutional(plan := Plan(epochs=3, batch=5, lr=0.05), keep=1.0)
    found = served(method, uploaded(method, images(23), Rng(2)))
    expected = plain_training(method.task.network, images(23), plan, Rng(2))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)


# Messages


def test_messages_in_bytes() -> None:
    """264 weights and 19 other values; then two thirds of the weights are pruned, and both directions shrink."""
    method = convolutional(Plan(epochs=1, batch=12, lr=0.1), keep=0.5, density=0.1)
    full = method.task.initial()
    sparse = copy.deepcopy(full)
    for name in method.task.weights:
        sparse[name].view(-1)[torch.arange(full[name].numel()) % 3 > 0] = 0
    sizes = []
    for model, left in ((full, 264), (sparse, 88)):
        down, up = broadcast(method, model), uploaded(method, images(12), Rng(0), model)
        positions, values, others = container.section_sizes(down)
        assert (values, others) == (4 * left, 4 * 19) and positions <= 1 + 264 // 8
        assert container.section_sizes(up) == (4 * left, 4 * 19) and len(method.sections) == 2
        assert len(up) - 4 * (left + 19) <= 64 and len(down) - positions - 4 * (left + 19) <= 64
        assert method.sizes(up).paper == 32 * left
        sizes.append((len(down), len(up)))
    assert sizes[1] < sizes[0] and sizes[0][1] - sizes[1][1] == 4 * (264 - 88)


def test_both_directions_shrink_in_a_run(tiny: Callable[..., Spec], tmp_path: Path) -> None:
    spec = tiny(method="fedsparsify", hyper={"keep": 0.5, "density": 0.1}, rounds=5, cohort=3)
    found = rounds.run(spec, InProcess(CPU), root=tmp_path)["rounds"]
    left = [4736, 2368, 1184, 592, 474]
    for entry, count in zip(found, left, strict=True):
        assert abs(entry["paper_bits"] / 3 - 32 * count) <= 32
        assert 0 <= entry["uplink_bytes"] / 3 - entry["paper_bits"] / 3 / 8 <= 64
        assert 4 * count <= entry["downlink_bytes"] / 3 + 4 <= 4 * count + 4736 / 8 + 80
    down = [entry["downlink_bytes"] for entry in found]
    assert down == sorted(down, reverse=True) and down[-1] < 0.2 * down[0]


def made(
    mask: list[int], values: list[float], full: bytes = b"", method: FedSparsify = HALF, way: str = "down"
) -> bytes:
    """A message that the server or a client might send."""
    positions = [entropy.encode(np.array(mask), 2)] if way == "down" else []
    sections = [*positions, np.array(values, "<f4").tobytes(), full]
    return container.pack(f"fedsparsify.{way}", method.fingerprint(), 3 if way == "up" else 0, sections)


MASK = [1, 0, 1, 1, 0, 1]


BAD = [
    (made(MASK, [0.5, -0.25, 2]), "3 weights, but 4 are left"),
    (made(MASK, [0.5, -0.25, 2, -1, 1]), "5 weights, but 4 are left"),
    (made([0, 1, 0, 0, 1, 0], [0.5, -0.25, 2, -1]), "4 weights, but 2 are left"),
    (made(MASK, [0.5, math.nan, 2, -1]), "weights: value 1 is nan"),
    (made(MASK, [0.5, 1, math.inf, -1]), "weights: value 2 is inf"),
    (made(MASK, [0.5, -0.25, 2, -1], bytes(4)), "section 2: 4 bytes, the model allows at most 0"),
    (made(MASK * 2, [0.5, -0.25, 2, -1]), "expected 1 for 6 entries|altered|counts"),
    (made(MASK, [0.5, -0.25, 2, -1], method=FedSparsify().bind(TASK)), "other settings"),
    (made(MASK, [1, 2, 3, 4], way="up"), "'fedsparsify.up', expected 'fedsparsify.down'"),
]


@pytest.mark.parametrize(("bad", "complaint"), BAD, ids=[complaint for _, complaint in BAD])
def test_broadcasts_that_nobody_sends_are_refused(bad: bytes, complaint: str) -> None:
    """The suite of malformed messages has many more."""
    assert made(MASK, [0.5, -0.25, 2, -1]) == broadcast(HALF, MODEL)
    with pytest.raises(PayloadError, match=complaint):
        HALF.begin(bad, NONE, Rng(0))


def test_uploads_that_nobody_sends_are_refused() -> None:
    good = sent(HALF, MODEL, [1, 0, 2, 3, 0, 4], 3)
    assert good == made([], [1, 2, 3, 4], way="up")
    bad = [
        made([], [1, 2, 3], way="up"),
        made([], [1, 2, 3, 4, 5, 6], way="up"),  # of a client that has not heard of the pruning
        made([], [], way="up"),
        made([], [1, math.nan, 3, 4], way="up"),
        made([], [1, 2, 3, 4], bytes(4), way="up"),
        container.pack("fedsparsify.up", HALF.fingerprint(), 0, [bytes(16), b""]),
        container.pack("fedsparsify.up", HALF.fingerprint(), 3, [bytes(15), b""]),
        container.pack("fedsparsify.up", HALF.fingerprint(), 3, [bytes(16)]),
        broadcast(HALF, MODEL),
    ]
    uploads = Uploads([*enumerate(bad), (1000, good)])
    after = HALF.aggregate(state_of(HALF, MODEL), uploads).model
    assert uploads.accepted == [1000] and len(uploads.refused) == len(bad)
    assert flat(after, TASK).tolist() == [0, 0, 0, 3, 0, 4]
    with pytest.raises(NoUpdate):
        served(HALF, *bad, model=MODEL)


def test_weights_that_overflow_are_not_sent() -> None:
    model = {"0": torch.full((2, 2), 3e38), "1": torch.ones(1, 2)}
    with pytest.raises(PayloadError, match="weights: value 0 is inf"):
        small_task.sent(HALF, torch.full((6,), 3e38), model=model)
