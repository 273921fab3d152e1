"""FedCompress and FedZip: messages, client clustering, score and rule in whole rounds, self-compression.

Numbers are the properties of its specification, section 8.2; clusters, codebooks, and score and rule have files of
their own (2, 4, 5, 6, 7, 8, 12).
"""

import dataclasses
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlib.core import optimizers
from fedlib.core.client import run_client, staged, train
from fedlib.core.plan import State, count
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, task_of
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.methods import registry
from fedlib.methods.baselines import fedzip
from fedlib.methods.fedcompress import adaptive_clusters, augmentation, clustering, distillation
from fedlib.methods.fedcompress import method as fedcompress
from fedlib.methods.fedcompress.messages import METERS, Form
from fedlib.methods.fedcompress.method import Hyper
from fedlib.models.initializers import initialise
from fedlib.models.registry import MODELS, build
from fedlib.rng import Rng
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import codebook, container, entropy

CPU = torch.device("cpu")
ENGINE = InProcess(CPU)
Begin = Callable[..., Any]
MakeSpec = Callable[..., Spec]
QUICK: dict[str, Any] = dict(
    augment="none",
    clustered_epochs=1,
    clustered_lr=5e-3,
    images=64,
    distil_batch=32,
    distil_epochs=2,
    distil_lr=1e-3,
    least=4,
    most=6,
    patience=1,
    first=1,
    decay=0.0,
)
KERNELS = {"conv.weight": (6, 1, 3, 3), "mixed.weight": (8, 6, 1, 1)}


