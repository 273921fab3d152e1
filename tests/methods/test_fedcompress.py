"""FedCompress: what is clustered and what travels, the report, malformed messages, two phases in all engines.

Numbers are the properties of its specification, section 8.2; 2, 4, 5, 6, 7, 8 and 12 are also in the files on its
parts, codebooks and FedZip.
"""

import dataclasses
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedcompress_toys import CPU, ENGINE, KERNELS, Run, begun, distinct, small
from known_answers import CASES, TINY
from torch.nn.functional import linear

from fedlib.core import client
from fedlib.core.method import Phase
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, SpecError
from fedlib.methods.fedcompress import adaptive_clusters, clustering
from fedlib.methods.fedcompress.messages import METERS
from fedlib.methods.fedcompress.method import FedCompress
from fedlib.rng import Rng
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container, entropy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_kernels_over_all_channels_are_clustered() -> None:
    run = begun()
    found = {name: tuple(shape) for name, shape in run.method.kernels.items()}
    assert found == KERNELS, "neither depthwise ones nor the head"
    fewer = FedCompress(most=50, least=8).bind(run.task)
    assert fewer.kernels.keys() == {"conv.weight"}, "more weights than clusters"
    assert FedCompress(layers="all").bind(run.task).kernels.keys() == {*KERNELS, "head.weight"}
    assert FedCompress(variant="none").bind(run.task).kernels == {}


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(SpecError, match="has no trained convolution of more than 6 weights"):
        begun(model="mlp")


def test_01_few_values_and_all_else_untouched() -> None:
    run = begun()
    local = run.trained()
    local.samples = 5
    model, _, samples = run.method.up.unpack(run.method.upload(local, run.task.held(0), Rng(0)))
    assert samples == 5
    for name, tensor in model.items():
        if name in KERNELS:
            assert distinct(tensor) <= 4 < distinct(local.trainable[name])
            mu = clustering.centroids(local.trainable)[name].detach()
            assert set(tensor.unique().tolist()) <= set(mu.tolist())
        else:
            assert torch.equal(tensor, (local.trainable | local.frozen)[name].detach())


@pytest.mark.parametrize("self_compression", [True, False])
def test_02_a_broadcast_is_read_as_it_was_written(self_compression: bool) -> None:
    run = begun({"self_compression": self_compression})
    local = run.begin().local
    (model,) = run.method.models(run.state, Rng(0))
    for name in run.task.tensors:
        assert torch.equal((local.trainable | local.frozen)[name], model[name])
    assert int(local.frozen["clusters"]) == 4
    assert all((distinct(model[name]) <= 4) == self_compression for name in KERNELS)


