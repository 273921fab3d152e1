"""FedMRN's options: masking (psm, sm, pm, after), weighting (batches) and coding (entropy).

The oracle is section 4 of the specification written entry by entry, in loops of Python; it shares the draws alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedlib import rng
from fedlib.core import client as client_side
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.gpu_steps import Batched
from fedlib.engines.in_process import InProcess, task_of
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError
from fedlib.methods import fedmrn
from fedlib.methods.fedmrn import Hyper
from fedlib.rng import Rng
from fedlib.runs.spec import Spec
from fedlib.wire import container, entropy

CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
MAGNITUDE = {"binary": 0.05, "signed": 0.025}
LAYERS = {"1.weight": torch.Size([64, 64]), "3.weight": torch.Size([10, 64])}  # of the perceptron, d = 4,736
MASKINGS = ("psm", "sm", "pm", "after")
each_mask = pytest.mark.parametrize("mask", ["binary", "signed"])
each_masking = pytest.mark.parametrize("masking", MASKINGS)
range_coded = pytest.mark.skipif(not entropy.RANGE_CODER, reason="constriction has no wheel for this machine")


@pytest.fixture(scope="module")
def task(tiny: MakeSpec) -> Task:
    """Perceptron on the digits, ten clients of 143 or 144 samples; two epochs in batches of 32."""
    return Task.of(tiny(epochs=2), CPU)


def hyper_of(mask: str = "binary", **options: Any) -> Hyper:
    return Hyper(mask=mask, magnitude=MAGNITUDE[mask], **options)


def flat(state: State) -> Tensor:
    return torch.cat([state[name].flatten() for name in LAYERS])


def trained(hyper: Hyper, task: Task, number: int, place: Rng) -> tuple[Tensor, Tensor, bytes]:
    """Final u and n, both [d], and the upload of a client."""
    message = fedmrn.broadcast(task.initial(), hyper, task)
    trainable, frozen = fedmrn.start(message, hyper, task, place)
    client_side.train(fedmrn, trainable, frozen, task.shard(number), hyper, task, place)
    upload = fedmrn.finish(trainable, frozen, len(task.shard(number)[0]), hyper, task, place)
    return trainable["u"].detach(), frozen["n"], upload


def received(upload: bytes, hyper: Hyper, task: Task) -> Tensor:
    """What the upload adds to a model of zeros, [d]."""
    zero = {name: torch.zeros(shape) for name, shape in task.tensors.items()}
    return flat(fedmrn.server(zero, Uploads([(0, upload)]), hyper, task))


def plain_mask(ratio: float, draw: float, mask: str, masking: str) -> float:
    """One entry of the mask. pm: the likelier value, 0 or -1 where both are equally likely."""
    chance = min(max((ratio + 1) / 2 if mask == "signed" else ratio, 0.0), 1.0)
    hit = chance > 0.5 if masking == "pm" else draw < chance
    return 1.0 if hit else -1.0 if mask == "signed" else 0.0


def plain_update(u: Tensor, n: Tensor, p: float, draw: Tensor, mask: str, masking: str) -> Tensor:
    """Sections 4.3 and 4.4: draw < p chooses an entry for masking, and then draw / p is uniform again."""
    result = []
    for ui, ni, di in zip(u.tolist(), n.tolist(), draw.tolist(), strict=True):
        if di < p:
            result.append(ni * plain_mask(ui / ni, di / p, mask, masking))
        else:
            result.append(ni * min(max(ui / ni, -1.0 if mask == "signed" else 0.0), 1.0))
    return torch.tensor(result)


def plain_training(hyper: Hyper, task: Task, number: int, place: Rng) -> Tensor:
    """Final u [d] of a client, with the network written out and every option an if."""
    w, (x, y) = flat(task.initial()), task.shard(number)
    seed, u = place.child("noise").seed(), torch.zeros(4736)
    n = torch.from_numpy(np.concatenate([rng.uniform(seed, 0, 4096), rng.uniform(seed, 1, 640)])) * hyper.magnitude
    order, draws = place.child("order").torch(), place.child("draws").torch()
    steps, tau = task.plan.epochs * math.ceil(len(y) / task.plan.batch), 0
    for _ in range(task.plan.epochs):
        permutation = torch.randperm(len(y), generator=order).tolist()
        for start in range(0, len(y), task.plan.batch):
            batch = permutation[start : start + task.plan.batch]
            tau += 1
            draw = torch.rand(4736, generator=draws)
            if hyper.masking == "after":
                moved = u
            else:
                p = 1.0 if hyper.masking == "sm" else tau / steps
                moved = plain_update(u, n, p, draw, hyper.mask, hyper.masking)
            effective = (w + moved).requires_grad_()
            hidden = functional.linear(x[batch].flatten(1), effective[:4096].view(64, 64)).relu()
            loss = functional.cross_entropy(functional.linear(hidden, effective[4096:].view(10, 64)), y[batch])
            (gradient,) = torch.autograd.grad(loss, effective)
            u = u - task.plan.lr * gradient
    return u


def entries(count: int = 2000) -> tuple[Tensor, Tensor]:
    """u and n with ratios from -1.5 to 1.5, with both signs of n; none on an edge."""
    n = torch.randn(count, generator=torch.Generator().manual_seed(3)) * 0.05
    return torch.linspace(-1.5, 1.5, count) * n, n


def uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


# Masking


@each_mask
@each_masking
def test_training_equals_the_plain_loop(task: Task, mask: str, masking: str) -> None:
    """Whatever the option, upload included; an entry on the edge of its draw may fall to either side."""
    hyper, place = hyper_of(mask, masking=masking), Rng(4).child("client", 1, 2)
    u, n, upload = trained(hyper, task, 2, place)
    torch.testing.assert_close(u, plain_training(hyper, task, 2, place), rtol=1e-4, atol=1e-6)
    assert float(u.norm()) > 0.05
    fresh = torch.rand(4736, generator=place.child("upload").torch())
    expected = plain_update(u, n, 1.0, fresh, mask, masking)
    assert int((received(upload, hyper, task) != expected).sum()) <= 2


@each_mask
def test_the_options_differ(task: Task, mask: str) -> None:
    """So that the test above can fail: four different updates from one seed."""
    ends = [trained(hyper_of(mask, masking=masking), task, 2, Rng(4))[0] for masking in MASKINGS]
    for index, one in enumerate(ends):
        assert all(float((one - other).norm() / one.norm()) > 0.01 for other in ends[:index])


@each_mask
def test_progressive_masking_is_what_it_was(mask: str) -> None:
    """The default; U < p selects masking and given that U < p q has probability q, all with one draw."""
    assert Hyper().masking == "psm"
    u, n = entries()
    for seed, p in enumerate((0.05, 0.3, 0.75, 1.0)):
        draw = uniform(2000, seed)
        found = fedmrn.masked_update(u, n, p, draw, hyper_of(mask))
        torch.testing.assert_close(found, plain_update(u, n, p, draw, mask, "psm"))


@pytest.mark.parametrize(("masking", "shares"), [("psm", [0.25, 1.0]), ("pm", [0.25, 1.0]), ("sm", [1.0, 1.0])])
def test_share_of_masked_entries(task: Task, masking: str, shares: list[float]) -> None:
    """SM masks all entries from the first step on, whatever is drawn."""
    hyper = hyper_of(masking=masking)
    for progress, expected in zip((0.25, 1.0), shares, strict=True):
        share, chance = fedmrn.draws(progress, hyper, task, torch.Generator().manual_seed(1))
        assert share == expected
        assert chance.shape == (4736,) and float(chance.min()) >= 0 and float(chance.max()) < 1
        n = torch.full((4736,), 0.05)
        found = fedmrn.masked_update(0.3 * n, n, share, chance, hyper)
        masked = int(((found == 0) | (found == n)).sum())
        assert abs(masked - 4736 * share) <= 5 * (4736 * share * (1 - share)) ** 0.5
    everything = fedmrn.masked_update(0.3 * n, n, 1.0, torch.full((4736,), 1 - 2**-24), hyper)
    assert set((everything / n).tolist()) <= {0.0, 1.0}


def test_likelier_values_worked_by_hand() -> None:
    """u / n = 0.25, 0.75, -0.25, -0.75, 2, -2, 0, with both signs of n; binary needs 1/2, signed 0."""
    n = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0]) * 0.5
    u = n * torch.tensor([0.25, 0.75, -0.25, -0.75, 2.0, -2.0, 0.0])
    binary, signed = hyper_of("binary", masking="pm"), hyper_of("signed", masking="pm")
    for draw in (torch.zeros(7), torch.full((7,), 0.4), torch.full((7,), 1 - 2**-24)):
        assert fedmrn.masks(u, n, draw, binary).tolist() == [False, True, False, False, True, False, False]
        assert fedmrn.masks(u, n, draw, signed).tolist() == [True, True, False, False, True, False, False]
        assert fedmrn.masked_update(u, n, 1.0, draw, binary).tolist() == [0, -0.5, 0, 0, 0.5, 0, 0]
        assert fedmrn.masked_update(u, n, 1.0, draw, signed).tolist() == [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5]


@each_mask
@pytest.mark.parametrize("p", [0.1, 0.3, 2 / 3])
def test_likelier_values_are_not_drawn_but_which_entries_are_masked_is(mask: str, p: float) -> None:
    (u, n), hyper = entries(), hyper_of(mask, masking="pm")
    clipped = (u / n).clamp(-1.0 if mask == "signed" else 0.0, 1.0) * n
    whole = fedmrn.masked_update(u, n, 1.0, torch.zeros(2000), hyper)
    for seed in range(3):
        draw = uniform(2000, seed)
        found = fedmrn.masked_update(u, n, p, draw, hyper)
        torch.testing.assert_close(found, torch.where(draw < p, whole, clipped))
        assert torch.equal(fedmrn.masked_update(u, n, 1.0, draw, hyper), whole)
        # Of the draw, only on which side of p it lies may matter.
        coarse = torch.where(draw < p, 0.0, p + 0.01)
        assert torch.equal(fedmrn.masked_update(u, n, p, coarse, hyper), found)


@each_mask
def test_upload_of_likelier_values_draws_nothing(task: Task, mask: str) -> None:
    """Same noise, other draws: the same bytes. With psm they differ."""
    same = {}
    for masking in ("pm", "psm"):
        hyper, place = hyper_of(mask, masking=masking), Rng(1)
        trainable, frozen = fedmrn.start(fedmrn.broadcast(task.initial(), hyper, task), hyper, task, place)
        trainable["u"].detach().copy_(torch.linspace(-1.2, 1.2, 4736) * frozen["n"])
        u, n = trainable["u"].detach(), frozen["n"]
        drawn = {fedmrn.masks(u, n, uniform(4736, seed), hyper).numpy().tobytes() for seed in range(3)}
        sent = received(fedmrn.finish(trainable, frozen, 1, hyper, task, place), hyper, task)
        ratio = torch.linspace(-1.2, 1.2, 4736)
        likelier = n * torch.where(ratio > (0.0 if mask == "signed" else 0.5), 1.0, -1.0 if mask == "signed" else 0.0)
        same[masking] = (len(drawn), torch.equal(sent, likelier))
    assert same == {"pm": (1, True), "psm": (3, False)}


@each_mask
def test_masking_after_training_trains_like_fedavg_and_uploads_like_sm(task: Task, mask: str) -> None:
    hyper, place = hyper_of(mask, masking="after"), Rng(6)
    u, n, upload = trained(hyper, task, 0, place)
    w = [task.initial()[name].clone().requires_grad_() for name in LAYERS]
    optimizer, order, (x, y) = torch.optim.SGD(w, lr=task.plan.lr), place.child("order").torch(), task.shard(0)
    for _ in range(task.plan.epochs):
        for batch in torch.randperm(len(y), generator=order).split(task.plan.batch):
            optimizer.zero_grad()
            logits = functional.linear(functional.linear(x[batch].flatten(1), w[0]).relu(), w[1])
            torch.autograd.backward(functional.cross_entropy(logits, y[batch]))
            optimizer.step()
    expected = torch.cat([v.detach().flatten() for v in w]) - flat(task.initial())
    torch.testing.assert_close(u, expected, rtol=1e-5, atol=1e-6)
    assert trained(dataclasses.replace(hyper, noise="gauss"), task, 0, place)[0].equal(u), "whatever the noise"
    fresh = torch.rand(4736, generator=place.child("upload").torch())
    found = received(upload, hyper, task)
    assert int((found != plain_update(u, n, 1.0, fresh, mask, "sm")).sum()) <= 2
    assert set((found / n).tolist()) == ({-1.0, 1.0} if mask == "signed" else {0.0, 1.0})


@each_masking
@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_the_engines_for_a_gpu_know_every_option(tiny: MakeSpec, kind: type[Batched], masking: str) -> None:
    """Two rounds' clients with unequal shards; what Stacked sums in another order may turn a few bits of the masks."""
    spec = tiny(
        method="fedmrn",
        hyper=dataclasses.asdict(hyper_of(masking=masking)),
        partition={"kind": "dirichlet", "beta": 0.3, "seed": 7},
    )
    task, hyper = task_of(spec.key(), CPU), hyper_of(masking=masking)
    message = fedmrn.broadcast(task.initial(), hyper, task)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = dict(InProcess(CPU).train(spec, message, 1, [3, 1, 8]))
        found = dict(kind(CPU).train(spec, message, 1, [3, 1, 8]))
    finally:
        torch.set_num_threads(threads)
    for client, upload in expected.items():
        assert isinstance(upload, bytes)
        other = found[client]
        assert isinstance(other, bytes)
        differ = int((received(upload, hyper, task) != received(other, hyper, task)).sum())
        assert differ == 0 if kind is Graphed else differ <= 4