def small(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """A convolution, a depthwise one and a pointwise one with BatchNorm, the mean over places, and a head."""
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(channels, 6, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(6),
        relu=nn.ReLU(),
        depth=nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        mixed=nn.Conv2d(6, 8, 1, bias=False),
        relu2=nn.ReLU(),
        mean=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(8, classes),
    )
    return initialise(nn.Sequential(layers), "he", root)


@pytest.fixture(scope="module", autouse=True)
def small_world() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", small)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture
def begin(tiny: MakeSpec) -> Begin:
    def begun(more_hyper: dict[str, Any] | None = None, method: str = "fedcompress", **more: Any) -> SimpleNamespace:
        quick = QUICK if method == "fedcompress" else {"decay": 0.0, "augment": "none"}
        fields = {"method": method, "model": "small", "optimizer": "adam", "lr": 0.01, "held_out": 0.1}
        spec = tiny(**{**fields, "hyper": quick | (more_hyper or {}), **more})
        task = task_of(spec.key(), CPU)
        module, hyper = registry.METHODS[method], registry.hyper(method, spec.hyper)
        state = registry.initial(spec, task)
        return SimpleNamespace(
            spec=spec, task=task, hyper=hyper, state=state, message=module.broadcast(state, hyper, task), module=module
        )

    return begun


def coded(run: Any) -> Any:
    return fedcompress.kernels(run.hyper, run.task)


def distinct(tensor: Tensor) -> int:
    return len(np.unique(tensor.detach().numpy()))


def trained(run: Any, client: int = 0) -> tuple[State, State]:
    """A client's tensors after both stages."""
    rng = Rng(1)
    trainable, frozen = run.module.start(run.message, run.hyper, run.task, rng)
    for number, stage in enumerate(registry.stages(run.module, run.hyper, run.task)):
        registry.enter(run.module, number, trainable, frozen, run.hyper, stage, rng)
        train(run.module, trainable, frozen, run.task.shard(client), run.hyper, stage, staged(rng, number))
    return trainable, frozen


def upload(run: Any, client: int = 0) -> bytes:
    made = run_client(run.spec, run.task, run.message, 1, client)
    assert isinstance(made, bytes), made
    return made


# What is clustered, and what travels


def test_kernels_over_all_channels_are_clustered(begin: Begin) -> None:
    run = begin()
    found = fedcompress.kernels(run.hyper, run.task)
    assert {name: tuple(shape) for name, shape in found.items()} == KERNELS, "neither depthwise ones nor the head"
    assert fedcompress.kernels(Hyper(most=50, least=8), run.task).keys() == {"conv.weight"}, (
        "more weights than clusters"
    )
    assert fedcompress.kernels(Hyper(variant="none"), run.task) == {}


def test_01_few_values_and_all_else_untouched(begin: Begin) -> None:
    run = begin()
    trainable, frozen = trained(run)
    made = run.module.finish(trainable, frozen, 5, run.hyper, run.task, Rng(0))
    model, report, samples = Form.of("fedcompress.up", coded(run), run.hyper, run.task).unpack(made)
    assert samples == 5 and not len(report)
    for name, tensor in model.items():
        if name in KERNELS:
            assert distinct(tensor) <= 4 < distinct(trainable[name])
            mu = clustering.centroids(trainable)[name].detach()
            assert set(tensor.unique().tolist()) <= set(mu.tolist())
        else:
            assert torch.equal(tensor, (trainable | frozen)[name].detach())


@pytest.mark.parametrize("self_compression", [True, False])
def test_02_a_broadcast_is_read_as_it_was_written(begin: Begin, self_compression: bool) -> None:
    run = begin({"self_compression": self_compression})
    trainable, frozen = run.module.start(run.message, run.hyper, run.task, Rng(0))
    (model,) = registry.models(run.spec, run.task, run.state, 1)
    for name in run.task.tensors:
        assert torch.equal((trainable | frozen)[name], model[name])
    assert int(frozen["clusters"]) == 4
    assert all((distinct(model[name]) <= 4) == self_compression for name in KERNELS)


def test_03_meters_are_lengths(begin: Begin) -> None:
    """Our bytes are those of the messages; the others by hand from the tensors that are read."""
    run = begin(cohort=3)
    state, line = rounds.one_round(run.spec, run.task, ENGINE, run.state, 1, {})
    assert line["downlink_bytes"] == 3 * len(run.message)
    assert line["uplink_bytes"] == sum(len(upload(run, client)) for client in line["clients"])
    assert run.state["bits"].tolist()[0] == 8 * len(run.message)
    assert line["notes"]["sent_bits"] == dict(zip(METERS, run.state["bits"].tolist(), strict=True))
    assert line["notes"]["model_bits"]["ours"] == 8 * len(run.module.broadcast(state, run.hyper, run.task))
    made = upload(run)
    model, samples = fedcompress.read_upload(made, run.hyper, run.task)
    file = b"".join(model[name].numpy().tobytes() for name in run.task.tensors)
    parts = container.section_sizes(made)
    assert fedcompress.paper_bits(made, run.hyper, run.task) == 8 * (len(zlib.compress(file, 6)) + parts[3])
    fixed = 8 * (parts[2] + parts[3])
    for name in KERNELS:
        book, n = distinct(model[name]), model[name].numel()
        fixed += 32 * book + 8 * -(-n * (book - 1).bit_length() // 8)
    assert fedcompress.other_bits(made, run.hyper, run.task) == {"fixed": fixed}
    assert samples == len(run.task.indices(0))


# Local training


def test_04_one_clustered_step_by_hand(begin: Begin) -> None:
    """SGD: latent weights and centroids move against the gradient at the clustered kernel, centroids by its sums."""
    run = begin({"clustered_lr": 0.5}, optimizer="sgd", batch=1000)
    rng, shard = Rng(1), run.task.shard(0)
    trainable, frozen = run.module.start(run.message, run.hyper, run.task, rng)
    stage = registry.stages(run.module, run.hyper, run.task)[1]
    assert (stage.plan.lr, stage.plan.epochs) == (0.5, 1)
    trainable["conv.weight"] = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    registry.enter(run.module, 1, trainable, frozen, run.hyper, stage, rng)
    before = {name: tensor.detach().clone() for name, tensor in (trainable | frozen).items()}
    mu = clustering.centroids(before)["conv.weight"]
    nearest = (before["conv.weight"].flatten()[:, None] - mu).abs().argmin(1)
    shown = {name: before[name].clone().requires_grad_() for name in run.task.weights | run.task.vectors}
    shown["conv.weight"] = mu[nearest].view(6, 1, 3, 3).requires_grad_()
    mixed = before["mixed.weight"]  # broadcast with four values, which are the centroids
    loss = run.task.loss(shown | {name: before[name].clone() for name in run.task.statistics}, shard)
    gradient, of_mixed = torch.autograd.grad(loss, [shown["conv.weight"], shown["mixed.weight"]])
    train(run.module, trainable, frozen, shard, run.hyper, stage, rng)
    torch.testing.assert_close(trainable["conv.weight"].detach(), before["conv.weight"] - 0.5 * gradient)
    torch.testing.assert_close(trainable["mixed.weight"].detach(), mixed - 0.5 * of_mixed)
    summed = torch.stack([gradient.flatten()[nearest == j].sum() for j in range(4)])
    torch.testing.assert_close(clustering.centroids(trainable)["conv.weight"].detach(), mu - 0.5 * summed)


def test_decay_is_of_weights_alone_and_not_halved(begin: Begin) -> None:
    run, plain = begin({"decay": 0.25, "variant": "none"}), begin({"variant": "none"})
    trainable, frozen = run.module.start(run.message, run.hyper, run.task, Rng(0))
    batch = run.task.shard(0)
    more = run.module.objective(trainable, dict(frozen), batch, None, run.hyper, run.task)
    less = run.module.objective(trainable, dict(frozen), batch, None, plain.hyper, run.task)
    squares = sum(float(trainable[name].detach().square().sum()) for name in run.task.weights)
    assert float((more - less).detach()) == pytest.approx(0.25 * squares, rel=1e-5)


def test_13_without_pull_the_papers_form_is_plain_training_and_a_strong_pull_collapses(begin: Begin) -> None:
    none = begin({"variant": "paper", "beta": 0.0})
    trainable, _ = trained(none)
    plain, held = none.module.start(none.message, none.hyper, none.task, Rng(1))
    for number, stage in enumerate(registry.stages(none.module, none.hyper, none.task)):
        train(none.module, plain, held, none.task.shard(0), none.hyper, stage, staged(Rng(1), number))
    assert all(torch.equal(trainable[name], plain[name]) for name in plain)

    def spread(beta: float) -> float:
        run = begin({"variant": "paper", "beta": beta, "clustered_epochs": 60})
        own, _ = trained(run)
        return sum(float(clustering.pull(own[n].detach(), mu.detach())) for n, mu in clustering.centroids(own).items())

    assert spread(1e4) < 1e-3 * spread(0.0)


def test_fedavg_is_what_is_left_without_clusters(begin: Begin, tiny: MakeSpec) -> None:
    """The same models as fedavg's, round for round, to the last bit."""
    run = begin({"variant": "none"}, epochs=2)
    spec = tiny(method="fedavg", model="small", optimizer="adam", lr=0.01, held_out=0.1, epochs=2)
    task = task_of(spec.key(), CPU)
    state, other = registry.initial(spec, task), run.state
    for number in (1, 2):
        state, _ = rounds.one_round(spec, task, ENGINE, state, number, {})
        other, _ = rounds.one_round(run.spec, run.task, ENGINE, other, number, {})
    assert all(torch.equal(state[name], other[name]) for name in task.tensors)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("kind", [Stacked, Graphed])
def test_engines_agree(begin: Begin, kind: Any, variant: str) -> None:
    """Both stages. A weight that lies between two centroids may fall on either side: models are near, not equal."""
    run = begin({"variant": variant, "self_compression": False}, lr=1e-3)
    state, _ = rounds.one_round(run.spec, run.task, ENGINE, run.state, 1, {})
    other, _ = rounds.one_round(run.spec, run.task, kind(CPU), run.state, 1, {})
    for name in run.task.weights | run.task.vectors:
        moved = float((state[name] - run.state[name]).norm())
        assert kind is Stacked or torch.equal(state[name], other[name]), name
        assert float((state[name] - other[name]).norm()) < 0.05 * moved + 1e-7, name


# The report


def test_a_report_is_of_the_compressed_model_on_what_is_held_out(begin: Begin) -> None:
    run = begin()
    found, _ = fedcompress.read_upload(upload(run), run.hyper, run.task)
    x, y = run.task.held(0)
    assert float(found["held"]) == len(y) == 14
    network = build("small", 1, 8, 10, Rng(0)).eval()
    network.load_state_dict({name: found[name] for name in run.task.tensors}, strict=False)
    z = network[:-1](x).detach()
    assert int(found["right"]) == int((network(x).argmax(1) == y).sum())
    torch.testing.assert_close(found["gram"], adaptive_clusters.gram(z), atol=1e-5, rtol=1e-5)


def test_reports_of_parts_add_up_to_that_of_all(begin: Begin) -> None:
    run = begin()
    base = run.module.finish(*trained(run), 5, run.hyper, run.task, Rng(0))
    held = run.task.held(0)
    whole = fedcompress.assess(base, held, run.hyper, run.task)
    assert container.section_sizes(whole)[:3] == container.section_sizes(base)[:3]
    assert container.section_sizes(whole)[3] == 8 + 4 * 36
    parts = [fedcompress.assess(base, (held[0][a:b], held[1][a:b]), run.hyper, run.task) for a, b in ((0, 3), (3, 14))]
    assert container.section_sizes(parts[0])[3] == 8 + 4 * (3 * 8 - 3)
    grams = [fedcompress.read_upload(each, run.hyper, run.task)[0]["gram"] for each in (*parts, whole)]
    assert adaptive_clusters.effective_rank(grams[0] + grams[1]) == pytest.approx(
        adaptive_clusters.effective_rank(grams[2]), rel=1e-5
    )


def test_nobody_reports_where_the_number_is_fixed(begin: Begin) -> None:
    run = begin({"least": 4, "most": 4}, held_out=0.0)
    assert container.section_sizes(upload(run))[3] == 0
    state, line = rounds.one_round(run.spec, run.task, ENGINE, run.state, 1, {})
    assert "score" not in line["notes"] and line["notes"]["clusters"] == 4 and "scores" not in state


def test_a_client_with_nothing_held_out_says_so(begin: Begin) -> None:
    run = begin()
    base = run.module.finish(*trained(run), 5, run.hyper, run.task, Rng(0))
    x, y = run.task.held(0)
    empty = fedcompress.assess(base, (x[:0], y[:0]), run.hyper, run.task)
    found, _ = fedcompress.read_upload(empty, run.hyper, run.task)
    assert float(found["held"]) == 0 and not found["gram"].any()
    state = fedcompress.server(run.state, Uploads([(0, empty)]), run.hyper, run.task)
    assert state["scores"].tolist() == [0.0] and state["accuracies"].tolist() == [0.0]


def test_two_stages_keep_no_moments(begin: Begin) -> None:
    with pytest.raises(SpecError, match="persistent: True cannot go with two stages"):
        begin(persistent=True)


def test_without_samples_held_out_nothing_can_be_adapted(begin: Begin) -> None:
    with pytest.raises(SpecError, match=r"held_out: 0.0 leaves clients without validation data"):
        begin(held_out=0.0)


# The server


def test_10_identical_models_average_to_themselves_in_any_order(begin: Begin) -> None:
    run = begin({"self_compression": False})
    one, other = upload(run, 0), upload(run, 1)

    def served(*messages: bytes) -> State:
        return fedcompress.server(run.state, Uploads(enumerate(messages)), run.hyper, run.task)

    model, _ = fedcompress.read_upload(one, run.hyper, run.task)
    assert all(torch.equal(served(one, one)[name], model[name]) for name in run.task.tensors)
    ab, ba = served(one, other), served(other, one)
    for name in run.task.tensors:
        torch.testing.assert_close(ab[name], ba[name], rtol=1e-6, atol=1e-7)
    assert distinct(ab["conv.weight"]) > 4, "the average is not clustered"


def test_a_server_round_is_average_then_rule_then_compression(begin: Begin) -> None:
    run = begin(cohort=3)
    uploads = [upload(run, client) for client in range(3)]
    state = fedcompress.server(run.state, Uploads(enumerate(uploads)), run.hyper, run.task)
    found = [fedcompress.read_upload(each, run.hyper, run.task) for each in uploads]
    total = sum(samples for _, samples in found)
    average = {n: torch.stack([t[n].double() * s for t, s in found]).sum(0) / total for n in run.task.tensors}
    gram = torch.stack([t["gram"] for t, _ in found]).sum(0)
    right, held = (sum(float(t[key]) for t, _ in found) for key in ("right", "held"))
    assert state["accuracies"].tolist() == [pytest.approx(right / held)]
    assert state["scores"].tolist() == [pytest.approx(adaptive_clusters.effective_rank(gram))]
    assert state["clusters"].tolist() == [4, 4]
    plain = {n: average[n].float() for n in run.task.tensors}
    expected, losses = distillation.distil(plain, KERNELS, 4, run.hyper, run.task, fedcompress.SEEDS, 2)
    assert all(torch.equal(state[n], expected[n]) for n in run.task.tensors)
    assert state["losses"].tolist() == pytest.approx(losses)


def test_clusters_grow_in_whole_rounds_as_the_rule_says(begin: Begin) -> None:
    run = begin({"limit": 1.0, "window": 2})
    state, lines = run.state, []
    for number in range(1, 6):
        state, line = rounds.one_round(run.spec, run.task, ENGINE, state, number, {})
        lines.append(line["notes"])
        assert max(distinct(state[name]) for name in KERNELS) == int(state["clusters"][-1]), "the new number, at once"
        _, frozen = run.module.start(run.module.broadcast(state, run.hyper, run.task), run.hyper, run.task, Rng(0))
        assert int(frozen["clusters"]) == int(state["clusters"][-1])
    accuracies, scores = (state[key].tolist() for key in ("accuracies", "scores"))
    expected = [4]
    for r in range(1, 6):
        expected.append(run.hyper.following(accuracies[:r], scores[:r], expected, run.hyper.variant == "code"))
    assert state["clusters"].tolist() == expected and expected[-1] > 4
    assert [line["clusters"] for line in lines] == expected[:-1]
    assert all(distinct(state[name]) <= expected[-1] for name in KERNELS)


def test_the_average_is_compared_only_when_asked(begin: Begin) -> None:
    run = begin({"compare_every": 2})
    state, first = rounds.one_round(run.spec, run.task, ENGINE, run.state, 1, {})
    average = {name: state[f"average {name}"] for name in run.task.tensors}
    _, second = rounds.one_round(run.spec, run.task, ENGINE, state, 2, {})
    assert "before" not in first["notes"] and 0 <= second["notes"]["before"] <= 1
    accuracy, _ = ENGINE.evaluate(run.spec, average)
    assert fedcompress.seen(average, run.task.test, run.task)[0] / len(run.task.test[1]) == pytest.approx(accuracy)


# Self-compression


@pytest.mark.parametrize("norms", distillation.NORMS)
def test_09_distillation_teaches_and_leaves_the_teacher(begin: Begin, norms: str) -> None:
    run = begin({"norms": norms, "distil_epochs": 12, "images": 256, "distil_lr": 3e-3})
    teacher = run.task.initial()
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    found, losses = distillation.distil(teacher, KERNELS, 4, run.hyper, run.task, Rng(0))
    assert all(torch.equal(teacher[name], before[name]) for name in before)
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert all(distinct(found[name]) <= 4 for name in KERNELS)
    same = all(torch.equal(found[name], teacher[name]) for name in run.task.statistics)
    assert same == (norms == "frozen")
    assert not any(torch.equal(found[name], teacher[name]) for name in ("norm.weight", "norm.bias", "head.weight"))
    again, _ = distillation.distil(teacher, KERNELS, 4, run.hyper, run.task, Rng(0))
    assert all(torch.equal(found[name], again[name]) for name in found), "a function of its arguments"


def test_09_with_a_centroid_for_every_value_there_is_nothing_to_learn(begin: Begin) -> None:
    run = begin({"norms": "frozen", "distil_epochs": 1, "images": 32})
    teacher = run.task.initial()
    few = {
        name: torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1)) for name, shape in KERNELS.items()
    }
    teacher |= {name: tensor.float() - 1.5 for name, tensor in few.items()}
    _, losses = distillation.distil(teacher, KERNELS, 4, run.hyper, run.task, Rng(0))
    assert losses == [pytest.approx(0, abs=1e-6)]


