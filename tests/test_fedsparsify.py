"""FedSparsify: rounds worked by hand and against a plain loop with masked gradients; how many weights are left."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import make_task

from fedlib.core import client as client_side
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, NoUpdate, Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError
from fedlib.methods.baselines import fedsparsify
from fedlib.methods.baselines.fedsparsify import Hyper, prune
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container, entropy

CPU = torch.device("cpu")
HALF = Hyper(keep=0.5, density=0.1)
Shard = tuple[Tensor, Tensor]


def layers_task(*shapes: tuple[int, ...]) -> Task:
    """Weights of the given shapes and nothing else."""
    task = make_task(nn.Sequential(), Plan(epochs=1, batch=4, lr=0.1))
    task.weights.update({str(index): torch.Size(shape) for index, shape in enumerate(shapes)})
    return task


def convolutional() -> nn.Sequential:
    """72 weights, BatchNorm, 192 weights, a bias."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def images(count: int, seed: int = 0) -> Shard:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def flat(state: State, task: Task) -> Tensor:
    return torch.cat([state[name].flatten() for name in task.weights])


def broadcast_and_start(state: State, hyper: Hyper, task: Task) -> tuple[State, State]:
    return fedsparsify.start(fedsparsify.broadcast(state, hyper, task), hyper, task, Rng(0))


