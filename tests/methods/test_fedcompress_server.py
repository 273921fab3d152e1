"""FedCompress at the server: the average, the rule in whole rounds, self-compression by distillation.

Numbers are the properties of its specification, section 8.2.
"""

from typing import Any

import numpy as np
import pytest
import torch
from fedcompress_toys import ENGINE, KERNELS, begun, distinct
from torch import nn

from fedlib.core import optimizers
from fedlib.core.plan import Tensors
from fedlib.core.uploads import Uploads
from fedlib.errors import RunError
from fedlib.methods.fedcompress import adaptive_clusters, distillation
from fedlib.methods.fedcompress.method import SEEDS
from fedlib.rng import Rng

pytestmark = pytest.mark.usefixtures("one_thread")


def test_10_identical_models_average_to_themselves_in_any_order() -> None:
    run = begun({"self_compression": False})
    one, other = run.upload(0), run.upload(1)

    def served(*messages: bytes) -> Tensors:
        model: Tensors = run.method.aggregate(run.state, Uploads(enumerate(messages))).model
        return model

    model, _ = run.method.read(one)
    assert all(torch.equal(served(one, one)[name], model[name]) for name in run.task.tensors)
    ab, ba = served(one, other), served(other, one)
    for name in run.task.tensors:
        torch.testing.assert_close(ab[name], ba[name], rtol=1e-6, atol=1e-7)
    assert distinct(ab["conv.weight"]) > 4, "the average is not clustered"


def test_a_server_round_is_average_then_rule_then_compression() -> None:
    run = begun(cohort=3, partition={"kind": "dirichlet", "beta": 0.3, "seed": 7})
    uploads = [run.upload(client) for client in range(3)]
    state = run.method.aggregate(run.state, Uploads(enumerate(uploads)))
    found = [run.method.read(each) for each in uploads]
    total = sum(samples for _, samples in found)
    average = {n: torch.stack([t[n].double() * s for t, s in found]).sum(0) / total for n in run.task.tensors}
    gram = torch.stack([t["gram"] for t, _ in found]).sum(0)
    right, held = (sum(int(t[key]) for t, _ in found) for key in ("right", "held"))
    assert state.own.accuracies == (pytest.approx(right / held),)
    assert state.own.scores == (pytest.approx(adaptive_clusters.effective_rank(gram)),)
    assert state.own.clusters == (4, 4)
    plain = {n: average[n].float() for n in run.task.tensors}
    expected, losses = distillation.distil(plain, KERNELS, 4, run.method, run.task, SEEDS, 2)
    assert all(torch.equal(state.model[n], expected[n]) for n in run.task.tensors)
    assert state.own.losses == pytest.approx(losses)


def test_clusters_grow_in_whole_rounds_as_the_rule_says() -> None:
    run = begun({"limit": 1.0, "window": 2})
    state, lines = run.state, []
    for number in range(1, 6):
        state, line = run.round(state, number)
        lines.append(line["notes"])
        now = state.own.clusters[-1]
        assert max(distinct(state.model[name]) for name in KERNELS) == now, "the new number, at once"
        local = run.method.begin(run.method.broadcast(state), run.task.shard(0), Rng(0))
        assert int(local.frozen["clusters"]) == now
    own, expected = state.own, [4]
    for r in range(1, 6):
        expected.append(run.method.following(own.accuracies[:r], own.scores[:r], expected))
    assert list(own.clusters) == expected and expected[-1] > 4
    assert [line["clusters"] for line in lines] == expected[:-1]
    assert all(distinct(state.model[name]) <= expected[-1] for name in KERNELS)


def test_the_average_is_compared_only_when_asked() -> None:
    run = begun({"compare_every": 2})
    state, first = run.round()
    _, second = run.round(state, 2)
    assert "before" not in first["notes"] and 0 <= second["notes"]["before"] <= 1
    accuracy, _ = ENGINE.evaluate(run.job, state.own.average)
    assert adaptive_clusters.see(run.task, state.own.average, run.task.test)[0] / len(
        run.task.test[1]
    ) == pytest.approx(accuracy)


# Self-compression


