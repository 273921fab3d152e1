"""FedPM's fixed weights, its masks, and the models that they make. Properties 1, 2 and 5 of the specification's
section 9, by number; 13, the table of section 10, is in tests/runs/test_fedsparse_digits.py.

The oracles are numbers worked by hand, closed forms, and plain loops.
"""

import hashlib
import logging
import math

import numpy as np
import pytest
import torch
from fedsparse_toys import SMALL, begin, flat, make_task, mask_in, send, small, state_of, uniform
from small_task import images, train
from torch import Tensor, nn

from fedlib.core import optimizers
from fedlib.core.plan import Tensors
from fedlib.errors import PayloadError, SpecError
from fedlib.methods.fedsparse.masks import binary_entropy, fixed_weights, layers, pack_mask
from fedlib.methods.fedsparse.method import FedPM
from fedlib.rng import Rng
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")

# Fixed weights

# The first eight signs of each tensor under seed 2^63 + 5.
KNOWN_SIGNS = {"0.weight": "+++++-++", "0.bias": "-++-", "3.weight": "++-+-+++", "3.bias": "---"}
KNOWN_WEIGHTS = "8841558bdbab3487"  # begin of the SHA-256 of all 271 in the scale of the code


def test_01_fixed_weights_are_known_from_the_seed_alone() -> None:
    w = fixed_weights(2**63 + 5, "fedpm", small().shapes)
    assert w.dtype == torch.float32 and w.shape == (271,)
    found = {name: "".join("+" if v > 0 else "-" for v in w[part][:8].tolist()) for name, part in SMALL.items()}
    assert found == KNOWN_SIGNS
    assert hashlib.sha256(w.numpy().astype("<f4").tobytes()).hexdigest()[:16] == KNOWN_WEIGHTS
    torch.manual_seed(1)
    again = make_task(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    assert torch.equal(FedPM(weight_scale="fedpm").bind(again).weights(2**63 + 5), w), "not of the network's"


@pytest.mark.parametrize(("scale", "factor"), [("kaiming", math.sqrt(2)), ("fedpm", math.e), ("critical", 2.0)])
def test_01_weight_scales(scale: str, factor: float) -> None:
    """One constant a layer, c = factor / sqrt(fan_in); a bias has that of its layer."""
    method = small(weight_scale=scale)
    w = method.weights(1)
    for name, part in SMALL.items():
        fan_in = 18 if name.startswith("0") else 64
        assert set(w[part].abs().tolist()) == {float(np.float32(factor / math.sqrt(fan_in)))}
    parts = layers(w, method.shapes)
    assert {name: tuple(tensor.shape) for name, tensor in parts.items()} == {
        "0.weight": (4, 2, 3, 3), "0.bias": (4,), "3.weight": (3, 64), "3.bias": (3,)
    }  # fmt: skip
    assert all(torch.equal(parts[name].flatten(), w[part]) for name, part in SMALL.items())


def test_01_weights_stay_through_training_and_come_from_the_message_s_seed() -> None:
    """A seed has 64 bits, of which the highest is not a sign."""
    method, seeds = small(lam=0.0), set[int]()
    for number in range(4):
        state, shard = method.initial(Rng(number)), images(10)
        local = method.begin(method.broadcast(state), shard, Rng(0))
        before = local.trainable["s"].detach().clone()
        train(method, local, shard, Rng(0))
        assert local.seed == state.own.seed
        assert torch.equal(local.frozen["w"], method.weights(local.seed))
        assert not torch.equal(local.trainable["s"], before)
        seeds.add(local.seed)
    assert len(seeds) == 4 and 0 <= min(seeds) < 2**63 <= max(seeds) < 2**64


def test_02_only_scores_are_trained() -> None:
    method = small(lam=0.0)
    local = begin(method)
    trainable, frozen = local.trainable, local.frozen
    assert trainable.keys() == {"s"} and trainable["s"].requires_grad and trainable["s"].is_leaf
    assert frozen.keys() == {"w", "theta"} and not any(tensor.requires_grad for tensor in frozen.values())
    assert optimizers.moments(method.task.plan, trainable).keys() == {"first s", "second s", "steps"}
    method.loss(trainable, frozen, images(10), uniform(271)).backward()
    assert frozen["w"].grad is None and trainable["s"].grad is not None
    assert all(p.grad is None for p in method.task.network.parameters()), "the network's own weights have no part in it"


@pytest.mark.parametrize("delta", [1e-9, 1e-8, 1e-7, 1e-6, 1e-3, 0.01, 0.25])
def test_02_clients_start_from_the_logit_of_theta(delta: float) -> None:
    """theta is clamped to [delta, 1 - delta] for the scores alone."""
    theta, edge = torch.tensor([0.0, 0.01, 0.5, 0.75, 1.0]), math.log((1 - delta) / delta)
    method = flat(5, delta=delta)
    local = method.begin(method.broadcast(state_of(theta)), images(10), Rng(0))
    expected = [-edge, max(-edge, math.log(0.01 / 0.99)), 0.0, min(edge, math.log(3)), edge]
    assert local.trainable["s"].tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(local.frozen["theta"], theta) and local.samples == 10


def test_initial_probabilities_are_those_of_standard_normal_scores() -> None:
    """Section 4.3: theta has mean 0.5, theta (1 - theta) 0.2066, the entropy of an entry 0.865 bits."""
    theta = flat(200_000).initial(Rng(0)).model["theta"].double()
    assert float(theta.mean()) == pytest.approx(0.5, abs=5 * 0.2083 / 200_000**0.5)
    assert float((theta * (1 - theta)).mean()) == pytest.approx(0.2066, abs=1e-3)
    assert float(binary_entropy(theta).mean()) == pytest.approx(0.865, abs=2e-3)


def test_networks_with_batchnorm_are_refused() -> None:
    task = make_task(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)))
    message = small().broadcast(small().initial(Rng(0)))
    for function in (lambda m: m.initial(Rng(0)), lambda m: m.begin(message, images(10), Rng(0))):
        with pytest.raises(SpecError, match="model: fedpm masks networks without BatchNorm"):
            function(FedPM().bind(task))


