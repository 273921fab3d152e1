"""FedAvg against numbers worked by hand and against plain torch, which knows nothing of messages."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from jobs import MakeSpec
from small_task import (
    CPU,
    HUGE,
    ONE,
    THREE,
    ZERO,
    convolutional,
    images,
    line_task,
    make_task,
    plain_training,
    served,
    state_of,
    uploaded,
)
from torch import nn

from fedlib.core import client
from fedlib.core.plan import Plan, Tensors
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError
from fedlib.methods.fedavg import FedAvg
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")


def of(network: nn.Module, plan: Plan) -> FedAvg:
    return FedAvg().bind(make_task(network, plan))


def assert_equal(found: Tensors, expected: Tensors, rtol: float = 1.3e-6, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol)


def test_round_worked_by_hand() -> None:
    """Three weights at zero, one step, learning rate 0.3; the gradient is (softmax - one-hot) x.

    Client A: one sample x = 1 of class 0:      0.3 (2/3, -1/3, -1/3) 1 = ( 0.2, -0.1, -0.1)
    Client B: three samples x = 2 of class 1:   0.3 (-1/3, 2/3, -1/3) 2 = (-0.2,  0.4, -0.2)
    Weighted by 1 : 3:                                                    (-0.1, 0.275, -0.175)
    """
    method = FedAvg().bind(line_task())
    a, b = (uploaded(method, shard, Rng(k), ZERO) for k, shard in enumerate((ONE, THREE)))
    for messages, expected in (
        ((a,), (0.2, -0.1, -0.1)),
        ((b,), (-0.2, 0.4, -0.2)),
        ((a, b), (-0.1, 0.275, -0.175)),
        ((a, a, a), (0.2, -0.1, -0.1)),
    ):
        assert_equal(served(method, *messages), {"weight": torch.tensor(expected).view(3, 1)})


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_one_step_is_one_step_of_sgd(momentum: float) -> None:
    method = of(network := convolutional(momentum), Plan(epochs=1, batch=12, lr=0.1))
    shard = images(12)
    found = served(method, uploaded(method, shard, Rng(2)))
    plain = copy.deepcopy(network).train()
    torch.autograd.backward(nn.functional.cross_entropy(plain(shard[0]), shard[1]))
    expected = {name: p.detach() - 0.1 * p.grad for name, p in plain.named_parameters() if p.grad is not None}
    expected |= dict(plain.named_buffers())
    assert_equal(found, expected)
    before = method.task.initial()
    assert all(not torch.equal(found[name], before[name]) for name in before), "everything has moved"


def test_several_epochs_equal_a_plain_loop() -> None:
    """23 samples in batches of 5: the last batch has 3 and is kept."""
    method = of(network := convolutional(), plan := Plan(epochs=3, batch=5, lr=0.05))
    found = served(method, uploaded(method, images(23), Rng(2)))
    assert_equal(found, plain_training(network, images(23), plan, Rng(2)))
    other = served(method, uploaded(method, images(23), Rng(3)))
    assert not torch.equal(other["0.weight"], found["0.weight"]), "another client, another order of samples"


def test_training_leaves_the_task_as_it_was() -> None:
    method = of(convolutional(), Plan(epochs=2, batch=5, lr=0.1))
    before = method.task.initial()
    uploaded(method, images(9), Rng(2), before)
    assert_equal(method.task.initial(), before, rtol=0, atol=0)


def test_weights_are_sample_counts() -> None:
    method = of(network := convolutional(), plan := Plan(epochs=1, batch=8, lr=0.1))
    counts = (3, 11, 26)
    messages = [uploaded(method, images(n, seed=n), Rng(n)) for n in counts]
    models = [plain_training(network, images(n, seed=n), plan, Rng(n)) for n in counts]
    expected = {name: sum(n / 40 * model[name] for n, model in zip(counts, models, strict=True)) for name in models[0]}
    assert_equal(served(method, *messages), {name: torch.as_tensor(mean) for name, mean in expected.items()})


def test_order_of_clients_changes_rounding_only() -> None:
    method = of(convolutional(), Plan(epochs=1, batch=8, lr=0.1))
    messages = [uploaded(method, images(n, seed=n), Rng(n)) for n in (3, 11, 26, 7)]
    assert_equal(served(method, *messages), served(method, *messages[::-1]), rtol=1e-7, atol=1e-8)


def test_message_carries_every_tensor_and_little_else() -> None:
    method = of(convolutional(), Plan(epochs=1, batch=8, lr=0.1))
    values = 2 * 4 * 9 + 4 * 4 + (64 * 3 + 3)  # convolution, BatchNorm with statistics, classifier
    down = method.broadcast(state_of(method))
    up = uploaded(method, images(9), Rng(0))
    for message in (down, up):
        assert container.section_sizes(message) == (4 * values,)
        assert 0 < len(message) - 4 * values <= 64
    assert method.sizes(up).paper == 32 * values


def test_unusable_uploads_are_left_out_and_named() -> None:
    """The round goes on without them; the suite of malformed messages has many more."""
    method = FedAvg().bind(line_task())
    good = uploaded(method, ONE, Rng(0), ZERO)
    altered = good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]
    uploads = Uploads([(4, altered), (7, good), (2, good[:-1]), (1, PayloadError("diverged"))])
    assert_equal(method.aggregate(state_of(method), uploads).model, served(method, good))
    assert uploads.accepted == [7] and [number for number, _ in uploads.refused] == [4, 2, 1]
    with pytest.raises(NoUpdate):
        served(method, altered)


def test_diverged_client_sends_nothing() -> None:
    with pytest.raises(PayloadError, match="weight"):
        uploaded(FedAvg().bind(line_task(lr=1e30)), HUGE, Rng(0), ZERO)


def test_evaluation_uses_the_running_statistics() -> None:
    method = of(convolutional(), Plan(epochs=1, batch=12, lr=0.1))
    model = served(method, uploaded(method, images(12), Rng(2)))
    x, y = images(40, seed=1)
    task = dataclasses.replace(method.task, test=(x, y))
    assert client.chunks(task) == range(1)
    (correct, loss), count = client.evaluate(task, model, 0)
    assert count == 40
    plain = convolutional().eval()
    plain.load_state_dict(model)
    logits = plain(x).detach()
    assert correct == int((logits.argmax(1) == y).sum()) and 0 < correct < 40
    assert loss == pytest.approx(40 * float(nn.functional.cross_entropy(logits, y)), rel=1e-5)


def test_whole_run_equals_a_plain_loop(tiny: MakeSpec, tmp_path: Path) -> None:
    """Two rounds through spec, engine and record; the plain loop shares the partition, the cohorts and the batches."""
    skewed = {"kind": "dirichlet", "beta": 0.5, "seed": 1}
    spec = tiny(partition=skewed, clients=8, cohort=3, rounds=2, epochs=2, evaluate_every=1, seed=4)
    record = rounds.run(spec, InProcess(CPU), root=tmp_path)

    task = build.task(spec, CPU)
    network = copy.deepcopy(task.network)
    for number, entry in enumerate(record["rounds"], 1):
        cohort = rounds.draw_cohort(spec, task, number)
        assert entry["clients"] == cohort and len(set(cohort)) == 3
        shards = [task.shard(k) for k in cohort]
        rngs = [Rng(4).child("client", number, k) for k in cohort]
        models = [plain_training(network, shard, task.plan, rng) for shard, rng in zip(shards, rngs, strict=True)]
        share = torch.tensor([len(shard[0]) for shard in shards]) / sum(len(shard[0]) for shard in shards)
        mean = {name: sum(s * model[name] for s, model in zip(share, models, strict=True)) for name in models[0]}
        network.load_state_dict(mean)
        with torch.no_grad():
            logits = network.eval()(task.test[0])
        assert entry["accuracy"] == float((logits.argmax(1) == task.test[1]).double().mean())
        assert entry["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, task.test[1])), rel=1e-4)
    assert record["final"]["uplink_parts"]["model"] == 2 * 3 * 4 * 4736