def client(state: State, shard: Shard, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    return client_side.client(fedsparsify, fedsparsify.broadcast(state, hyper, task), shard, hyper, task, rng)


def sent(state: State, trained: list[float], samples: int, hyper: Hyper, task: Task) -> bytes:
    """The upload of a client whose weights, pruned ones included, have become `trained`."""
    trainable, frozen = broadcast_and_start(state, hyper, task)
    return fedsparsify.finish(
        trainable | {"u": torch.tensor(trained) - frozen["w"]}, frozen, samples, hyper, task, Rng(0)
    )


def server(state: State, hyper: Hyper, task: Task, *messages: Buffer) -> State:
    return fedsparsify.server(state, Uploads(enumerate(messages)), hyper, task)


def values_of(upload: bytes, hyper: Hyper, task: Task) -> list[float]:
    read = container.unpack(upload, "fedsparsify.up", task.fingerprint("fedsparsify", hyper), [10**6] * 2)
    found: list[float] = np.frombuffer(read.sections[0], "<f4").tolist()
    return found


# Worked by hand: six weights in two layers, of which the second and the fifth have been pruned

TASK = layers_task((2, 2), (1, 2))
STATE = {"0": torch.tensor([[0.5, 0.0], [-0.25, 2.0]]), "1": torch.tensor([[0.0, -1.0]])}


def test_broadcast_worked_by_hand() -> None:
    message = fedsparsify.broadcast(STATE, HALF, TASK)
    read = container.unpack(message, "fedsparsify.down", TASK.fingerprint("fedsparsify", HALF), [64] * 3)
    assert entropy.decode(read.sections[0], 6, 2).tolist() == [1, 0, 1, 1, 0, 1]
    assert np.frombuffer(read.sections[1], "<f4").tolist() == [0.5, -0.25, 2, -1]
    assert len(read.sections[2]) == 0
    trainable, frozen = fedsparsify.start(message, HALF, TASK, Rng(0))
    assert frozen["w"].tolist() == [0.5, 0, -0.25, 2, 0, -1] and frozen["alive"].tolist() == [1, 0, 1, 1, 0, 1]
    assert trainable["u"].tolist() == [0] * 6 and trainable["u"].requires_grad and not frozen["alive"].requires_grad


def test_round_worked_by_hand() -> None:
    """Four weights are left; 1 and 3 samples; the mean of what was sent is 3, 0.125, -2, 2.5. Two of four stay."""
    a = sent(STATE, [0, 9, 0.5, -2, 9, 1], 1, HALF, TASK)  # what a pruned weight has become does not travel
    b = sent(STATE, [4, 9, 0, -2, 9, 3], 3, HALF, TASK)
    assert values_of(a, HALF, TASK) == [0, 0.5, -2, 1] and values_of(b, HALF, TASK) == [4, 0, -2, 3]
    before = copy.deepcopy(STATE)
    after = server(STATE, HALF, TASK, a, b)
    assert after["0"].tolist() == [[3, 0], [0, 0]] and after["1"].tolist() == [[0, 2.5]]
    assert all(torch.equal(STATE[name], before[name]) for name in STATE), "the old state is left alone"
    kept = server(
        STATE,
        Hyper(keep=1.0),
        TASK,
        *(
            sent(STATE, w, n, Hyper(keep=1.0), TASK)
            for w, n in (([0.0, 9, 0.5, -2, 9, 1], 1), ([4.0, 9, 0, -2, 9, 3], 3))
        ),
    )
    assert flat(kept, TASK).tolist() == [3, 0, 0.125, -2, 0, 2.5]


def test_a_weight_trained_to_zero_keeps_its_place() -> None:
    """Zeros of one client, in front, in the middle and at the end, shift nothing; the weight lives on in the mean."""
    hyper = Hyper(keep=1.0)
    zeros = sent(STATE, [0, 0, 0, 2, 0, 0], 1, hyper, TASK)
    assert values_of(zeros, hyper, TASK) == [0, 0, 2, 0], "alive, though zero: it travels"
    other = sent(STATE, [1, 0, 3, 4, 0, 5], 1, hyper, TASK)
    assert flat(server(STATE, hyper, TASK, zeros, other), TASK).tolist() == [0.5, 0, 1.5, 3, 0, 2.5]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_mean_of_exactly_zero_is_a_pruned_weight_to_both_sides(zero: float) -> None:
    """The state has no other sign for pruned than zero: the weight is gone, and no value lands in a wrong place."""
    hyper = Hyper(keep=1.0)
    a, b = sent(STATE, [1, 0, -3, 2, 0, 5], 1, hyper, TASK), sent(STATE, [1, 0, 3, 2, 0, 5], 1, hyper, TASK)
    after = server(STATE, hyper, TASK, a, b)
    after["0"][1, 0] = zero
    assert flat(after, TASK).tolist() == [1, 0, 0, 2, 0, 5]
    frozen = broadcast_and_start(after, hyper, TASK)[1]
    assert frozen["alive"].tolist() == [1, 0, 0, 1, 0, 1]
    upload = sent(after, [10, 11, 12, 13, 14, 15], 1, hyper, TASK)
    assert values_of(upload, hyper, TASK) == [10, 13, 15]
    assert flat(server(after, hyper, TASK, upload), TASK).tolist() == [10, 0, 0, 13, 0, 15]


def test_when_nothing_is_left_the_round_still_goes_round() -> None:
    nothing = {name: torch.zeros(shape) for name, shape in TASK.weights.items()}
    upload = sent(nothing, [1.0] * 6, 2, HALF, TASK)
    assert values_of(upload, HALF, TASK) == []
    assert not flat(server(nothing, HALF, TASK, upload), TASK).any()


# Pruning


def test_prune_worked_by_hand() -> None:
    values = torch.tensor([1.0, -5.0, 0.5, 3.0, -0.25])
    assert prune(values, 2).tolist() == [0, -5, 0, 3, 0]
    assert prune(values, 4).tolist() == [1, -5, 0.5, 3, 0]
    assert prune(values, 0).tolist() == [0] * 5
    for left in (5, 6, 100):
        assert prune(values, left).tolist() == values.tolist()
    assert prune(torch.zeros(0), 0).tolist() == []
    assert values.tolist() == [1, -5, 0.5, 3, -0.25]


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3) | st.floats(-9, 9, width=32), min_size=1, max_size=60), st.data())
def test_prune_keeps_the_largest(entries: list[float], data: st.DataObject) -> None:
    """Also with ties: exactly `left` stay (or are zero themselves), none smaller than one that goes."""
    left, values = data.draw(st.integers(0, len(entries))), torch.tensor(entries, dtype=torch.float32)
    found = prune(values, left)
    assert bool(((found == 0) | (found == values)).all())
    assert int((found != 0).sum()) == min(left, int((values != 0).sum()))
    sizes = values.abs().sort(descending=True).values
    torch.testing.assert_close(found.abs().sort(descending=True).values[:left], sizes[:left], rtol=0, atol=0)


def test_all_layers_are_pruned_together() -> None:
    task = layers_task((4, 5), (2, 5))
    small, large = torch.linspace(0.01, 0.1, 20), torch.linspace(1, 2, 10)
    state = {"0": small.view(4, 5), "1": -large.view(2, 5)}
    after = server(
        state, Hyper(keep=0.4), task, sent(state, [*small.tolist(), *(-large).tolist()], 1, Hyper(0.4), task)
    )
    assert int((after["0"] != 0).sum()) == 2 and bool((after["1"] != 0).all()), "12 of 30: all of the second layer"


def pruned_counts(hyper: Hyper, d: int, number: int) -> list[int]:
    """Weights left after each round in which the only client sends back what it got."""
    task = layers_task((1, d))
    state = {"0": torch.randn(1, d, generator=torch.Generator().manual_seed(0))}
    counts = []
    for _ in range(number):
        trainable, frozen = broadcast_and_start(state, hyper, task)
        after = server(state, hyper, task, fedsparsify.finish(trainable, frozen, 1, hyper, task, Rng(0)))
        assert bool(((after["0"] == state["0"]) | (after["0"] == 0)).all())
        state = after
        counts.append(int(state["0"].count_nonzero()))
    return counts


