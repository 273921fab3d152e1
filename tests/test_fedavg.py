"""FedAvg against numbers worked by hand and against plain torch, which knows nothing of messages."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from toys import make_task

from fedlib.core import client as client_side
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError
from fedlib.methods import fedavg
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

CPU = torch.device("cpu")
HYPER = fedavg.Hyper()
Shard = tuple[Tensor, Tensor]


def convolutional(momentum: float = 0.1) -> nn.Sequential:  # of BatchNorm's running statistics
    torch.manual_seed(5)
    convolution = nn.Conv2d(2, 4, 3, bias=False)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def images(count: int, seed: int = 0) -> Shard:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def plain_training(network: nn.Module, shard: Shard, plan: Plan, rng: Rng) -> State:
    """What a client computes, as anybody would write it with torch alone; the batches are those of `rng`."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=plan.lr)
    order = rng.child("order").torch()
    for _ in range(plan.epochs):
        permutation = torch.randperm(len(shard[0]), generator=order)
        for start in range(0, len(permutation), plan.batch):
            index = permutation[start : start + plan.batch]
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(network(shard[0][index]), shard[1][index]))
            optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def client(state: State, shard: Shard, task: Task, rng: Rng) -> bytes:
    return client_side.client(fedavg, fedavg.broadcast(state, HYPER, task), shard, HYPER, task, rng)


def server(task: Task, *messages: bytes) -> State:
    return fedavg.server({}, Uploads(enumerate(messages)), HYPER, task)


def assert_equal_states(found: State, expected: State, rtol: float = 1.3e-6, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol)


def test_round_worked_by_hand() -> None:
    """Three weights at zero, one step, learning rate 0.3; the gradient is (softmax - one-hot) x.

    Client A: one sample x = 1 of class 0:      0.3 (2/3, -1/3, -1/3) 1 = ( 0.2, -0.1, -0.1)
    Client B: three samples x = 2 of class 1:   0.3 (-1/3, 2/3, -1/3) 2 = (-0.2,  0.4, -0.2)
    Weighted by 1 : 3:                                                    (-0.1, 0.275, -0.175)
    """
    task = make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=0.3))
    zero = {"weight": torch.zeros(3, 1)}
    a = client(zero, (torch.ones(1, 1), torch.tensor([0])), task, Rng(0))
    b = client(zero, (torch.full((3, 1), 2.0), torch.tensor([1, 1, 1])), task, Rng(1))
    for messages, expected in (
        ((a,), (0.2, -0.1, -0.1)),
        ((b,), (-0.2, 0.4, -0.2)),
        ((a, b), (-0.1, 0.275, -0.175)),
        ((a, a, a), (0.2, -0.1, -0.1)),
    ):
        assert_equal_states(server(task, *messages), {"weight": torch.tensor(expected).view(3, 1)})


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_one_step_is_one_step_of_sgd(momentum: float) -> None:
    network = convolutional(momentum)
    task = make_task(network, Plan(epochs=1, batch=12, lr=0.1))
    shard = images(12)
    found = server(task, client(task.initial(), shard, task, Rng(2)))
    plain = copy.deepcopy(network).train()
    torch.autograd.backward(nn.functional.cross_entropy(plain(shard[0]), shard[1]))
    expected = {name: p.detach() - 0.1 * p.grad for name, p in plain.named_parameters() if p.grad is not None}
    expected |= dict(plain.named_buffers())
    assert_equal_states(found, expected)
    assert all(not torch.equal(found[name], before) for name, before in task.initial().items()), "everything has moved"


def test_several_epochs_equal_a_plain_loop() -> None:
    """23 samples in batches of 5: the last batch has 3 and is kept."""
    task = make_task(convolutional(), plan := Plan(epochs=3, batch=5, lr=0.05))
    found = server(task, client(task.initial(), images(23), task, Rng(2)))
    assert_equal_states(found, plain_training(task.network, images(23), plan, Rng(2)))
    other = server(task, client(task.initial(), images(23), task, Rng(3)))
    assert not torch.equal(other["0.weight"], found["0.weight"]), "another client, another order of samples"


def test_training_leaves_the_task_as_it_was() -> None:
    task = make_task(convolutional(), Plan(epochs=2, batch=5, lr=0.1))
    before = task.initial()
    client(before, images(9), task, Rng(2))
    assert_equal_states(task.initial(), before, rtol=0, atol=0)


