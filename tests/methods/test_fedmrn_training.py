"""FedMRN's local training: properties 5 to 7, 12 and 15 of its specification (section 10), by number, all its options
against a plain loop, the engines for a GPU, and a magnitude that falls from round to round."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import small_task
import torch
from fedmrn_references import (
    MAGNITUDE,
    begun_at,
    cnn4_task,
    each_mask,
    flat,
    fresh,
    noise_images,
    of,
    perceptron_loss,
    plain_training,
    plain_update,
    received,
    uniform,
)
from jobs import MakeSpec, job_of, message_of, ran
from small_task import CPU, begun, digits_task, served, state_of, train, trained, uploaded
from typing_extensions import override

from fedlib.core import client
from fedlib.core.method import AnyMethod, Draws, Phase
from fedlib.core.plan import Plan, Samples, Tensors
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.errors import SpecError
from fedlib.methods.fedavg import FedAvg
from fedlib.methods.fedmrn import FedMRN
from fedlib.rng import Rng, Stream
from fedlib.runs import rounds
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")

MASKINGS = ("psm", "sm", "pm", "after")
each_masking = pytest.mark.parametrize("masking", MASKINGS)


@each_mask
@pytest.mark.parametrize("p", [0.01, 0.5, 1.0])
def test_05_gradient_of_u_is_that_of_the_effective_weight(mask: str, p: float) -> None:
    method = of(mask)
    shard = method.task.shard(0)
    # Two thirds of the binary entries and more are saturated.
    local = begun_at(method, torch.linspace(-3, 3, 4736), Rng(1))
    u, n = local.trainable["u"], local.frozen["n"]
    loss = method.loss(local.trainable, local.frozen, shard, (p, uniform(4736)))
    (gradient,) = torch.autograd.grad(loss, u)

    effective = flat(method.task.initial()) + plain_update(u, n, p, uniform(4736), mask)
    plain = perceptron_loss(effective.requires_grad_(), *shard)
    (expected,) = torch.autograd.grad(plain, effective)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, expected)
    assert float(expected.abs().max()) > 0.01


@pytest.mark.parametrize(("samples", "steps"), [(23, 15), (20, 12), (1, 3)])
def test_06_schedule_of_progressive_masking(samples: int, steps: int) -> None:
    """tau / S for tau = 1..S with S = 3 ceil(D / 5), seen by a made-up method that only notes what it is told."""
    seen: list[float] = []

    class Toy(FedMRN):
        @override
        def draw(self, progress: float, stream: Stream) -> Draws:
            seen.append(progress)

        @override
        def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Draws) -> torch.Tensor:
            return trainable["u"].sum()

    method = Toy().bind(dataclasses.replace(digits_task(), plan=Plan(epochs=3, batch=5, lr=0.1)))
    shard = (torch.zeros(samples, 1), torch.zeros(samples, dtype=torch.int64))
    u = trained(method, shard, Rng(0)).trainable["u"]
    assert seen == [tau / steps for tau in range(1, steps + 1)]
    assert u.tolist() == pytest.approx([-0.1 * steps] * 4736), "one step of SGD each"


@each_mask
def test_07_with_tiny_progress_the_forward_is_that_of_the_clipped_update(mask: str) -> None:
    method, ratios = of(mask), torch.linspace(-3, 3, 4736)
    local, shard = begun_at(method, ratios, Rng(1)), method.task.shard(0)
    found = method.loss(local.trainable, local.frozen, shard, (1e-9, uniform(4736)))
    clipped = ratios.clamp(0 if mask == "binary" else -1, 1) * local.frozen["n"]
    torch.testing.assert_close(found, perceptron_loss(flat(method.task.initial()) + clipped, *shard))


@each_mask
def test_12_base_weights_do_not_move(mask: str) -> None:
    method, shard = of(mask, cnn4_task()), noise_images()
    local, task = begun(method, shard, Rng(0)), method.task
    w, n = local.frozen["w"].clone(), local.frozen["n"].clone()
    vectors = {name: local.trainable[name].detach().clone() for name in task.vectors}
    train(method, local, shard, Rng(0))
    assert torch.equal(local.frozen["w"], w) and torch.equal(local.frozen["n"], n)
    assert torch.equal(w, small_task.flat(task.initial(), task))
    assert local.trainable["u"].count_nonzero() > 300_000
    assert all(not torch.equal(local.trainable[name], before) for name, before in vectors.items()), "also BatchNorm"


@each_mask
@each_masking
def test_training_equals_the_plain_loop(mask: str, masking: str) -> None:
    """Whatever the option, upload included; an entry on the edge of its draw may fall to either side."""
    method, place = of(mask, masking=masking), Rng(9).child("client", 4, 2)
    shard = method.task.shard(2)
    local = trained(method, shard, place)
    u, n = local.trainable["u"].detach(), local.frozen["n"]
    torch.testing.assert_close(u, plain_training(method, 2, place), rtol=1e-4, atol=1e-6)
    assert float(u.norm()) > 0.05
    expected = plain_update(u, n, 1.0, fresh(place), mask, masking)
    assert int((received(method, uploaded(method, shard, place)) != expected).sum()) <= 2


@each_mask
def test_the_options_differ(mask: str) -> None:
    """So that the test above can fail: four different updates from one seed."""
    methods = [of(mask, masking=masking) for masking in MASKINGS]
    ends = [trained(method, method.task.shard(2), Rng(4)).trainable["u"].detach() for method in methods]
    for index, one in enumerate(ends):
        assert all(float((one - other).norm() / one.norm()) > 0.01 for other in ends[:index])


@each_mask
def test_masking_after_training_trains_like_fedavg_and_uploads_like_sm(mask: str) -> None:
    method, place = of(mask, masking="after"), Rng(6)
    task, shard = method.task, method.task.shard(0)
    local = trained(method, shard, place)
    u, n = local.trainable["u"].detach(), local.frozen["n"]
    expected = small_task.plain_training(task.network, shard, task.plan, place)
    torch.testing.assert_close(u, flat(expected) - flat(task.initial()), rtol=1e-5, atol=1e-6)
    other = dataclasses.replace(method, noise="gauss")
    assert trained(other, shard, place).trainable["u"].equal(u), "whatever the noise"
    found = received(method, method.upload(local, task.held(0), place))
    assert int((found != plain_update(u, n, 1.0, fresh(place), mask, "sm")).sum()) <= 2
    assert set((found / n).tolist()) == ({-1.0, 1.0} if mask == "signed" else {0.0, 1.0})


def test_15_many_signed_clients_tend_to_fedavg() -> None:
    """Identical data, one step, noise +-alpha four times the largest update: unbiased, with variance alpha^2 / K."""
    task = dataclasses.replace(digits_task(), plan=Plan(epochs=1, batch=72, lr=1e-3))
    shard = task.shard(0)

    def moved(method: AnyMethod, *uploads: bytes) -> torch.Tensor:
        return flat(served(method, *uploads)) - flat(task.initial())

    plain = FedAvg().bind(task)
    exact = moved(plain, uploaded(plain, shard, Rng(0)))
    alpha = 4 * float(exact.abs().max())
    method = of("signed", task, noise="bernoulli", magnitude=alpha)
    uploads = [uploaded(method, shard, Rng(0).child(k)) for k in range(400)]
    for count in (25, 400):
        mean = moved(method, *uploads[:count])
        assert float((mean - exact).square().mean()) == pytest.approx(alpha**2 / count, rel=0.1)
    slope, error = float(mean @ exact / exact.square().sum()), alpha / 400**0.5 / float(exact.norm())
    assert slope == pytest.approx(1, abs=5 * error)
    assert error < 0.1


@each_masking
@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_the_engines_for_a_gpu_know_every_option(tiny: MakeSpec, kind: type[InProcess], masking: str) -> None:
    """Two rounds' clients with unequal shards; what Stacked sums in another order may turn a few bits of the masks."""
    settings: dict[str, Any] = {"magnitude": MAGNITUDE["binary"], "masking": masking}
    partition = {"kind": "dirichlet", "beta": 0.3, "seed": 7}
    job = job_of(tiny(method="fedmrn", hyper=settings, partition=partition))
    method = job.method
    assert isinstance(method, FedMRN)
    message = rounds.broadcast(method, state_of(method), 1)
    expected = dict(InProcess(CPU).train(job, message, 1, [3, 1, 8]))
    found = dict(kind(CPU).train(job, message, 1, [3, 1, 8]))
    for number, upload in expected.items():
        assert isinstance(upload, bytes)
        other = found[number]
        assert isinstance(other, bytes)
        differ = int((received(method, upload) != received(method, other)).sum())
        assert differ == 0 if kind is Graphed else differ <= 4