@pytest.mark.parametrize(
    ("keep", "density", "number"), [(0.8, 1 / 32, 20), (0.5, 0.2, 6), (0.3, 0.9, 3), (0.7, 0.01, 15), (0.95, 0.25, 40)]
)
def test_density_is_the_larger_of_its_floor_and_a_power_of_keep(keep: float, density: float, number: int) -> None:
    """Counts are whole numbers: each round adds an error of one at most, of which `keep` outlives the next round."""
    d = 4736
    counts = pruned_counts(Hyper(keep=keep, density=density), d, number)
    for t, left in enumerate(counts, 1):
        assert abs(left - d * max(density, keep**t)) <= 1 / (1 - keep)
    assert counts[-1] == counts[-2] == pytest.approx(d * density, abs=1), "and there it stays"


def test_nothing_is_pruned_at_keep_one() -> None:
    assert pruned_counts(Hyper(keep=1.0), 100, 3) == [100] * 3


@pytest.mark.parametrize(("keep", "number"), [(0.95, 100), (0.99, 400)])
def test_slow_pruning_reaches_its_density_too(keep: float, number: int) -> None:
    """1,000 weights to 10 (less than half a weight a round near the end): rounding must not hold it up."""
    assert pruned_counts(Hyper(keep=keep, density=0.01), 1000, number)[-1] == 10


def test_fast_pruning_leaves_a_weight() -> None:
    counts = pruned_counts(Hyper(keep=0.4, density=1e-6), 40, 8)
    assert counts[0] == 16 and min(counts) >= 1, "a network without weights learns nothing more"


# Training