def test_03_meters_are_lengths() -> None:
    """Our bytes are those of the messages; the others by hand from the tensors that are read."""
    run = begun(cohort=3)
    state, line = run.round()
    assert line["downlink_bytes"] == 3 * len(run.message)
    assert line["uplink_bytes"] == sum(len(run.upload(client)) for client in line["clients"])
    assert run.state.own.broadcasts.coming[0] == 8 * len(run.message)
    assert line["notes"]["sent_bits"] == dict(zip(METERS, run.state.own.broadcasts.coming, strict=True))
    assert line["notes"]["model_bits"]["ours"] == 8 * len(run.method.broadcast(state))
    made = run.upload()
    model, samples = run.method.read(made)
    file = b"".join(model[name].numpy().tobytes() for name in run.task.tensors)
    parts = container.section_sizes(made)
    fixed = 8 * (parts[2] + parts[3])
    for name in KERNELS:
        book, n = distinct(model[name]), model[name].numel()
        fixed += 32 * book + 8 * -(-n * (book - 1).bit_length() // 8)
    assert run.method.sizes(made) == (8 * (len(zlib.compress(file, 6)) + parts[3]), {"fixed": fixed})
    assert samples == len(run.task.indices(0))


# The report


def test_a_report_is_of_the_compressed_model_on_what_is_held_out() -> None:
    run = begun()
    found, _ = run.method.read(run.upload())
    x, y = run.task.held(0)
    assert int(found["held"]) == len(y) == 14
    network = small(1, 8, 10, Rng(0)).eval()
    network.load_state_dict({name: found[name] for name in run.task.tensors}, strict=False)
    z = network[:-1](x).detach()
    right = linear(z, found["head.weight"], found["head.bias"]).argmax(1) == y
    assert int(found["right"]) == int(right.sum())
    torch.testing.assert_close(found["gram"], adaptive_clusters.gram(z), atol=1e-5, rtol=1e-5)


def test_reports_of_parts_add_up_to_that_of_all() -> None:
    run = begun()
    local, (x, y) = run.trained(), run.task.held(0)
    uploads = [run.method.upload(local, (x[a:b], y[a:b]), Rng(0)) for a, b in ((0, 3), (3, 14), (0, 14))]
    sizes = [container.section_sizes(upload) for upload in uploads]
    assert sizes[0][:3] == sizes[1][:3] == sizes[2][:3]
    assert sizes[0][3] == 8 + 4 * (3 * 8 - 3) and sizes[2][3] == 8 + 4 * 36
    first, second, whole = (run.method.read(upload)[0]["gram"] for upload in uploads)
    assert adaptive_clusters.effective_rank(first + second) == pytest.approx(
        adaptive_clusters.effective_rank(whole), rel=1e-5
    )


def test_nobody_reports_where_the_number_is_fixed() -> None:
    run = begun({"least": 4, "most": 4}, held_out=0.0)
    assert container.section_sizes(run.upload())[3] == 0
    state, line = run.round()
    assert "score" not in line["notes"] and line["notes"]["clusters"] == 4 and not state.own.scores


def test_a_client_with_nothing_held_out_says_so() -> None:
    run = begun()
    x, y = run.task.held(0)
    empty = run.method.upload(run.trained(), (x[:0], y[:0]), Rng(0))
    found, _ = run.method.read(empty)
    assert int(found["held"]) == 0 and not found["gram"].any()
    own = run.method.aggregate(run.state, Uploads([(0, empty)])).own
    assert own.scores == (0.0,) and own.accuracies == (0.0,)


def test_without_samples_held_out_nothing_can_be_adapted() -> None:
    with pytest.raises(SpecError, match=r"held_out: 0.0 leaves clients without validation data"):
        begun(held_out=0.0)


# Malformed messages


def altered(run: Run, made: bytes, section: int, content: bytes) -> bytes:
    parts: list[Any] = list(sections(run, made))
    parts[section] = content
    return container.pack("fedcompress.up", run.method.fingerprint(), 5, parts)


def sections(run: Run, made: bytes) -> tuple[memoryview, ...]:
    return container.unpack(made, "fedcompress.up", run.method.fingerprint(), [10**6] * 4).sections


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
def test_a_report_that_cannot_be(report: bytes, match: str) -> None:
    run = begun()
    with pytest.raises(PayloadError, match=match):
        run.method.read(altered(run, run.upload(), 3, report))


def test_an_index_out_of_the_codebook() -> None:
    run = begun()
    made = run.upload()
    three = np.array([-1.0, 0.0, 1.0], "<f4").tobytes()
    indexes = [bytes((entropy.FIXED,)) + b"\xff" * -(-2 * n // 8) for n in (54, 48)]
    indexes[0] = indexes[0][:-1] + b"\x0f"  # 108 bits in 14 bytes
    body = b"".join(struct.pack("<I", len(each)) + each for each in indexes)
    broken = altered(run, altered(run, made, 0, (b"\x02" + three) * 2), 1, body)
    with pytest.raises(PayloadError, match="found 3, expected at most 2"):
        run.method.read(broken)


@pytest.mark.parametrize("number", [0, 3, 7, 65535])
def test_a_number_of_clusters_that_was_not_agreed(number: int) -> None:
    run = begun()
    own = dataclasses.replace(run.state.own, clusters=(number,))
    message = run.method.broadcast(dataclasses.replace(run.state, own=own))
    with pytest.raises(PayloadError, match=f"clusters: {number} in 2 bytes, expected 4 to 6 in 2"):
        run.method.begin(message, run.task.shard(0), Rng(0))


def test_a_client_that_diverges_says_so_and_sends_nothing() -> None:
    run = begun(lr=1e12, optimizer="sgd")
    found = ENGINE.client(run.job, run.message, 1, 0)
    assert isinstance(found, PayloadError) and "not finite" in str(found)


# Two phases


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
            found.append(record.stable(rounds.run(spec, ENGINE, root=tmp_path)))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]