# A magnitude that the server makes smaller from round to round


def test_magnitude_falls_by_its_factor_and_travels_with_the_model(tiny: MakeSpec) -> None:
    job, plain = (job_of(tiny(method="fedmrn", hyper={"magnitude": 0.5} | more)) for more in ({"decay": 0.25}, {}))
    method, state = job.method, rounds.initial(job)
    assert len(message_of(job)) == len(message_of(plain)) + 4
    for magnitude in (0.5, 0.125, 0.03125):
        assert state.own == magnitude
        message = rounds.broadcast(method, state, 1)
        member = client.begin(job, message, 1, 1, None)
        client.train(method, Phase(job.task.plan), [member])
        n = member.local.frozen["n"]
        assert 0.9 * magnitude < n.abs().max() <= magnitude
        upload = InProcess(CPU).client(job, message, 1, 1)
        assert isinstance(upload, bytes)
        assert container.section_sizes(upload)[0] == 8  # still the seed alone: the server knows the magnitude
        update = method.sent(upload, member.local)
        assert torch.equal(update[update != 0], n[update != 0])
        before = flat(state.model)
        state = method.aggregate(state, Uploads([(1, upload)]))
        after = flat(state.model)
        assert torch.equal(after, before + update)


def test_without_a_schedule_nothing_is_kept_or_sent(tiny: MakeSpec) -> None:
    job = job_of(tiny(method="fedmrn", hyper={"decay": 1.0}))
    state = rounds.initial(job)
    assert state.model.keys() == job.task.initial().keys() and state.own == 0.01
    assert len(message_of(job)) == len(message_of(job_of(tiny(method="fedmrn"))))


def test_entropy_coded_masks_follow_the_schedule(tiny: MakeSpec, tmp_path: Path) -> None:
    """The coder's contexts depend on the magnitude: both sides must use that of the round."""
    hyper = {"magnitude": 0.2, "decay": 0.5}
    packed, coded = (
        ran(tiny(method="fedmrn", hyper=hyper | {"coding": coding}, rounds=5), tmp_path)
        for coding in ("packed", "entropy")
    )
    assert not any(entry["refused"] for entry in coded["rounds"])
    assert [entry["loss"] for entry in coded["rounds"]] == [entry["loss"] for entry in packed["rounds"]]
    assert coded["final"]["uplink_parts"]["mask"] < packed["final"]["uplink_parts"]["mask"]


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan"), "fast"])
def test_decay_out_of_range(tiny: MakeSpec, decay: object) -> None:
    with pytest.raises(SpecError, match=r"hyper\.decay"):
        tiny(method="fedmrn", hyper={"decay": decay})