def plain_training(network: nn.Module, alive: State, shard: Shard, plan: Plan, rng: Rng) -> State:
    """Torch's own optimizer; gradients of pruned weights are cut. The batches are those of `rng`."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=plan.lr)
    order = rng.child("order").torch()
    for _ in range(plan.epochs):
        permutation = torch.randperm(len(shard[0]), generator=order)
        for start in range(0, len(permutation), plan.batch):
            index = permutation[start : start + plan.batch]
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(network(shard[0][index]), shard[1][index]))
            for name, p in network.named_parameters():
                if name in alive and p.grad is not None:
                    p.grad.mul_(alive[name])
            optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def test_three_rounds_equal_plain_ones() -> None:
    """Two clients, 23 and 11 samples; 264 weights, of which 158, 95 and 57 outlive the rounds."""
    task, hyper = make_task(convolutional(), plan := Plan(epochs=2, batch=5, lr=0.05)), Hyper(keep=0.6)
    state, network = task.initial(), copy.deepcopy(task.network)
    for number, expected_left in enumerate((158, 95, 57), 1):
        alive = {name: (state[name] != 0).float() for name in task.weights}
        messages, after = [], []
        for k, n in enumerate((23, 11)):
            rng = Rng(0).child(number, k)
            messages.append(client(state, images(n, seed=n), hyper, task, rng))
            after.append(plain_training(network, alive, images(n, seed=n), plan, rng))
        found = server(state, hyper, task, *messages)
        mean = {name: (23 * after[0][name] + 11 * after[1][name]) / 34 for name in after[0]}
        left = int(flat(found, task).count_nonzero())
        assert abs(left - expected_left) <= 1
        threshold = flat(mean, task).abs().sort(descending=True).values[left - 1]
        for name in task.weights:
            mean[name] = torch.where(mean[name].abs() >= threshold * (1 - 1e-6), mean[name], torch.zeros(()))
        assert found.keys() == mean.keys()
        for name in mean:
            torch.testing.assert_close(found[name], mean[name], rtol=1e-4, atol=1e-5)
        assert not flat(found, task)[flat(state, task) == 0].any(), "what was pruned stays pruned"
        state = found
        network.load_state_dict(found, strict=False)  # BatchNorm's counter is left out


def test_pruned_weights_do_not_move_at_a_client() -> None:
    task = make_task(convolutional(), Plan(epochs=2, batch=5, lr=0.1))
    state = task.initial()
    state["0.weight"].view(-1)[::2] = 0
    state["4.weight"][:, ::3] = 0
    trainable, frozen = broadcast_and_start(state, HALF, task)
    client_side.train(fedsparsify, trainable, frozen, images(23), HALF, task, Rng(0))
    pruned = flat(state, task) == 0
    u = trainable["u"].detach()
    assert int(pruned.sum()) == 36 + 66 and not u[pruned].any()
    assert int((u[~pruned] != 0).sum()) > 150
    assert torch.equal(frozen["w"], flat(state, task)), "w is frozen"


def test_without_pruning_it_is_fedavg() -> None:
    task, hyper = make_task(convolutional(), plan := Plan(epochs=3, batch=5, lr=0.05)), Hyper(keep=1.0)
    found = server(task.initial(), hyper, task, client(task.initial(), images(23), hyper, task, Rng(2)))
    expected = plain_training(task.network, {}, images(23), plan, Rng(2))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)


# Bytes


def test_messages_in_bytes() -> None:
    """264 weights and 19 other values; then two thirds of the weights are pruned, and both directions shrink."""
    task = make_task(convolutional(), Plan(epochs=1, batch=12, lr=0.1))
    state = task.initial()
    sparse = copy.deepcopy(state)
    for name in task.weights:
        sparse[name].view(-1)[torch.arange(state[name].numel()) % 3 > 0] = 0
    sizes = []
    for model, left in ((state, 264), (sparse, 88)):
        down = fedsparsify.broadcast(model, HALF, task)
        positions, values, full = container.section_sizes(down)
        assert (values, full) == (4 * left, 4 * 19) and positions <= 1 + 264 // 8
        up = client(model, images(12), HALF, task, Rng(0))
        assert container.section_sizes(up) == (4 * left, 4 * 19) and len(fedsparsify.SECTIONS) == 2
        assert len(up) - 4 * (left + 19) <= 64 and len(down) - positions - 4 * (left + 19) <= 64
        assert fedsparsify.paper_bits(up, HALF, task) == 32 * left
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


# Bad messages


def test_broadcasts_that_nobody_sends_are_refused() -> None:
    fingerprint = TASK.fingerprint("fedsparsify", HALF)
    mask, values = np.array([1, 0, 1, 1, 0, 1]), np.array([0.5, -0.25, 2, -1], "<f4")

    def made(mask: np.ndarray, values: np.ndarray, full: bytes = b"", print_: bytes = fingerprint) -> bytes:
        return container.pack("fedsparsify.down", print_, 0, [entropy.encode(mask, 2), values.tobytes(), full])

    good = made(mask, values)
    assert good == fedsparsify.broadcast(STATE, HALF, TASK)
    short = entropy.encode(mask, 2)[:-1]
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
        (made(mask, values, print_=TASK.fingerprint("fedsparsify", Hyper())), "other settings"),
        (sent(STATE, [0.0] * 6, 1, HALF, TASK), "'fedsparsify.up', expected 'fedsparsify.down'"),
        (good[:-1], "truncated"),
        *((good[:n] + bytes([good[n] ^ 1]) + good[n + 1 :], "message") for n in range(len(good))),
    ):
        with pytest.raises(PayloadError, match=complaint):
            fedsparsify.start(bad, HALF, TASK, Rng(0))


def test_uploads_that_nobody_sends_are_refused() -> None:
    fingerprint = TASK.fingerprint("fedsparsify", HALF)

    def made(values: list[float], samples: int = 3, full: bytes = b"") -> bytes:
        return container.pack("fedsparsify.up", fingerprint, samples, [np.array(values, "<f4").tobytes(), full])

    good = sent(STATE, [1, 0, 2, 3, 0, 4], 3, HALF, TASK)
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
        container.pack("fedsparsify.up", fingerprint, 3, [bytes(15), b""]),
        container.pack("fedsparsify.up", fingerprint, 3, [bytes(16)]),
        fedsparsify.broadcast(STATE, HALF, TASK),
        *(good[:n] + bytes([good[n] ^ 1]) + good[n + 1 :] for n in range(len(good))),
        *(good[:n] for n in range(len(good))),
    ]
    uploads = Uploads([*enumerate(bad), (1000, good)])
    found = fedsparsify.server(STATE, uploads, HALF, TASK)
    assert uploads.accepted == [1000] and len(uploads.refused) == len(bad)
    assert flat(found, TASK).tolist() == [0, 0, 0, 3, 0, 4]
    with pytest.raises(NoUpdate):
        server(STATE, HALF, TASK, *bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_client_sends_nothing(value: float) -> None:
    with pytest.raises(PayloadError, match="u is not finite: local training diverged"):
        sent(STATE, [1, 0, 2, value, 0, 4], 1, HALF, TASK)


def test_weights_that_overflow_are_not_sent() -> None:
    huge = {"0": torch.full((2, 2), 3e38), "1": torch.ones(1, 2)}
    trainable, frozen = broadcast_and_start(huge, HALF, TASK)
    with pytest.raises(PayloadError, match="weights: value 0 is inf"):
        fedsparsify.finish({"u": torch.full((6,), 3e38)}, frozen, 1, HALF, TASK, Rng(0))
    assert trainable["u"].tolist() == [0] * 6