def test_recalibrated_statistics_are_means_over_batches(begin: Begin) -> None:
    """Of the first BatchNorm, whose input no BatchNorm has seen: the convolution's output."""
    run = begin()
    model = run.task.initial()
    images = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        batches = [nn.functional.conv2d(x, model["conv.weight"], padding=1) for x in images.split(32)]
    distillation.recalibrate(model, images, 32, run.task)
    mean = torch.stack([z.mean((0, 2, 3)) for z in batches]).mean(0)
    var = torch.stack([z.var((0, 2, 3)) for z in batches]).mean(0)
    torch.testing.assert_close(model["norm.running_mean"], mean)
    torch.testing.assert_close(model["norm.running_var"], var)
    assert run.task.network.norm.momentum == 0.1


def test_a_last_batch_that_is_not_full_is_left_out(begin: Begin) -> None:
    """70 images in batches of 32, in one epoch: two steps, which the moments of Adam have counted."""
    run = begin({"images": 70, "distil_epochs": 1})
    counted, step = [], optimizers.step

    def counting(*given: Any) -> None:
        counted.append(1)
        step(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "step", counting)
        distillation.distil(run.task.initial(), KERNELS, 4, run.hyper, run.task, Rng(0))
    assert len(counted) == 2


def test_the_servers_divergence_is_not_the_clients(begin: Begin) -> None:
    with pytest.raises(RunError, match=r"self-compression diverged: lower hyper.distil_lr"):
        begin({"distil_lr": 1e12, "distil_epochs": 40})