def test_weights_are_sample_counts() -> None:
    task = make_task(convolutional(), plan := Plan(epochs=1, batch=8, lr=0.1))
    counts = (3, 11, 26)
    messages = [client(task.initial(), images(n, seed=n), task, Rng(n)) for n in counts]
    models = [plain_training(task.network, images(n, seed=n), plan, Rng(n)) for n in counts]
    expected = {name: sum(n / 40 * model[name] for n, model in zip(counts, models, strict=True)) for name in models[0]}
    assert_equal_states(server(task, *messages), {name: torch.as_tensor(mean) for name, mean in expected.items()})


def test_order_of_clients_changes_rounding_only() -> None:
    task = make_task(convolutional(), Plan(epochs=1, batch=8, lr=0.1))
    messages = [client(task.initial(), images(n, seed=n), task, Rng(n)) for n in (3, 11, 26, 7)]
    assert_equal_states(server(task, *messages), server(task, *messages[::-1]), rtol=1e-7, atol=1e-8)


def test_message_carries_every_tensor_and_little_else() -> None:
    task = make_task(convolutional(), Plan(epochs=1, batch=8, lr=0.1))
    values = 2 * 4 * 9 + 4 * 4 + (64 * 3 + 3)  # convolution, BatchNorm with statistics, classifier
    down = fedavg.broadcast(task.initial(), HYPER, task)
    up = client(task.initial(), images(9), task, Rng(0))
    for message in (down, up):
        assert container.section_sizes(message) == (4 * values,)
        assert 0 < len(message) - 4 * values <= 64
    assert fedavg.paper_bits(up, HYPER, task) == 32 * values


def test_unusable_uploads_are_left_out_and_named() -> None:
    task = make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=0.3))
    shard = (torch.ones(1, 1), torch.tensor([0]))
    good = client({"weight": torch.zeros(3, 1)}, shard, task, Rng(0))
    altered = good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]
    other = make_task(nn.Linear(2, 3, bias=False), task.plan)
    foreign = client({"weight": torch.zeros(3, 2)}, (torch.ones(1, 2), shard[1]), other, Rng(0))
    uploads = Uploads([(4, altered), (7, good), (2, good[:-1]), (9, foreign), (1, PayloadError("diverged"))])
    assert_equal_states(fedavg.server({}, uploads, HYPER, task), server(task, good))
    assert uploads.accepted == [7] and [number for number, _ in uploads.refused] == [4, 2, 9, 1]
    with pytest.raises(NoUpdate):
        server(task, altered)


def test_diverged_client_sends_nothing() -> None:
    task = make_task(nn.Linear(1, 3, bias=False), Plan(epochs=1, batch=4, lr=1e30))
    with pytest.raises(PayloadError, match="weight"):
        client({"weight": torch.zeros(3, 1)}, (torch.full((1, 1), 1e30), torch.tensor([0])), task, Rng(0))


def test_evaluation_uses_the_running_statistics() -> None:
    task = make_task(convolutional(), Plan(epochs=1, batch=12, lr=0.1))
    state = server(task, client(task.initial(), images(12), task, Rng(2)))
    x, y = images(40, seed=1)
    task = dataclasses.replace(task, test=(x, y))
    assert client_side.chunks(task) == range(1)
    correct, loss, count = client_side.evaluate(task, state, 0)
    assert count == 40
    plain = convolutional().eval()
    plain.load_state_dict(state)
    logits = plain(x).detach()
    assert correct == int((logits.argmax(1) == y).sum()) and 0 < correct < 40
    assert loss == pytest.approx(40 * float(nn.functional.cross_entropy(logits, y)), rel=1e-5)


SPEC = """
{paper: fedmrn, profile: smoke, name: n, group: g, label: l, split: s, method: fedavg, hyper: {}, data: digits,
 model: mlp, partition: {kind: dirichlet, beta: 0.5, seed: 1}, clients: 8, cohort: 3, rounds: 2, epochs: 2, batch: 32,
 lr: 0.1, evaluate_every: 1, seed: 4}
"""


def test_whole_run_equals_a_plain_loop(tmp_path: Path) -> None:
    """Two rounds through spec, engine and record; the plain loop shares the partition, the cohorts and the batches."""
    spec = Spec.from_dict(yaml.safe_load(SPEC))
    record = rounds.run(spec, InProcess(CPU), root=tmp_path)

    task = Task.of(spec, CPU)
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
