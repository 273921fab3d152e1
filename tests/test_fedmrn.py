"""FedMRN: the sixteen properties of its specification (section 10), by number, and one client round in plain torch.

The oracles are numbers worked by hand, the closed forms of the lemmas in section 6.2, and code that shares nothing with
the method but the random draws.
"""

import dataclasses
import functools
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from fedlib import rng
from fedlib.core import client as client_side
from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import Uploads
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import fedavg, fedmrn
from fedlib.methods.fedmrn import Hyper
from fedlib.models.registry import build
from fedlib.rng import Rng
from fedlib.runs.spec import Spec
from fedlib.wire import bits, container

CPU = torch.device("cpu")
BINARY, SIGNED = Hyper(mask="binary", magnitude=0.05), Hyper(mask="signed", magnitude=0.025)
both_masks = pytest.mark.parametrize("hyper", [BINARY, SIGNED], ids=["binary", "signed"])
LAYERS = {"1.weight": torch.Size([64, 64]), "3.weight": torch.Size([10, 64])}  # of the perceptron, d = 4,736
Shard = tuple[Tensor, Tensor]


SPEC = """
{paper: fedmrn, profile: smoke, name: n, group: g, label: l, split: s, method: fedmrn, hyper: {}, data: digits,
 model: mlp, partition: {kind: iid, seed: 0}, clients: 20, cohort: 5, rounds: 1, epochs: 3, batch: 16, lr: 0.1,
 evaluate_every: 1, seed: 0}
"""


@functools.cache
def digits_task() -> Task:
    return Task.of(Spec.from_dict(yaml.safe_load(SPEC)), CPU)


def task_with(network: nn.Module, plan: Plan) -> Task:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
    parameters = {name: p.shape for name, p in network.named_parameters()}
    return dataclasses.replace(
        digits_task(),
        network=network,
        weights={name: shape for name, shape in parameters.items() if len(shape) > 1},
        vectors={name: shape for name, shape in parameters.items() if len(shape) == 1},
        statistics={name: b.shape for name, b in network.named_buffers()},
        plan=plan,
    )


@functools.cache
def cnn4_task() -> Task:
    return task_with(build("cnn4", 1, 28, 10, Rng(0)), Plan(epochs=1, batch=4, lr=0.1))


def noise_images() -> Shard:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 28, 28, generator=generator), torch.randint(0, 10, (6,), generator=generator)


def client(state: State, shard: Shard, hyper: Hyper, task: Task, place: Rng) -> bytes:
    return client_side.client(fedmrn, fedmrn.broadcast(state, hyper, task), shard, hyper, task, place)


def server(state: State, hyper: Hyper, task: Task, *messages: bytes) -> State:
    return fedmrn.server(state, Uploads(enumerate(messages)), hyper, task)


def zeros(task: Task) -> State:
    return {name: torch.zeros(shape) for name, shape in task.tensors.items()}


def flat(state: State) -> Tensor:
    return torch.cat([state[name].flatten() for name in LAYERS])


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def plain_psm(u: Tensor, n: Tensor, p: float, draw: Tensor, signed: bool) -> Tensor:
    """Section 4.4 entry by entry: draw < p chooses masking, and then draw / p is uniform again."""
    result = []
    for ui, ni, di in zip(u.tolist(), n.tolist(), draw.tolist(), strict=True):
        if di < p:
            chance = min(max((ui / ni + 1) / 2 if signed else ui / ni, 0.0), 1.0)
            result.append(ni if di / p < chance else -ni if signed else 0.0)
        else:
            result.append(min(max(ui / ni, -1.0 if signed else 0.0), 1.0) * ni)
    return torch.tensor(result)


def entries(count: int = 2000) -> tuple[Tensor, Tensor]:
    """u and n with ratios from -1.5 to 1.5: inside and outside the interval of either mask, with both signs of n."""
    n = torch.randn(count, generator=torch.Generator().manual_seed(3)) * 0.05
    return torch.linspace(-1.5, 1.5, count) * n, n