def test_the_number_of_threads_changes_no_bit(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is afterwards what it was."""
    monkeypatch.setattr(record, "code_digest", lambda *_: "")  # the network is this file's own
    spec, found = begin(rounds=1).spec, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(record.stable(rounds.run(spec, InProcess(CPU), root=tmp_path)))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


def test_images_are_as_bright_as_the_tasks(begin: Begin) -> None:
    run = begin({"images": 512})
    own, made = run.task.train[0][:1000], distillation.foreign_images(run.task, run.hyper, Rng(0))
    assert float(made.mean()) == pytest.approx(float(own.mean()), abs=1e-4)
    assert float(made.std()) == pytest.approx(float(own.std()), rel=1e-2)


def test_divergence_by_hand() -> None:
    p, logits = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert float(distillation.divergence(p, logits, 2.0)) == pytest.approx(0.5 * np.log(2), rel=1e-5)
    torch.manual_seed(0)
    p, logits = torch.randn(7, 5).softmax(1), torch.randn(7, 5)
    oracle = nn.functional.kl_div((logits / 2).log_softmax(1), p, reduction="batchmean")
    torch.testing.assert_close(distillation.divergence(p, logits, 2.0), oracle)


def test_clients_own_images_may_stand_in(begin: Begin) -> None:
    run = begin({"foreign": "clients"})
    assert torch.equal(distillation.foreign_images(run.task, run.hyper, Rng(0)), run.task.train[0][:64])


# Bad messages


def altered(run: Any, made: bytes, section: int, content: bytes) -> bytes:
    kind = "fedcompress.up"
    read = Form.of(kind, coded(run), run.hyper, run.task, 10**6).parts(made)
    parts: list[Any] = list(read.sections)
    parts[section] = content
    return container.pack(kind, run.task.fingerprint("fedcompress", run.hyper), read.samples, parts)


@pytest.mark.parametrize(
    ("report", "match"),
    [
        (b"1234567", "report: 7 bytes, expected 8 or more"),
        (struct.pack("<II", 3, 4) + bytes(84), "report: 4 of 3 right in 92 bytes"),
        (struct.pack("<II", 3, 2) + bytes(80), "report: 2 of 3 right in 88 bytes, expected at most 3 in 92"),
        (struct.pack("<II", 0, 0) + bytes(4), "report: 0 of 0 right in 12 bytes, expected at most 0 in 8"),
        (struct.pack("<II", 1, 0) + struct.pack("<8f", *[float("nan")] * 8), "report: embeddings are not finite"),
    ],
)
def test_a_report_that_cannot_be(begin: Begin, report: bytes, match: str) -> None:
    run = begin()
    with pytest.raises(PayloadError, match=match):
        fedcompress.read_upload(altered(run, upload(run), 3, report), run.hyper, run.task)


def test_an_index_out_of_the_codebook(begin: Begin) -> None:
    run = begin()
    made = upload(run)
    books = bytearray(container_section(run, made, 0))
    three = np.array([-1.0, 0.0, 1.0], "<f4").tobytes()
    indexes = [bytes((entropy.FIXED,)) + b"\xff" * -(-2 * n // 8) for n in (54, 48)]
    indexes[0] = indexes[0][:-1] + b"\x0f"  # 108 bits in 14 bytes
    books[:] = (b"\x02" + three) * 2
    body = b"".join(struct.pack("<I", len(each)) + each for each in indexes)
    broken = altered(run, altered(run, made, 0, bytes(books)), 1, body)
    with pytest.raises(PayloadError, match="found 3, expected at most 2"):
        fedcompress.read_upload(broken, run.hyper, run.task)


def container_section(run: Any, made: bytes, section: int) -> bytes:
    return bytes(Form.of("fedcompress.up", coded(run), run.hyper, run.task, 10**6).parts(made).sections[section])


@pytest.mark.parametrize("number", [0, 3, 7, 65535])
def test_a_number_of_clusters_that_was_not_agreed(begin: Begin, number: int) -> None:
    run = begin()
    state = run.state | {"clusters": torch.tensor([float(number)])}
    message = run.module.broadcast(state, run.hyper, run.task)
    with pytest.raises(PayloadError, match=f"clusters: {number}, expected 4 to 6"):
        run.module.start(message, run.hyper, run.task, Rng(0))


def test_a_client_that_diverges_says_so_and_sends_nothing(begin: Begin) -> None:
    run = begin(lr=1e12, optimizer="sgd")
    found = run_client(run.spec, run.task, run.message, 1, 0)
    assert isinstance(found, PayloadError) and "not finite" in str(found)


@pytest.mark.parametrize("section", range(4))
def test_no_section_is_read_wrongly_without_a_word(begin: Begin, section: int) -> None:
    run = begin()
    made, draw = upload(run), np.random.default_rng(section)
    for _ in range(60):
        broken = altered(run, made, section, draw.bytes(int(draw.integers(0, 60))))
        with pytest.raises(PayloadError):
            fedcompress.read_upload(broken, run.hyper, run.task)


def test_networks_that_do_not_fit(begin: Begin) -> None:
    with pytest.raises(SpecError, match="has no trained convolution of more than 6 weights"):
        begin(model="mlp")


# FedZip


def test_fedzip_by_hand(begin: Begin) -> None:
    """Of ten changes the two largest stay; three clusters from evenly spaced centroids, by Lloyd's steps."""
    hyper = fedzip.Hyper()
    change = torch.tensor([0.1, -0.2, 5.0, 0.3, 0.0, -4.0, 0.2, 0.1, -0.1, 0.05])
    assert fedzip.largest(change, 0.2).tolist() == [0, 0, 5, 0, 0, -4, 0, 0, 0, 0]
    assert fedzip.quantized(change, hyper).tolist() == [0, 0, 5, 0, 0, -4, 0, 0, 0, 0]
    skewed = torch.tensor([0.0] * 6 + [1.0, 1.2, 8.0, 10.0])
    # From 0, 5, 10 with all kept: {0 x 6, 1, 1.2}, {}, {8, 10}; the means 0.275, 5 (nobody's), 9.
    assert fedzip.quantized(skewed, dataclasses.replace(hyper, keep=1.0)).unique().tolist() == pytest.approx([0.275, 9])


def test_fedzip_sends_what_the_server_adds(begin: Begin) -> None:
    run = begin(method="fedzip", cohort=2)
    made = upload(run)
    change, _ = fedzip.read_upload(made, run.hyper, run.task)
    assert all(distinct(change[name]) <= 3 for name in run.task.weights)
    kept = sum(int((change[name] != 0).sum()) for name in run.task.weights)
    assert kept <= 0.21 * count(run.task.weights) + len(run.task.weights)
    state = fedzip.server(run.state, Uploads([(0, made)]), run.hyper, run.task)
    for name in run.task.weights:
        assert torch.equal(state[name], run.state[name] + change[name])
    for name in run.task.vectors | run.task.statistics:
        assert torch.equal(state[name], change[name])
    assert fedzip.other_bits(made, run.hyper, run.task).keys() == {"fixed", "zip"}


@pytest.mark.parametrize(
    ("counts", "lengths"),
    [([8, 1, 1], [1, 2, 2]), ([5], [0]), ([1, 1], [1, 1]), ([1, 1, 2, 4], [3, 3, 2, 1]), ([3, 3, 3, 3], [2, 2, 2, 2])],
)
def test_prefix_lengths_by_hand(counts: list[int], lengths: list[int]) -> None:
    assert fedzip.prefix_lengths(counts) == lengths


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40))
def test_12_prefix_codes_are_codes_within_a_bit_of_entropy(counts: list[int]) -> None:
    lengths = fedzip.prefix_lengths(counts)
    assert sum(2.0**-length for length in lengths) == pytest.approx(1), "Kraft"
    bits = float(np.dot(lengths, counts))
    assert entropy.entropy_bits(np.array(counts)) <= bits + 1e-6
    assert bits < entropy.entropy_bits(np.array(counts)) + sum(counts)
    assert bits <= codebook.fixed_bits([len(counts)], [sum(counts)]) - 32 * len(counts)