@pytest.mark.parametrize("norms", ["train", "frozen", "recalibrate"])
def test_09_distillation_teaches_and_leaves_the_teacher(norms: str) -> None:
    run = begun({"norms": norms, "distil_epochs": 12, "images": 256, "distil_lr": 3e-3})
    teacher = run.task.initial()
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    found, losses = distillation.distil(teacher, KERNELS, 4, run.method, run.task, Rng(0))
    assert all(torch.equal(teacher[name], before[name]) for name in before)
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert all(distinct(found[name]) <= 4 for name in KERNELS)
    same = all(torch.equal(found[name], teacher[name]) for name in run.task.statistics)
    assert same == (norms == "frozen")
    assert not any(torch.equal(found[name], teacher[name]) for name in ("norm.weight", "norm.bias", "head.weight"))
    again, _ = distillation.distil(teacher, KERNELS, 4, run.method, run.task, Rng(0))
    assert all(torch.equal(found[name], again[name]) for name in found), "a function of its arguments"


def test_09_with_a_centroid_for_every_value_there_is_nothing_to_learn() -> None:
    run = begun({"norms": "frozen", "distil_epochs": 1, "images": 32})
    draws = {
        name: torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1)) for name, shape in KERNELS.items()
    }
    teacher = run.task.initial() | {name: tensor.float() - 1.5 for name, tensor in draws.items()}
    _, losses = distillation.distil(teacher, KERNELS, 4, run.method, run.task, Rng(0))
    assert losses == [pytest.approx(0, abs=1e-6)]


def test_recalibrated_statistics_are_means_over_batches() -> None:
    """Of the first BatchNorm, whose input no BatchNorm has seen: the convolution's output."""
    run = begun()
    model = run.task.initial()
    images = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        batches = [nn.functional.conv2d(x, model["conv.weight"], padding=1) for x in images.split(32)]
    distillation.recalibrate(model, images, 32, run.task)
    mean = torch.stack([z.mean((0, 2, 3)) for z in batches]).mean(0)
    var = torch.stack([z.var((0, 2, 3)) for z in batches]).mean(0)
    torch.testing.assert_close(model["norm.running_mean"], mean)
    torch.testing.assert_close(model["norm.running_var"], var)
    layer = run.task.network.get_submodule("norm")
    assert isinstance(layer, nn.BatchNorm2d) and layer.momentum == 0.1


def test_a_last_batch_that_is_not_full_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 images in batches of 32, in one epoch: two steps, which the moments of Adam have counted."""
    run = begun({"images": 70, "distil_epochs": 1})
    counted, step = [], optimizers.step

    def counting(*given: Any) -> None:
        counted.append(1)
        step(*given)

    monkeypatch.setattr(optimizers, "step", counting)
    distillation.distil(run.task.initial(), KERNELS, 4, run.method, run.task, Rng(0))
    assert len(counted) == 2


def test_the_servers_divergence_is_not_the_clients() -> None:
    with pytest.raises(RunError, match=r"self-compression diverged: lower hyper.distil_lr"):
        begun({"distil_lr": 1e12, "distil_epochs": 40})


def test_images_are_as_bright_as_the_tasks() -> None:
    run = begun({"images": 512})
    own, made = run.task.train[0][:1000], distillation.foreign_images(run.task, run.method, Rng(0))
    assert float(made.mean()) == pytest.approx(float(own.mean()), abs=1e-4)
    assert float(made.std()) == pytest.approx(float(own.std()), rel=1e-2)


def test_divergence_by_hand() -> None:
    p, logits = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert float(distillation.divergence(p, logits, 2.0)) == pytest.approx(0.5 * np.log(2), rel=1e-5)
    torch.manual_seed(0)
    p, logits = torch.randn(7, 5).softmax(1), torch.randn(7, 5)
    oracle = nn.functional.kl_div((logits / 2).log_softmax(1), p, reduction="batchmean")
    torch.testing.assert_close(distillation.divergence(p, logits, 2.0), oracle)


def test_clients_own_images_may_stand_in() -> None:
    run = begun({"foreign": "clients"})
    assert torch.equal(distillation.foreign_images(run.task, run.method, Rng(0)), run.task.train[0][:64])