def by_lemma_2(u: Tensor, n: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Mean (lemma 1) and variance (lemma 2) of the masked update, in float64."""
    ratio = (u.double() / n.double()).clamp(-1 if signed else 0, 1)
    c = ratio * n.double()
    return c, n.double() ** 2 - c**2 if signed else c.abs() * (n.double().abs() - c.abs())


@both_masks
@pytest.mark.parametrize("p", [1.0, 0.3])
def test_01_02_mean_and_variance_of_many_samples(hyper: Hyper, p: float) -> None:
    (u, n), samples = entries(), 4000
    mean, variance = by_lemma_2(u, n, hyper.mask == "signed")
    drawn = fedmrn.masked_update(u, n, p, uniform(samples, len(u)), hyper).double()
    error = drawn.mean(0) - mean
    standard_error = (p * variance / samples).sqrt()
    rare = 8 * n.abs() / samples * (variance > 0)  # near the ends one event in 4,000 exceeds the standard error
    assert bool((error.abs() <= 5 * standard_error + rare + 1e-8).all()), "5, not 4: 2,000 entries at once"
    inside = standard_error > 0.02 * n.abs() / samples**0.5
    assert float((error / standard_error)[inside].square().mean()) == pytest.approx(1, abs=0.15), "nor is it too exact"
    assert float((drawn - mean).square().mean() / (p * variance).mean()) == pytest.approx(1, rel=0.02)


@both_masks
def test_01_the_mask_of_the_upload_follows_the_same_law(hyper: Hyper) -> None:
    (u, n), samples = entries(), 4000
    mean, variance = by_lemma_2(u, n, hyper.mask == "signed")
    hits = fedmrn.masks(u, n, uniform(samples, len(u), seed=1), hyper).double()
    update = n.double() * (2 * hits - 1 if hyper.mask == "signed" else hits)
    rare = 8 * n.abs() / samples * (variance > 0)
    assert bool(((update.mean(0) - mean).abs() <= 5 * (variance / samples).sqrt() + rare + 1e-8).all())


def test_03_alphabet() -> None:
    u, n = entries()
    ratio = fedmrn.masked_update(u, n, 1.0, uniform(2000), BINARY) / n
    assert set(ratio.tolist()) == {0.0, 1.0}
    ratio = fedmrn.masked_update(u, n, 1.0, uniform(2000), SIGNED) / n
    assert set(ratio.tolist()) == {-1.0, 1.0}


def test_03_at_zero_the_binary_update_is_zero_and_the_signed_one_a_coin() -> None:
    u, n = torch.zeros(2000), entries()[1]
    for p in (0.01, 0.5, 1.0):
        assert not fedmrn.masked_update(u, n, p, uniform(2000), BINARY).any()
    assert not fedmrn.masks(u, n, uniform(2000), BINARY).any()
    assert abs(int(fedmrn.masks(u, n, uniform(2000), SIGNED).sum()) - 1000) < 5 * 500**0.5


@both_masks
def test_04_saturation(hyper: Hyper) -> None:
    n = entries()[1]
    extremes = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24]).repeat(500)  # of what torch.rand can give
    low = 0.0 if hyper.mask == "binary" else -1.0
    assert fedmrn.masks(2 * n, n, extremes, hyper).all()
    assert not fedmrn.masks(-2 * n, n, extremes, hyper).any()
    for p in (1e-7, 0.1, 1 / 3, 0.7, 1.0):
        assert torch.equal(fedmrn.masked_update(2 * n, n, p, extremes, hyper), n)
        assert torch.equal(fedmrn.masked_update(-2 * n, n, p, extremes, hyper), low * n)


@both_masks
@pytest.mark.parametrize("p", [0.01, 0.5, 1.0])
def test_05_gradient_of_u_is_that_of_the_effective_weight(hyper: Hyper, p: float) -> None:
    task = digits_task()
    shard = task.shard(0)
    trainable, frozen = fedmrn.start(fedmrn.broadcast(task.initial(), hyper, task), hyper, task, Rng(1))
    ratios = torch.linspace(-3, 3, 4736)  # two thirds of the binary entries and more are saturated
    u = trainable["u"].detach().copy_(ratios * frozen["n"])
    loss = fedmrn.objective(trainable, frozen, shard, (p, uniform(4736)), hyper, task)
    (gradient,) = torch.autograd.grad(loss, trainable["u"])

    effective = flat(task.initial()) + plain_psm(u, frozen["n"], p, uniform(4736), hyper.mask == "signed")
    effective.requires_grad_()
    first, second = effective[:4096].view(64, 64), effective[4096:].view(10, 64)
    plain = functional.cross_entropy((shard[0].flatten(1) @ first.T).relu() @ second.T, shard[1])
    (expected,) = torch.autograd.grad(plain, effective)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, expected)
    assert float(expected.abs().max()) > 0.01


@pytest.mark.parametrize(("samples", "steps"), [(23, 15), (20, 12), (1, 3)])
def test_06_schedule_of_progressive_masking(samples: int, steps: int) -> None:
    """tau / S for tau = 1..S with S = 3 ceil(D / 5), seen by a made-up method that only notes what it is told."""
    seen: list[float] = []
    toy = ModuleType("toy")
    vars(toy).update(
        draws=lambda progress, *_: seen.append(progress), objective=lambda trainable, *_: trainable["u"].sum()
    )
    task = dataclasses.replace(digits_task(), plan=Plan(epochs=3, batch=5, lr=0.1))
    shard = (torch.zeros(samples, 1), torch.zeros(samples, dtype=torch.int64))
    u = torch.zeros(2, requires_grad=True)
    client_side.train(toy, {"u": u}, {}, shard, None, task, Rng(0))
    assert seen == [tau / steps for tau in range(1, steps + 1)]
    assert u.tolist() == pytest.approx([-0.1 * steps] * 2), "one step of SGD each"


def test_06_the_share_of_masked_entries_is_the_progress() -> None:
    n = entries()[1]
    for p in (1 / 12, 0.5, 1.0):
        update = fedmrn.masked_update(0.5 * n, n, p, uniform(2000), BINARY)
        masked = int((update != 0.5 * n).sum())
        assert abs(masked - 2000 * p) <= 5 * (2000 * p * (1 - p)) ** 0.5


@both_masks
def test_07_with_tiny_progress_the_forward_is_that_of_the_clipped_update(hyper: Hyper) -> None:
    task = digits_task()
    trainable, frozen = fedmrn.start(fedmrn.broadcast(task.initial(), hyper, task), hyper, task, Rng(1))
    ratios = torch.linspace(-3, 3, 4736)
    trainable["u"].detach().copy_(ratios * frozen["n"])
    found = fedmrn.objective(trainable, frozen, task.shard(0), (1e-9, uniform(4736)), hyper, task)
    w = flat(task.initial()) + ratios.clamp(0 if hyper.mask == "binary" else -1, 1) * frozen["n"]
    x, y = task.shard(0)
    plain = functional.cross_entropy((x.flatten(1) @ w[:4096].view(64, 64).T).relu() @ w[4096:].view(10, 64).T, y)
    torch.testing.assert_close(found, plain)


# Begin of the SHA-256 over two layers of 288 and 70 entries.
KNOWN_NOISE = {"uniform": "d4678f9eb98319ef", "gauss": "6e54b9df76196f11", "bernoulli": "1250ce5182b25115"}


def test_08_same_noise_in_another_process() -> None:
    """And on every machine: the server makes these bytes again from the seed that travelled."""
    code = """
import hashlib
import torch
from fedlib.methods import fedmrn
def digest(law):
    shapes = {"a": torch.Size([32, 1, 3, 3]), "b": torch.Size([10, 7])}
    n = fedmrn.noise(2**63 + 5, fedmrn.Hyper(noise=law, magnitude=0.005), shapes)
    return hashlib.sha256(n.numpy().astype("<f4").tobytes()).hexdigest()[:16]
found = {law: digest(law) for law in ("uniform", "gauss", "bernoulli")}
"""
    here: dict[str, Any] = {}
    exec(code, here)
    assert here["found"] == KNOWN_NOISE
    command, root = [sys.executable, "-c", code + "print(found, end='')"], Path(fedmrn.__file__).parents[2]
    there = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert there.stdout == str(KNOWN_NOISE)


def test_08_every_client_round_and_layer_has_noise_of_its_own() -> None:
    task = digits_task()
    message = fedmrn.broadcast(task.initial(), BINARY, task)
    places = [Rng(seed).child("client", number, k) for seed in (0, 1) for number in (1, 2) for k in (0, 1, 2)]
    noises = [fedmrn.start(message, BINARY, task, place)[1]["n"] for place in places]
    assert torch.equal(noises[0], fedmrn.start(message, BINARY, task, places[0])[1]["n"])
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert float(correlations.abs().max()) < 5 / 4736**0.5
    layers = fedmrn.noise(1, BINARY, {str(layer): torch.Size([4000]) for layer in range(6)}).view(6, 4000)
    assert float((torch.corrcoef(layers) - torch.eye(6)).abs().max()) < 5 / 4000**0.5


@pytest.mark.parametrize("d", [1, 7, 8, 9, 30, 1001])
def test_09_masks_survive_packing(d: int) -> None:
    mask = uniform(d).numpy() < 0.5
    packed = bits.pack(mask)
    assert len(packed) == math.ceil(d / 8)
    assert np.array_equal(bits.unpack(packed, d), mask)
    assert [packed[i // 8] >> i % 8 & 1 for i in range(d)] == mask.tolist(), "lowest bit first"


@both_masks
def test_09_upload_of_a_size_not_divisible_by_eight(hyper: Hyper) -> None:
    """3 weights and 3 biases: 1 byte of mask, 8 of seed, 12 in full precision."""
    task = task_with(nn.Linear(1, 3), Plan(epochs=1, batch=4, lr=0.3))
    shard = (torch.ones(1, 1), torch.tensor([0]))
    upload = client(zeros(task), shard, hyper, task, Rng(0))
    assert container.section_sizes(upload) == (8, 1, 12)
    assert len(upload) <= 8 + 1 + 12 + 64


def test_09_upload_of_cnn4() -> None:
    """Spec, section 5: d = 389,920, and a factor of at least 27 against what FedAvg really sends."""
    task = cnn4_task()
    upload = client(task.initial(), noise_images(), SIGNED, task, Rng(0))
    seed, mask, full, *others = container.section_sizes(upload)
    assert (seed, mask, full, others) == (8, 48_740, 7_680, [])
    assert 0 < len(upload) - (8 + 48_740 + 7_680) <= 64
    assert fedmrn.paper_bits(upload, SIGNED, task) == 389_920
    plain = fedavg.Hyper()
    full_upload = client_side.client(
        fedavg, fedavg.broadcast(task.initial(), plain, task), noise_images(), plain, task, Rng(0)
    )
    assert 1_567_360 <= len(full_upload) <= 1_567_360 + 64
    assert len(full_upload) / len(upload) > 27


def update_of(upload: bytes, hyper: Hyper) -> Tensor:
    """n m [d] of the perceptron, read from the bytes without the method's reader."""
    seed, mask, _ = container.unpack(
        upload, "fedmrn.up", digits_task().fingerprint("fedmrn", hyper), (8, 592, 0)
    ).sections
    number = int.from_bytes(seed, "little")
    n = np.concatenate([rng.uniform(number, layer, s.numel()) for layer, s in enumerate(LAYERS.values())])
    bit = np.array([mask[i // 8] >> i % 8 & 1 for i in range(4736)], dtype=np.float32)
    return torch.from_numpy(n * np.float32(hyper.magnitude) * (2 * bit - 1 if hyper.mask == "signed" else bit))


@both_masks
def test_10_server_rebuilds_the_update_bit_for_bit(hyper: Hyper) -> None:
    """On a model of zeros the new weights are the update itself."""
    task, place = digits_task(), Rng(3).child("client", 1, 2)
    trainable, frozen = fedmrn.start(fedmrn.broadcast(task.initial(), hyper, task), hyper, task, place)
    client_side.train(fedmrn, trainable, frozen, task.shard(2), hyper, task, place)
    upload = fedmrn.finish(trainable, frozen, 72, hyper, task, place)

    fresh = torch.rand(4736, generator=place.child("upload").torch())
    expected = plain_psm(trainable["u"].detach(), frozen["n"], 1.0, fresh, hyper.mask == "signed")
    rebuilt = server(zeros(task), hyper, task, upload)
    assert torch.equal(flat(rebuilt), expected)
    assert torch.equal(flat(rebuilt), update_of(upload, hyper))
    assert expected.count_nonzero() > 1000


@both_masks
def test_11_one_client_gives_w_plus_its_masked_noise(hyper: Hyper) -> None:
    task = digits_task()
    state = task.initial()
    upload = client(state, task.shard(0), hyper, task, Rng(0))
    assert torch.equal(flat(server(state, hyper, task, upload)), flat(state) + update_of(upload, hyper))
    assert torch.equal(flat(state), flat(task.initial())), "the old state is left alone"


@both_masks
def test_11_mean_by_sample_counts_in_any_order(hyper: Hyper) -> None:
    task = digits_task()
    state, (x, y) = task.initial(), task.shard(0)
    uploads = [client(state, (x[:count], y[:count]), hyper, task, Rng(count)) for count in (10, 20, 50)]
    a, b, c = (update_of(upload, hyper) for upload in uploads)
    found = server(state, hyper, task, *uploads)
    torch.testing.assert_close(flat(found), flat(state) + (a + 2 * b + 5 * c) / 8)
    torch.testing.assert_close(server(state, hyper, task, *uploads[::-1]), found, rtol=1e-7, atol=1e-8)


@both_masks
def test_12_base_weights_do_not_move(hyper: Hyper) -> None:
    task = cnn4_task()
    message = fedmrn.broadcast(task.initial(), hyper, task)
    trainable, frozen = fedmrn.start(message, hyper, task, Rng(0))
    w, n = frozen["w"].clone(), frozen["n"].clone()
    vectors = {name: trainable[name].detach().clone() for name in task.vectors}
    client_side.train(fedmrn, trainable, frozen, noise_images(), hyper, task, Rng(0))
    assert torch.equal(frozen["w"], w) and torch.equal(frozen["n"], n)
    assert torch.equal(w, torch.cat([task.initial()[name].flatten() for name in task.weights]))
    assert trainable["u"].count_nonzero() > 300_000
    assert all(not torch.equal(trainable[name], before) for name, before in vectors.items()), "BatchNorm is trained"


def test_batchnorm_travels_in_full_precision() -> None:
    """Scale, shift and statistics of two clients, averaged by 4 : 2 like in FedAvg; weights get masked noise alone."""
    task, (x, y) = cnn4_task(), noise_images()
    state = task.initial()
    uploads, ends = [], []
    for place, shard in ((Rng(0), (x[:4], y[:4])), (Rng(1), (x[4:], y[4:]))):
        trainable, frozen = fedmrn.start(fedmrn.broadcast(state, BINARY, task), BINARY, task, place)
        client_side.train(fedmrn, trainable, frozen, shard, BINARY, task, place)
        uploads.append(fedmrn.finish(trainable, frozen, len(shard[1]), BINARY, task, place))
        ends.append({name: tensor.detach() for name, tensor in (trainable | frozen).items()})
    found = server(state, BINARY, task, *uploads)
    assert list(found) == list(task.tensors)
    for name in task.vectors | task.statistics:
        torch.testing.assert_close(found[name], (2 * ends[0][name] + ends[1][name]) / 3)
        assert not torch.equal(found[name], state[name])
    for name in task.weights:
        moved = (found[name] - state[name]).abs()
        assert 0 < float(moved.max()) <= BINARY.magnitude + 1e-6


@pytest.mark.parametrize(
    ("law", "variance", "fourth"), [("uniform", 1 / 3, 1 / 5), ("gauss", 1.0, 3.0), ("bernoulli", 1.0, 1.0)]
)
def test_13_noise_law(law: str, variance: float, fourth: float) -> None:
    a, d = 0.02, 400_000
    n = fedmrn.noise(11, Hyper(noise=law, magnitude=a), {"x": torch.Size([d // 4, 4])}).double() / a
    assert n.shape == (d,)
    assert abs(float(n.mean())) < 5 * (variance / d) ** 0.5
    assert abs(float((n**2).mean()) - variance) <= 5 * ((fourth - variance**2) / d) ** 0.5 + 1e-6
    assert float(n.abs().min()) * a >= 1e-8 * (1 - 1e-6)
    largest = float(n.abs().max())
    assert (0.9999 < largest <= 1.000001) if law != "gauss" else (4 < largest < 6.5)


def test_13_tiny_noise_is_replaced() -> None:
    """Uniform on +-1e-6: one entry in a hundred lies below 1e-8 and becomes +1e-8, the others stay as drawn."""
    n = fedmrn.noise(11, Hyper(magnitude=1e-6), {"x": torch.Size([40_000])}).numpy()
    drawn = rng.uniform(11, 0, 40_000) * np.float32(1e-6)
    tiny = np.abs(drawn) < 1e-8
    assert abs(int(tiny.sum()) - 400) < 100 and bool((drawn[tiny] < 0).any())
    assert np.array_equal(n[~tiny], drawn[~tiny])
    assert set(n[tiny].tolist()) == {float(np.float32(1e-8))}


def g(u: float, law: str, a: float) -> float:
    """Lemma 4: E min(|u|, |n|)."""
    size = abs(u)
    if law == "uniform":
        return size - size**2 / (2 * a)
    if law == "bernoulli":
        return min(size, a)
    return a * math.sqrt(2 / math.pi) * (1 - math.exp(-(size**2) / (2 * a**2))) + size * (
        1 - math.erf(size / a / math.sqrt(2))
    )


@pytest.mark.parametrize("law", ["uniform", "gauss", "bernoulli"])
@pytest.mark.parametrize("u", [0.7, -0.3])
def test_14_average_over_fresh_noise(law: str, u: float) -> None:
    """A binary mask passes half of what a signed one passes: half of the noise has the wrong sign."""
    a, d = 0.02, 400_000
    for mask, share in (("signed", 1.0), ("binary", 0.5)):
        hyper = Hyper(mask=mask, noise=law, magnitude=a)
        n = fedmrn.noise(5, hyper, {"x": torch.Size([d])})
        drawn = fedmrn.masked_update(torch.full((d,), u * a), n, 1.0, uniform(d), hyper).double()
        expected = math.copysign(share * g(u * a, law, a), u)
        assert abs(float(drawn.mean()) - expected) < 5 * float(drawn.std()) / d**0.5
        assert 5 * float(drawn.std()) / d**0.5 < 0.05 * abs(expected), "fine enough to tell"


def test_15_many_signed_clients_tend_to_fedavg() -> None:
    """Identical data, one step, noise +-alpha four times the largest update: unbiased, with variance alpha^2 / K."""
    task = dataclasses.replace(digits_task(), plan=Plan(epochs=1, batch=72, lr=1e-3))
    state, shard, plain = task.initial(), task.shard(0), fedavg.Hyper()
    message = client_side.client(fedavg, fedavg.broadcast(state, plain, task), shard, plain, task, Rng(0))
    exact = flat(fedavg.server(state, Uploads([(0, message)]), plain, task)) - flat(state)
    alpha = 4 * float(exact.abs().max())
    hyper = Hyper(mask="signed", noise="bernoulli", magnitude=alpha)
    uploads = [client(state, shard, hyper, task, Rng(0).child(k)) for k in range(400)]
    for count in (25, 400):
        mean = flat(server(state, hyper, task, *uploads[:count])) - flat(state)
        assert float((mean - exact).square().mean()) == pytest.approx(alpha**2 / count, rel=0.1)
    slope, error = float(mean @ exact / exact.square().sum()), alpha / 400**0.5 / float(exact.norm())
    assert slope == pytest.approx(1, abs=5 * error)
    assert error < 0.1


def test_16_with_two_valued_noise_the_sign_of_the_noise_does_not_matter() -> None:
    """The transmitted entry is +alpha with probability (1 + u / alpha) / 2: FedBAT's binarisation with a fixed step."""
    hyper, samples = Hyper(mask="signed", noise="bernoulli", magnitude=0.03), 100_000
    for ratio in (-1.2, -1.0, -0.4, 0.0, 0.7, 1.0):
        n = fedmrn.noise(2, hyper, {"x": torch.Size([samples])})
        assert set(n.abs().tolist()) == {float(np.float32(0.03))}
        update = fedmrn.masked_update(torch.full((samples,), ratio * 0.03), n, 1.0, uniform(samples), hyper)
        chance = min(max((1 + ratio) / 2, 0), 1)
        for side in (n > 0, n < 0):
            up = int((update[side] > 0).sum())
            assert abs(up - chance * int(side.sum())) <= 5 * (int(side.sum()) * chance * (1 - chance)) ** 0.5


def plain_round(state: State, shard: Shard, hyper: Hyper, plan: Plan, place: Rng) -> tuple[Tensor, Tensor]:
    """Section 4.7 for the perceptron, layer by layer in plain torch: final u and uploaded n m, both flat [d]."""
    signed, low = hyper.mask == "signed", -1.0 if hyper.mask == "signed" else 0.0
    sizes, seed = [4096, 640], place.child("noise").seed()
    w = [state[name] for name in LAYERS]
    n = [
        torch.from_numpy(rng.uniform(seed, layer, v.numel())).view_as(v) * hyper.magnitude for layer, v in enumerate(w)
    ]
    u = [torch.zeros_like(v) for v in w]
    order, draws = place.child("order").torch(), place.child("draws").torch()
    steps, tau = plan.epochs * math.ceil(len(shard[0]) / plan.batch), 0
    for _ in range(plan.epochs):
        permutation = torch.randperm(len(shard[0]), generator=order).tolist()
        while permutation:
            batch, permutation = permutation[: plan.batch], permutation[plan.batch :]
            tau += 1
            effective = []
            for wl, nl, ul, draw in zip(w, n, u, torch.split(torch.rand(4736, generator=draws), sizes), strict=True):
                ratio, draw = (ul / nl).clamp(low, 1), draw.view_as(wl)
                hit = draw * steps / tau < ((ratio + 1) / 2 if signed else ratio)
                hard = torch.where(hit, nl, -nl if signed else torch.zeros_like(nl))
                effective.append((wl + torch.where(draw < tau / steps, hard, ratio * nl)).requires_grad_())
            logits = functional.linear(functional.linear(shard[0][batch].flatten(1), effective[0]).relu(), effective[1])
            gradients = torch.autograd.grad(functional.cross_entropy(logits, shard[1][batch]), effective)
            u = [ul - plan.lr * gradient for ul, gradient in zip(u, gradients, strict=True)]
    flat_u, flat_n = torch.cat([v.flatten() for v in u]), torch.cat([v.flatten() for v in n])
    fresh = torch.rand(4736, generator=place.child("upload").torch())
    return flat_u, plain_psm(flat_u, flat_n, 1.0, fresh, signed)


@both_masks
def test_client_round_equals_the_pseudo_code(hyper: Hyper) -> None:
    task, place = digits_task(), Rng(9).child("client", 4, 1)
    state, shard = task.initial(), task.shard(1)
    u, update = plain_round(state, shard, hyper, task.plan, place)
    trainable, frozen = fedmrn.start(fedmrn.broadcast(state, hyper, task), hyper, task, place)
    client_side.train(fedmrn, trainable, frozen, shard, hyper, task, place)
    torch.testing.assert_close(trainable["u"].detach(), u)
    found = update_of(client(state, shard, hyper, task, place), hyper)
    assert int((found != update).sum()) <= 2, "an entry on the edge of its draw may fall to either side"


def test_masked_update_worked_by_hand() -> None:
    """At progress 1/2 a draw below 1/2 masks: u/n = 1/2 passes below 1/4 (binary) or 3/8 (signed), -1/2 below 1/8."""
    n = torch.tensor([0.5, -0.5, -0.5, 0.5, -0.5, 0.5, -0.5])
    u = torch.tensor([0.25, -0.25, -0.25, 0.25, 0.25, 2.0, 0.25])  # u/n: four times 1/2, then -1/2, 4, -1/2
    draw = torch.tensor([0.2, 0.3, 0.45, 0.9, 0.1, 0.9, 0.6])
    binary = fedmrn.masked_update(u, n, 0.5, draw, Hyper(mask="binary"))
    assert binary.tolist() == [0.5, 0.0, 0.0, 0.25, 0.0, 0.5, 0.0]
    signed = fedmrn.masked_update(u, n, 0.5, draw, Hyper(mask="signed"))
    assert signed.tolist() == [0.5, -0.5, 0.5, 0.25, -0.5, 0.5, 0.25]
    sampled = fedmrn.masks(u, n, draw, Hyper(mask="signed"))
    assert sampled.tolist() == [True, True, True, False, True, True, False], "below 3/4, or 1/4, or always"


def test_upload_depends_on_its_place_in_the_tree_of_draws_alone() -> None:
    task = digits_task()
    torch.manual_seed(1)
    first = client(task.initial(), task.shard(0), BINARY, task, Rng(0))
    torch.manual_seed(2)
    assert client(task.initial(), task.shard(0), BINARY, task, Rng(0)) == first
    assert client(task.initial(), task.shard(0), BINARY, task, Rng(1)) != first


def test_unusable_uploads_are_left_out_and_named() -> None:
    task, state = digits_task(), digits_task().initial()
    good = client(state, task.shard(0), BINARY, task, Rng(0))
    fingerprint = task.fingerprint("fedmrn", BINARY)
    short = container.pack("fedmrn.up", fingerprint, 72, [b"seven b", bytes(592), b""])
    narrow = container.pack("fedmrn.up", fingerprint, 72, [bytes(8), bytes(591), b""])
    signed = client(state, task.shard(0), SIGNED, task, Rng(0))
    altered = good[:200] + bytes([good[200] ^ 1]) + good[201:]
    uploads = Uploads(enumerate([short, narrow, signed, altered, good[:-1], good, b""]))
    found = fedmrn.server(state, uploads, BINARY, task)
    assert uploads.accepted == [5] and [k for k, _ in uploads.refused] == [0, 1, 2, 3, 4, 6]
    assert torch.equal(flat(found), flat(server(state, BINARY, task, good)))


def test_diverged_client_sends_nothing() -> None:
    task = dataclasses.replace(digits_task(), plan=Plan(epochs=2, batch=16, lr=1e10))
    x, y = task.shard(0)
    with pytest.raises(PayloadError, match="not finite"):
        client(task.initial(), (x * 1e30, y), BINARY, task, Rng(0))


@pytest.mark.parametrize(
    ("values", "field"),
    [({"mask": "ternary"}, "mask"), ({"noise": "laplace"}, "noise"), ({"magnitude": 0.0}, "magnitude")],
)
def test_bad_settings_are_named(values: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError, match=f"hyper.{field}: .*"):
        Hyper(**values)
