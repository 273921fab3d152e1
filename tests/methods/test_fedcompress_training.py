"""FedCompress: a client's two phases, in all engines. Numbers are the properties of its specification, section 8.2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fedcompress_toys import CPU, begun
from known_answers import CASES, TINY

from fedlib.core import client
from fedlib.core.method import Phase
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.errors import SpecError
from fedlib.methods.fedcompress import clustering
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")


def test_04_one_clustered_step_by_hand() -> None:
    """SGD: latent weights and centroids move against the gradient at the clustered kernel, centroids by its sums."""
    run = begun({"clustered_lr": 0.5}, optimizer="sgd", batch=1000)
    member, (_, phase) = run.begin(), run.method.phases()
    trainable = member.local.trainable
    assert (phase.plan.lr, phase.plan.epochs) == (0.5, 1)
    trainable["conv.weight"] = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    client.enter(member, 1, phase)
    before = {name: tensor.detach().clone() for name, tensor in (trainable | member.local.frozen).items()}
    mu = clustering.centroids(before)["conv.weight"]
    nearest = (before["conv.weight"].flatten()[:, None] - mu).abs().argmin(1)
    shown = {name: before[name].clone().requires_grad_() for name in run.task.weights | run.task.vectors}
    shown["conv.weight"] = mu[nearest].view(6, 1, 3, 3).requires_grad_()
    mixed = before["mixed.weight"]  # broadcast with four values, which are the centroids
    loss = run.task.loss(shown | {name: before[name].clone() for name in run.task.statistics}, member.shard)
    gradient, of_mixed = torch.autograd.grad(loss, [shown["conv.weight"], shown["mixed.weight"]])
    client.train(run.method, phase, [member])
    torch.testing.assert_close(trainable["conv.weight"].detach(), before["conv.weight"] - 0.5 * gradient)
    torch.testing.assert_close(trainable["mixed.weight"].detach(), mixed - 0.5 * of_mixed)
    summed = torch.stack([gradient.flatten()[nearest == j].sum() for j in range(4)])
    torch.testing.assert_close(clustering.centroids(trainable)["conv.weight"].detach(), mu - 0.5 * summed)


def test_decay_is_of_weights_alone_and_not_halved() -> None:
    run, plain = begun({"decay": 0.25, "variant": "none"}), begun({"variant": "none"})
    local, batch = run.begin().local, run.task.shard(0)
    more, less = (r.method.loss(local.trainable, dict(local.frozen), batch, None) for r in (run, plain))
    squares = sum(float(local.trainable[name].detach().square().sum()) for name in run.task.weights)
    assert float((more - less).detach()) == pytest.approx(0.25 * squares, rel=1e-5)


def test_13_without_pull_the_papers_form_is_plain_training_and_a_strong_pull_collapses() -> None:
    none = begun({"variant": "paper", "beta": 0.0})
    trainable = none.trained().trainable
    plain = none.trained([Phase(phase.plan) for phase in none.method.phases()]).trainable
    assert all(torch.equal(trainable[name], plain[name]) for name in plain)

    def spread(beta: float) -> float:
        own = begun({"variant": "paper", "beta": beta, "clustered_epochs": 60}).trained().trainable
        return sum(float(clustering.pull(own[n].detach(), mu.detach())) for n, mu in clustering.centroids(own).items())

    assert spread(1e4) < 1e-3 * spread(0.0)


def test_fedavg_is_what_is_left_without_clusters() -> None:
    """The same models as fedavg's, round for round, to the last bit."""
    run, plain = begun({"variant": "none"}, epochs=2), begun(method="fedavg", epochs=2)
    state, other = plain.state, run.state
    for number in (1, 2):
        state, other = plain.round(state, number)[0], run.round(other, number)[0]
    assert all(torch.equal(state.model[name], other.model[name]) for name in run.task.tensors)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("kind", [Stacked, Graphed])
def test_engines_agree(kind: Any, variant: str) -> None:
    """Both phases. A weight that lies between two centroids may fall on either side: models are near, not equal."""
    run = begun({"variant": variant, "self_compression": False}, lr=1e-3)
    before, one, other = (state.model for state in (run.state, run.round()[0], run.round(engine=kind(CPU))[0]))
    for name in run.task.weights | run.task.vectors:
        moved = float((one[name] - before[name]).norm())
        assert kind is Stacked or torch.equal(one[name], other[name]), name
        assert float((one[name] - other[name]).norm()) < 0.05 * moved + 1e-7, name


def test_two_phases_keep_no_moments() -> None:
    with pytest.raises(SpecError, match="persistent: True cannot go with two stages"):
        begun(persistent=True)


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    """And is afterwards what it was."""
    spec, found = Spec.from_dict(TINY | CASES["fedcompress"] | {"rounds": 1}), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(record.stable(rounds.run(spec, InProcess(CPU), root=tmp_path)))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]