def test_prefix_lengths_of_nothing() -> None:
    for bad in ([], [3, 0]):
        with pytest.raises(ValueError, match="expected positive numbers"):
            fedzip.prefix_lengths(bad)


def test_11_who_compresses_one_direction_stays_below_two(begin: Begin) -> None:
    """CCR = (both directions of FedAvg) / (both of the method), by each meter, in whole rounds."""

    def traffic(method: str, hyper: dict[str, Any], **more: Any) -> dict[str, float]:
        run = begin(hyper, method, cohort=3, **more)
        _, line = rounds.one_round(run.spec, run.task, ENGINE, run.state, 1, {})
        zipped = line["other_bits"].get("zip", line["paper_bits"])
        up = {"ours": 8 * line["uplink_bytes"], "fixed": line["other_bits"]["fixed"], "zip": zipped}
        return {meter: up[meter] + 3 * line["notes"]["sent_bits"][meter] for meter in up}

    full = traffic("fedcompress", {"variant": "none"})
    for ways in (traffic("fedzip", {}), traffic("fedcompress", {"self_compression": False})):
        assert all(1 < full[meter] / ways[meter] < 2 for meter in full), ways


# Images flipped, shifted and cut


def test_augmentation_by_hand() -> None:
    """Of 8 x 8 pixels the border is one wide, and what is cut reaches two from its centre."""
    x = torch.arange(64.0).view(1, 1, 8, 8) + 1
    labels = torch.tensor([3])

    def made(kind: str, *u: float) -> Tensor:
        images, same = augmentation.augmented((x, labels), torch.tensor([u, [0.0] * 5]), kind)
        assert same is labels and images.shape == x.shape
        return images[0, 0]

    plain = x[0, 0].clone()
    plain[:2, :2] = 0
    assert torch.equal(made("corner", 0.5, 0.4, 0.4, 0.9, 0.9), plain), "no flip, no shift, and the corner"
    flipped = x[0, 0].flip(1)
    flipped[:2, :2] = 0
    assert torch.equal(made("corner", 0.49, 0.4, 0.4, 0.9, 0.9), flipped), "the cut stays where it is"
    moved = torch.zeros(8, 8)
    moved[:7, 1:] = x[0, 0, 1:, :7]
    moved[2:6, 3:7] = 0
    assert torch.equal(made("random", 0.5, 0.99, 0.0, 0.5, 0.63), moved), "a row down, a column left, a cut at (4, 5)"
    assert augmentation.augmented((x, labels), None, "none") == (x, labels)