# Weights by batches


def test_weights_by_batches_worked_by_hand(task: Task) -> None:
    """33, 32 and 1 samples in batches of 32: weights 2, 1 and 1; by samples 33, 32 and 1."""
    x, y = task.shard(0)
    for weighting, weights in (("batches", (2, 1, 1)), ("samples", (33, 32, 1))):
        hyper = hyper_of("signed", weighting=weighting)
        message = fedmrn.broadcast(task.initial(), hyper, task)
        uploads = [
            client_side.client(fedmrn, message, (x[:count], y[:count]), hyper, task, Rng(count))
            for count in (33, 32, 1)
        ]
        parts = [received(upload, hyper, task) for upload in uploads]
        state = task.initial()
        after = fedmrn.server(state, Uploads(enumerate(uploads)), hyper, task)
        expected = sum(weight / sum(weights) * part for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(flat(after) - flat(state), torch.as_tensor(expected), rtol=1e-5, atol=1e-7)


def test_weighting_does_not_change_what_is_sent_but_for_the_agreement_on_it(task: Task) -> None:
    """The fingerprint differs: a server that weights otherwise refuses the upload."""
    samples, batches = hyper_of(), hyper_of(weighting="batches")
    first, second = (trained(hyper, task, 0, Rng(0))[2] for hyper in (samples, batches))
    assert container.section_sizes(first) == container.section_sizes(second)
    assert torch.equal(received(first, samples, task), received(second, batches, task))
    with pytest.raises(NoUpdate):
        received(first, batches, task)


# Entropy coding


@each_mask
@pytest.mark.parametrize("law", ["uniform", "gauss", "bernoulli"])
def test_both_codings_say_the_same(task: Task, mask: str, law: str) -> None:
    packed = Hyper(mask=mask, noise=law, magnitude=MAGNITUDE[mask])
    coded = dataclasses.replace(packed, coding="entropy")
    (u, n, first), (other_u, other_n, second) = (trained(hyper, task, 1, Rng(3)) for hyper in (packed, coded))
    assert torch.equal(u, other_u) and torch.equal(n, other_n), "coding has no part in training"
    update = received(first, packed, task)
    assert torch.equal(received(second, coded, task), update) and int(update.count_nonzero()) > 300
    sizes, coded_sizes = container.section_sizes(first), container.section_sizes(second)
    assert sizes == (8, 592, 0) and (coded_sizes[0], coded_sizes[2]) == (8, 0)
    assert coded_sizes[1] <= 593, "at worst a byte that says: packed"
    assert fedmrn.paper_bits(second, coded, task) == 4736
    with pytest.raises(NoUpdate):
        received(second, packed, task)


@range_coded
@pytest.mark.parametrize("rho", [0.01, 0.1, 0.3])
def test_small_binary_updates_take_fewer_bits_than_their_density_says(task: Task, rho: float) -> None:
    """Specification, section 13: for uniform noise and |u| = rho a the density is (rho + rho ln(1 / rho)) / 2.

    A coder that knows the density alone needs its entropy; one that knows |n| too needs less.
    """
    wide = dataclasses.replace(task, weights={"a": torch.Size([300, 400]), "b": torch.Size([50, 400])})
    d, hyper = 140_000, hyper_of(coding="entropy")
    u = torch.full((d,), rho * hyper.magnitude)
    n = fedmrn.noise(Rng(2).child("noise").seed(), hyper, wide.weights)
    upload = fedmrn.finish({"u": u}, {"n": n}, 1, hyper, wide, Rng(2))
    density = (rho + rho * math.log(1 / rho)) / 2
    seed, mask, full = container.unpack(upload, "fedmrn.up", wide.fingerprint("fedmrn", hyper), [8, d, 0]).sections
    update = fedmrn.decode([seed, mask], hyper, wide)
    assert int(update.count_nonzero()) == pytest.approx(d * density, abs=5 * (d * density) ** 0.5)
    assert set((update / n).tolist()) == {0.0, 1.0} and len(full) == 0
    shannon = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert 8 * len(mask) < 0.97 * d * shannon < 0.97 * d


def test_entries_share_a_model_by_layer_and_size_of_noise(task: Task) -> None:
    """a = 0.5: from 1.5 on the last of twenty, then from 1, 0.75, 0.5, 0.375, 0.25 on; the next layer begins anew."""
    small = dataclasses.replace(task, weights={"a": torch.Size([1, 5]), "b": torch.Size([1, 3])})
    n = torch.tensor([1.6, -1.4, 0.9, -0.5, 1e-8, -1.6, 0.4, 0.3])
    assert fedmrn.contexts(n, Hyper(magnitude=0.5), small).tolist() == [19, 18, 17, 16, 0, 39, 35, 34]


SMALL = dict(
    paper="p", profile="smoke", name="n", group="g", label="l", split="s", method="fedmrn", hyper={}, data="digits",
    model="mlp", partition={"kind": "iid", "seed": 0}, clients=20, cohort=5, rounds=1, epochs=1, batch=16, lr=0.1,
    evaluate_every=1, seed=0,
)  # fmt: skip


@functools.cache
def honest(mask: str, small: bool) -> tuple[Task, Hyper, bytes]:
    task, hyper = Task.of(Spec.from_dict(SMALL), CPU), hyper_of(mask, coding="entropy")
    trainable, frozen = fedmrn.start(fedmrn.broadcast(task.initial(), hyper, task), hyper, task, Rng(0))
    trainable["u"].detach().fill_((0.1 if small else 0.4) * hyper.magnitude)
    return task, hyper, fedmrn.finish(trainable, frozen, 72, hyper, task, Rng(0))


@range_coded
@pytest.mark.parametrize(("mask", "small"), [("binary", True), ("binary", False), ("signed", False)])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_altered_masks_are_refused_or_another_mask(mask: str, small: bool, data: st.DataObject) -> None:
    """In the whole upload the checksum finds it. Behind a right checksum, what decodes is a mask, though another."""
    task, hyper, upload = honest(mask, small)
    n, fingerprint = fedmrn.noise(Rng(0).child("noise").seed(), hyper, task.weights), task.fingerprint("fedmrn", hyper)
    altered = bytearray(upload)
    altered[data.draw(st.integers(0, len(upload) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(NoUpdate):
        received(bytes(altered), hyper, task)
    seed, coded, full = container.unpack(upload, "fedmrn.up", fingerprint, [8, 10**4, 0]).sections
    part = bytearray(coded)
    if data.draw(st.booleans()):
        del part[data.draw(st.integers(0, len(part) - 1)) :]
    else:
        part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        u = received(container.pack("fedmrn.up", fingerprint, 72, [seed, part, full]), hyper, task)
    except NoUpdate:
        return
    assert set((u / n).tolist()) <= ({-1.0, 1.0} if mask == "signed" else {0.0, 1.0})
    assert not torch.equal(u, received(upload, hyper, task))


@range_coded
def test_entropy_coded_masks_that_nobody_sends_are_refused() -> None:
    task, hyper, upload = honest("binary", True)
    fingerprint = task.fingerprint("fedmrn", hyper)
    seed, coded, _ = container.unpack(upload, "fedmrn.up", fingerprint, [8, 10**4, 0]).sections
    assert coded[0] == entropy.CONTEXTS and len(coded) < 400
    assert fedmrn.decode([seed, coded], hyper, task).shape == (4736,)
    other_seed = memoryview(bytes([seed[0] ^ 1]) + bytes(seed[1:]))
    for parts in (
        [seed[:7], coded],
        [memoryview(bytes(seed) + b"\0"), coded],
        [seed, coded[:-4]],
        [seed, coded[:1]],
        [seed, memoryview(b"")],
        [seed, memoryview(bytes(coded) + bytes(4))],
        [seed, memoryview(bytes(592))],  # packed without a codec
        [other_seed, coded],  # other noise, so other contexts
    ):
        with pytest.raises(PayloadError):
            fedmrn.decode(parts, hyper, task)