# Sampled masks


def test_05_sampled_masks_have_the_means_theta() -> None:
    theta, draws = torch.tensor([0.0, 1e-3, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0]), 100_000
    found = flat(8 * draws).draw_mask(theta.repeat(draws), Rng(0).stream()).view(draws, 8)
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    error = (found.double().mean(0) - theta).abs()
    assert bool((error <= 5 * (theta * (1 - theta) / draws).sqrt() + 1e-7).all())
    assert found[:, 0].sum() == 0 and found[:, 7].sum() == draws


def test_05_uploaded_and_trained_masks_have_the_means_theta() -> None:
    """A hundred thousand draws of each of five scores: at the end of the round, and in a forward pass."""
    method, scores = flat(100_000), torch.tensor([-6.0, -1.0, 0.0, 2.0, 5.0]).repeat(20_000)
    theta = torch.sigmoid(scores[:5].double())
    sent, trained = torch.zeros(5), torch.zeros(5)
    for number in range(5):
        sent += mask_in(method, send(method, scores, Rng(number))).view(-1, 5).sum(0)
        drawn = method.draw(0.5, Rng(number).stream())
        trained += method.mask(torch.sigmoid(scores), drawn).view(-1, 5).sum(0)
    for found in (sent, trained):
        assert bool(((found / 1e5 - theta).abs() <= 5 * (theta * (1 - theta) / 1e5).sqrt()).all())
    assert not torch.equal(sent, trained)


def test_05_each_client_and_round_draws_its_own_mask() -> None:
    method = flat(4000)
    places = [Rng(seed).child("client", number, k) for seed in (0, 1) for number in (1, 2) for k in (0, 1)]
    found = [mask_in(method, send(method, torch.zeros(4000), place)) for place in places]
    assert float((torch.corrcoef(torch.stack(found).float()) - torch.eye(8)).abs().max()) < 5 / 4000**0.5


# Masks without chance


def test_threshold_by_hand() -> None:
    method, scores = flat(5, masking="threshold"), torch.tensor([-1.0, 0.0, 1e-6, 30.0, -0.0])
    for place in (Rng(0), Rng(1)):
        assert mask_in(method, send(method, scores, place)).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize(("keep", "kept"), [(0.5, [2, 3]), (0.2, [1, 1]), (1e-6, [1, 1]), (1.0, [4, 6])])
def test_top_by_hand(keep: float, kept: list[int]) -> None:
    """The largest of each layer, never fewer than one."""
    method = flat(4, 6, masking="top", keep=keep)
    scores = torch.tensor([-5.0, -4.0, -6.0, -7.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0])
    for place in (Rng(0), Rng(1)):
        mask = mask_in(method, send(method, scores, place))
        falling = [1, 0, 2, 3], [5, 7, 9, 8, 6, 4]  # places of the scores, the largest first
        expected = {*falling[0][: kept[0]], *falling[1][: kept[1]]}
        assert set(mask.nonzero().flatten().tolist()) == expected


