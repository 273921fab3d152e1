"""FedMRN's messages and its server: properties 9 to 11 of its specification (section 10), by number, both codings, both
weightings, and malformed masks."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from common import range_coded
from fedmrn_references import (
    LAYERS,
    begun_at,
    cnn4_task,
    each_mask,
    flat,
    fresh,
    noise_images,
    of,
    plain_update,
    received,
    zeros,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import NONE, ONE, begun, digits_task, layers_task, make_task, served, trained, uploaded
from torch import Tensor, nn

from fedlib import rng
from fedlib.core.method import Local
from fedlib.core.plan import Plan
from fedlib.core.uploads import NoUpdate
from fedlib.errors import PayloadError
from fedlib.methods.fedavg import FedAvg
from fedlib.methods.fedmrn import FedMRN
from fedlib.rng import Rng
from fedlib.wire import container, entropy

pytestmark = pytest.mark.usefixtures("one_thread")


# Sizes


@each_mask
def test_09_upload_of_a_size_not_divisible_by_eight(mask: str) -> None:
    """3 weights and 3 biases: 1 byte of mask, 8 of seed, 12 in full precision."""
    method = of(mask, make_task(nn.Linear(1, 3), Plan(epochs=1, batch=4, lr=0.3)))
    upload = uploaded(method, ONE, Rng(0), zeros(method.task))
    assert container.section_sizes(upload) == (8, 1, 12)
    assert len(upload) <= 8 + 1 + 12 + 64


def test_09_upload_of_cnn4() -> None:
    """Spec, section 5: d = 389,920, and a factor of at least 27 against what FedAvg really sends."""
    method = of("signed", cnn4_task())
    upload = uploaded(method, noise_images(), Rng(0))
    assert container.section_sizes(upload) == (8, 48_740, 7_680)
    assert 0 < len(upload) - (8 + 48_740 + 7_680) <= 64
    assert method.sizes(upload).paper == 389_920
    full_upload = uploaded(FedAvg().bind(cnn4_task()), noise_images(), Rng(0))
    assert 1_567_360 <= len(full_upload) <= 1_567_360 + 64
    assert len(full_upload) / len(upload) > 27


# The server


def update_of(upload: bytes, method: FedMRN) -> Tensor:
    """n m [d] of the perceptron, read from the bytes without the method's reader."""
    seed, mask, _ = container.unpack(upload, "fedmrn.up", method.fingerprint(), (8, 592, 0)).sections
    number = int.from_bytes(seed, "little")
    n = np.concatenate([rng.uniform(number, layer, s.numel()) for layer, s in enumerate(LAYERS.values())])
    bit = np.array([mask[i // 8] >> i % 8 & 1 for i in range(4736)], dtype=np.float32)
    return torch.from_numpy(n * np.float32(method.magnitude) * (2 * bit - 1 if method.mask == "signed" else bit))


@each_mask
def test_10_server_rebuilds_the_update_bit_for_bit(mask: str) -> None:
    """On a model of zeros the new weights are the update itself."""
    method, place = of(mask), Rng(3).child("client", 1, 2)
    local = trained(method, method.task.shard(2), place)
    upload = method.upload(local, NONE, place)
    expected = plain_update(local.trainable["u"].detach(), local.frozen["n"], 1.0, fresh(place), mask)
    rebuilt = received(method, upload)
    assert torch.equal(rebuilt, expected)
    assert torch.equal(rebuilt, update_of(upload, method))
    assert expected.count_nonzero() > 1000


@each_mask
def test_11_one_client_gives_w_plus_its_masked_noise(mask: str) -> None:
    method, model = of(mask), digits_task().initial()
    upload = uploaded(method, method.task.shard(0), Rng(0), model)
    assert torch.equal(flat(served(method, upload, model=model)), flat(model) + update_of(upload, method))
    assert torch.equal(flat(model), flat(method.task.initial())), "the old state is left alone"


@each_mask
def test_11_mean_by_sample_counts_in_any_order(mask: str) -> None:
    method, (x, y) = of(mask), digits_task().shard(0)
    uploads = [uploaded(method, (x[:count], y[:count]), Rng(count)) for count in (10, 20, 50)]
    a, b, c = (update_of(upload, method) for upload in uploads)
    found = served(method, *uploads)
    torch.testing.assert_close(flat(found), flat(method.task.initial()) + (a + 2 * b + 5 * c) / 8)
    torch.testing.assert_close(served(method, *uploads[::-1]), found, rtol=1e-7, atol=1e-8)


def test_batchnorm_travels_in_full_precision() -> None:
    """Scale, shift and statistics of two clients, averaged by 4 : 2 like in FedAvg; weights get masked noise alone."""
    method, (x, y) = of("binary", cnn4_task()), noise_images()
    model, uploads, ends = method.task.initial(), [], []
    for place, shard in ((Rng(0), (x[:4], y[:4])), (Rng(1), (x[4:], y[4:]))):
        local = trained(method, shard, place)
        uploads.append(method.upload(local, NONE, place))
        ends.append({name: tensor.detach() for name, tensor in (local.trainable | local.frozen).items()})
    found = served(method, *uploads)
    assert list(found) == list(method.task.tensors)
    for name in method.task.vectors | method.task.statistics:
        torch.testing.assert_close(found[name], (2 * ends[0][name] + ends[1][name]) / 3)
        assert not torch.equal(found[name], model[name])
    for name in method.task.weights:
        moved = (found[name] - model[name]).abs()
        assert 0 < float(moved.max()) <= method.magnitude + 1e-6


def test_weights_by_batches_worked_by_hand() -> None:
    """33, 32 and 1 samples in batches of 32: weights 2, 1 and 1; by samples 33, 32 and 1."""
    task = digits_task(clients=10, epochs=2, batch=32)
    x, y = task.shard(0)
    for weighting, weights in (("batches", (2, 1, 1)), ("samples", (33, 32, 1))):
        method = of("signed", task, weighting=weighting)
        uploads = [uploaded(method, (x[:count], y[:count]), Rng(count)) for count in (33, 32, 1)]
        parts = [received(method, upload) for upload in uploads]
        expected = sum(weight / sum(weights) * part for weight, part in zip(weights, parts, strict=True))
        moved = flat(served(method, *uploads)) - flat(task.initial())
        torch.testing.assert_close(moved, torch.as_tensor(expected), rtol=1e-5, atol=1e-7)


def test_weighting_does_not_change_what_is_sent_but_for_the_agreement_on_it() -> None:
    """The fingerprint differs: a server that weights otherwise refuses the upload."""
    samples, batches = of(), of(weighting="batches")
    first, second = (uploaded(method, method.task.shard(0), Rng(0)) for method in (samples, batches))
    assert container.section_sizes(first) == container.section_sizes(second)
    assert torch.equal(received(samples, first), received(batches, second))
    with pytest.raises(NoUpdate):
        received(batches, first)


def test_upload_depends_on_its_place_in_the_tree_of_draws_alone() -> None:
    method = of()
    torch.manual_seed(1)
    first = uploaded(method, method.task.shard(0), Rng(0))
    torch.manual_seed(2)
    assert uploaded(method, method.task.shard(0), Rng(0)) == first
    assert uploaded(method, method.task.shard(0), Rng(1)) != first


# Entropy coding


@each_mask
@pytest.mark.parametrize("law", ["uniform", "gauss", "bernoulli"])
def test_both_codings_say_the_same(mask: str, law: str) -> None:
    packed = of(mask, noise=law)
    coded = dataclasses.replace(packed, coding="entropy")
    locals_ = [trained(method, method.task.shard(1), Rng(3)) for method in (packed, coded)]
    (u, n), (other_u, other_n) = ((local.trainable["u"], local.frozen["n"]) for local in locals_)
    assert torch.equal(u, other_u) and torch.equal(n, other_n), "coding has no part in training"
    first, second = (m.upload(local, NONE, Rng(3)) for m, local in zip((packed, coded), locals_, strict=True))
    update = received(packed, first)
    assert torch.equal(received(coded, second), update) and int(update.count_nonzero()) > 300
    sizes, coded_sizes = container.section_sizes(first), container.section_sizes(second)
    assert sizes == (8, 592, 0) and (coded_sizes[0], coded_sizes[2]) == (8, 0)
    assert coded_sizes[1] <= 593, "at worst a byte that says: packed"
    assert coded.sizes(second).paper == 4736
    with pytest.raises(NoUpdate):
        received(packed, second)


@range_coded
@pytest.mark.parametrize("rho", [0.01, 0.1, 0.3])
def test_small_binary_updates_take_fewer_bits_than_their_density_says(rho: float) -> None:
    """Specification, section 13: for uniform noise and |u| = rho a the density is (rho + rho ln(1 / rho)) / 2.

    A coder that knows the density alone needs its entropy; one that knows |n| too needs less.
    """
    method, d = of(task=layers_task((300, 400), (50, 400)), coding="entropy"), 140_000
    local = begun(method, rng=Rng(2))
    n = local.frozen["n"]
    local.trainable["u"].detach().fill_(rho * method.magnitude)
    upload = method.upload(local, NONE, Rng(2))
    density = (rho + rho * math.log(1 / rho)) / 2
    seed, mask, full = container.unpack(upload, "fedmrn.up", method.fingerprint(), [8, d, 0]).sections
    update = method.decode([seed, mask], method.magnitude)
    assert int(update.count_nonzero()) == pytest.approx(d * density, abs=5 * (d * density) ** 0.5)
    assert set((update / n).tolist()) == {0.0, 1.0} and len(full) == 0
    shannon = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert 8 * len(mask) < 0.97 * d * shannon < 0.97 * d


def test_entries_share_a_model_by_layer_and_size_of_noise() -> None:
    """a = 0.5: from 1.5 on the last of twenty, then from 1, 0.75, 0.5, 0.375, 0.25 on; the next layer begins anew."""
    method = FedMRN().bind(layers_task((1, 5), (1, 3)))
    n = torch.tensor([1.6, -1.4, 0.9, -0.5, 1e-8, -1.6, 0.4, 0.3])
    assert method.contexts(n, 0.5).tolist() == [19, 18, 17, 16, 0, 39, 35, 34]


# Malformed masks


@functools.cache
def honest(mask: str, small: bool) -> tuple[FedMRN, Local, tuple[bytes, bytes]]:
    """A client with u a tenth of the noise's magnitude, or two fifths; and its seed and mask, coded."""
    method = of(mask, coding="entropy")
    local = begun_at(method, torch.zeros(4736), Rng(0))
    local.trainable["u"].detach().fill_((0.1 if small else 0.4) * method.magnitude)
    upload = method.upload(local, NONE, Rng(0))
    seed, coded, _ = container.unpack(upload, "fedmrn.up", method.fingerprint(), [8, 10**4, 0]).sections
    return method, local, (bytes(seed), bytes(coded))


def decoded(method: FedMRN, *parts: bytes) -> Tensor:
    return method.decode([memoryview(part) for part in parts], method.magnitude)


@range_coded
@pytest.mark.parametrize(("mask", "small"), [("binary", True), ("binary", False), ("signed", False)])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_altered_masks_are_refused_or_another_mask(mask: str, small: bool, data: st.DataObject) -> None:
    method, local, (seed, coded) = honest(mask, small)
    part = bytearray(coded)
    part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        u = decoded(method, seed, bytes(part))
    except PayloadError:
        return
    assert set((u / local.frozen["n"]).tolist()) <= ({-1.0, 1.0} if mask == "signed" else {0.0, 1.0})
    assert not torch.equal(u, decoded(method, seed, coded))


@range_coded
def test_a_coded_mask_under_another_seed_or_not_coded_is_refused() -> None:
    """Other noise makes other contexts."""
    method, _, (seed, coded) = honest("binary", True)
    assert coded[0] == entropy.CONTEXTS and len(coded) < 400
    assert decoded(method, seed, coded).shape == (4736,)
    for parts in ((bytes([seed[0] ^ 1]) + seed[1:], coded), (seed, bytes(592))):
        with pytest.raises(PayloadError):
            decoded(method, *parts)
