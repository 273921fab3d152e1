"""FedSparsify against a plain loop with masked gradients, and the bytes of its messages."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from fedsparsify_toys import broadcast, convolutional, flat, images, served, trained, uploaded
from torch import nn

from fedlib.core.plan import Plan, Samples, Tensors
from fedlib.engines.in_process import InProcess
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container


def plain_training(network: nn.Module, alive: Tensors, shard: Samples, plan: Plan, rng: Rng) -> Tensors:
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
    method = convolutional(plan := Plan(epochs=2, batch=5, lr=0.05), keep=0.6)
    task = method.task
    model, network = task.initial(), copy.deepcopy(task.network)
    for number, expected_left in enumerate((158, 95, 57), 1):
        alive = {name: (model[name] != 0).float() for name in task.weights}
        messages, after = [], []
        for k, n in enumerate((23, 11)):
            rng = Rng(0).child(number, k)
            messages.append(uploaded(method, model, images(n, seed=n), rng))
            after.append(plain_training(network, alive, images(n, seed=n), plan, rng))
        found = served(method, model, *messages)
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
    local = trained(method, model, images(23), Rng(0))
    pruned, u = flat(model, method.task) == 0, local.trainable["u"].detach()
    assert int(pruned.sum()) == 36 + 66 and not u[pruned].any()
    assert int((u[~pruned] != 0).sum()) > 150
    assert torch.equal(local.frozen["w"], flat(model, method.task)), "w is frozen"


def test_without_pruning_it_is_fedavg() -> None:
    method = convolutional(plan := Plan(epochs=3, batch=5, lr=0.05), keep=1.0)
    model = method.task.initial()
    found = served(method, model, uploaded(method, model, images(23), Rng(2)))
    expected = plain_training(method.task.network, {}, images(23), plan, Rng(2))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)


def test_messages_in_bytes() -> None:
    """264 weights and 19 other values; then two thirds of the weights are pruned, and both directions shrink."""
    method = convolutional(Plan(epochs=1, batch=12, lr=0.1), keep=0.5, density=0.1)
    full = method.task.initial()
    sparse = copy.deepcopy(full)
    for name in method.task.weights:
        sparse[name].view(-1)[torch.arange(full[name].numel()) % 3 > 0] = 0
    sizes = []
    for model, left in ((full, 264), (sparse, 88)):
        down, up = broadcast(method, model), uploaded(method, model, images(12), Rng(0))
        positions, values, others = container.section_sizes(down)
        assert (values, others) == (4 * left, 4 * 19) and positions <= 1 + 264 // 8
        assert container.section_sizes(up) == (4 * left, 4 * 19) and len(method.sections) == 2
        assert len(up) - 4 * (left + 19) <= 64 and len(down) - positions - 4 * (left + 19) <= 64
        assert method.sizes(up).paper == 32 * left
        sizes.append((len(down), len(up)))
    assert sizes[1] < sizes[0] and sizes[0][1] - sizes[1][1] == 4 * (264 - 88)


def test_both_directions_shrink_in_a_run(tiny: Callable[..., Spec], tmp_path: Path) -> None:
    spec = tiny(method="fedsparsify", hyper={"keep": 0.5, "density": 0.1}, rounds=5, cohort=3)
    found = rounds.run(spec, InProcess(torch.device("cpu")), root=tmp_path)["rounds"]
    left = [4736, 2368, 1184, 592, 474]
    for entry, count in zip(found, left, strict=True):
        assert abs(entry["paper_bits"] / 3 - 32 * count) <= 32
        assert 0 <= entry["uplink_bytes"] / 3 - entry["paper_bits"] / 3 / 8 <= 64
        assert 4 * count <= entry["downlink_bytes"] / 3 + 4 <= 4 * count + 4736 / 8 + 80
    down = [entry["downlink_bytes"] for entry in found]
    assert down == sorted(down, reverse=True) and down[-1] < 0.2 * down[0]