def test_top_keeps_its_share_where_scores_are_equal() -> None:
    """A mean of masks has many equal entries: none of them may bring in all others of its size."""
    method = flat(100, 50, masking="top", keep=0.2)
    theta = torch.cat([(torch.arange(100) < 10).float(), torch.full((50,), 0.5)])
    (model,) = method.models(state_of(theta), Rng(0))
    assert [int((tensor != 0).sum()) for tensor in model.values()] == [20, 10]
    assert all(bool((tensor.flatten()[:10] != 0).all()) for tensor in list(model.values())[:1])
    for scores in (torch.zeros(150), torch.logit(theta.clamp(1e-3, 1 - 1e-3))):
        mask = method.mask(torch.sigmoid(scores), uniform(1))
        assert [int(mask[:100].sum()), int(mask[100:].sum())] == [20, 10]


# The models that a state stands for, and the stored one


def vector(model: Tensors) -> Tensor:
    assert {name: tensor.shape for name, tensor in model.items()} == small().task.tensors
    return torch.cat([model[name].flatten() for name in SMALL])


def test_models_that_a_state_stands_for() -> None:
    """Unclamped theta: entries at 0 and 1 are certain. Five masks of their own; or the mean; or theta > 1/2."""
    theta = uniform(271, seed=5)
    theta[:40], theta[40:80], theta[80] = 0.0, 1.0, 0.5
    state, w = state_of(theta), small().weights(7)
    found = [vector(model) / w for model in small().models(state, Rng(0))]
    assert len(found) == 5
    for mask in found:
        assert set(mask.abs().tolist()) == {0.0, 1.0}
        assert not mask[:40].any() and bool((mask[40:80] == 1).all())
    assert len({tuple(mask.tolist()) for mask in found}) == 5
    again = small().models(state, Rng(0))
    assert all(torch.equal(vector(model) / w, mask) for model, mask in zip(again, found, strict=True))
    (mean,) = small(evaluated="mean").models(state, Rng(0))
    assert torch.equal(vector(mean), w * theta)
    for method in (small(evaluated="threshold"), small(masking="threshold")):
        (model,) = method.models(state, Rng(0))
        assert torch.equal(vector(model), w * (theta > 0.5))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_a_stored_model_is_a_seed_and_a_mask(density: float) -> None:
    method, theta, seed = small(), (uniform(271) < density).float(), 2**64 - 3
    file = method.save_model(state_of(theta, seed), Rng(0))
    ones, mask = pack_mask((theta > 0.5).numpy(), None)
    assert container.section_sizes(file) == (8, 4, len(mask)) and len(ones) == 4
    assert 0 < len(file) - 12 - len(mask) <= 64
    loaded, expected = method.load_model(file), layers(method.weights(seed) * theta, method.shapes)
    x = images(10)[0]
    assert torch.equal(method.task.logits(loaded, x), method.task.logits(expected, x))
    assert list(loaded) == list(SMALL)
    for other in (small(lam=2.0), flat(271)):
        with pytest.raises(PayloadError, match="another model"):
            other.load_model(file)


def test_a_stored_model_is_drawn_from_theta_unclamped() -> None:
    theta = torch.cat([torch.zeros(40_000), torch.ones(40_000), torch.full((20_000,), 0.3)])
    method = flat(100_000)
    files = [method.save_model(state_of(theta), Rng(number)) for number in (0, 0, 1)]
    assert files[0] == files[1] != files[2]
    kept = method.load_model(files[0])["0.weight"].flatten() != 0
    assert not kept[:40_000].any() and bool(kept[40_000:80_000].all())
    assert abs(int(kept[80_000:].sum()) - 6000) < 5 * 4200**0.5


@pytest.mark.parametrize("method", [small(masking="threshold"), small(masking="top", keep=0.25)], ids=["half", "top"])
def test_a_model_of_masks_without_chance_is_stored_as_it_is_evaluated(method: FedPM) -> None:
    state = state_of(uniform(271, seed=1))
    (expected,) = method.models(state, Rng(0))
    found = method.load_model(method.save_model(state, Rng(1)))
    assert all(torch.equal(found[name], expected[name]) for name in SMALL)


def test_notes_name_the_density_and_collapsed_layers(caplog: pytest.LogCaptureFixture) -> None:
    theta = torch.cat([torch.full((100,), 0.25), torch.full((200,), 0.01), torch.ones(40)])
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = flat(100, 200, 40).notes(state_of(theta))
    assert found["density"] == {"0.weight": 0.25, "1.weight": 0.01, "2.weight": 1.0}
    assert found["collapsed"] == ["1.weight"]
    (line,) = [r.getMessage() for r in caplog.records]
    assert "fewer than 10 weights" in line and "1.weight" in line and "0.weight" not in line
    caplog.clear()
    half = state_of(torch.full((271,), 0.5))
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = small().notes(half)
    assert found["density"] == {"0.weight": 0.5, "3.weight": 0.5}, "biases aside"
    assert "collapsed" not in found
    assert found["model file"] == pytest.approx(len(small().save_model(half, Rng(0))), abs=12)
    assert not caplog.records