@given(st.integers(4, 40), st.integers(0, 2**32 - 1))
def test_augmentation_keeps_values_and_cuts_what_it_should(side: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, side, side, generator=generator) + 1
    u = torch.rand(5, 5, generator=generator)
    for kind in ("corner", "random"):
        made, _ = augmentation.augmented((x, torch.zeros(3)), u, kind)
        for image, own in zip(made, x, strict=True):
            assert set(image.flatten().tolist()) <= {0.0, *own.flatten().tolist()}
            lost = float((image[0] == 0).float().mean())
            assert lost <= 1 - (1 - 2 * (side // 4) / side) ** 2 + 2 * (side // 8) / side + 1e-6
            assert torch.equal(image[0] == 0, image[1] == 0), "all channels alike"
    with_grad = torch.func.vmap(lambda a, b: augmentation.augmented((a, a), b, "random")[0])(x[:, None], u[:3, None])
    alone = [augmentation.augmented((x[i : i + 1], x), u[i : i + 1], "random")[0] for i in range(3)]
    assert torch.equal(with_grad, torch.stack(alone))


def test_augmentation_changes_what_is_learned_and_nothing_else(begin: Begin, tmp_path: Path) -> None:
    for method in ("fedcompress", "fedzip"):
        plain, other = (begin({"augment": kind}, method) for kind in ("none", "random"))
        assert len(plain.message) == len(other.message)
        assert upload(plain) != upload(other) and upload(other) == upload(other)
