"""What the authors' released code gives on small inputs: run once, at the commits named below, on the inputs
written out here. Where our code draws otherwise, the same draws are put in.
"""

import collections
import math

import pytest
import torch
from fedsparse_toys import begin, flat, make_task, server, state_of, upload_of
from torch import Tensor, nn

from fedlib.core.averaging import RunningMean
from fedlib.methods.fedcompress.adaptive_clusters import Rule, effective_rank, gram
from fedlib.methods.fedcompress.clustering import seeds
from fedlib.methods.feddq import quantizers, schedules
from fedlib.methods.fedmrn import FedMRN
from fedlib.methods.fedsparse.method import FedPM
from fedlib.rng import Rng

pytestmark = pytest.mark.usefixtures("one_thread")

# FedMRN: Leopold1423/fedmrn-mm24, f0fb8a0, model/srn.py

MODEL = torch.tensor([0.05, -0.02, 0.1, 0.0, 0.03, -0.07, 0.01, 0.2])
UPDATE = torch.tensor([0.004, -0.003, 0.012, -0.0008, 0.0, 0.0065, -0.02, 0.001])
NOISE = torch.tensor([0.008, -0.006, 0.009, 0.004, -0.005, 0.01, -0.01, -0.002])
UNIFORM = torch.tensor([0.35, 0.61, 0.02, 0.95, 0.48, 0.4, 0.77, 0.3])  # it takes floor(p + U), we U' < p: U' = 1 - U
CHOSEN = torch.tensor([True, False, True, True, False, True, False, True])  # by progressive masking
MASKED = {
    "binary": [0.0, -0.003, 0.009, 0.0, 0.0, 0.01, -0.01, 0.0],
    "signed": [0.008, -0.003, 0.009, 0.004, 0.0, 0.01, -0.01, 0.002],
}
SENT = {
    "binary": [0.05, -0.026, 0.109, 0.0, 0.03, -0.06, 0.0, 0.2],
    "signed": [0.058, -0.026, 0.109, 0.004, 0.035, -0.06, 0.0, 0.202],
}
# Of this client with three batches, and of one with one, whose update is -u / 2 and whose noise and draws are reversed.
AVERAGED = {
    "binary": [0.0495, -0.0245, 0.10675, 0.0, 0.03, -0.0625, 0.0025, 0.2],
    "signed": [0.0555, -0.027, 0.10425, 0.00425, 0.03475, -0.06475, 0.004, 0.1995],
}


def masked(method: FedMRN, u: Tensor, n: Tensor, draws: Tensor) -> Tensor:
    """n times the mask that is sent."""
    mask = method.masks(u, n, 1 - draws).float()
    return n * (2 * mask - 1 if method.mask == "signed" else mask)


@pytest.mark.parametrize("mask", ["binary", "signed"])
def test_fedmrn_masks_mixes_sends_and_averages(mask: str) -> None:
    method, progress = FedMRN(mask=mask), 0.6
    chance = torch.where(CHOSEN, progress * (1 - UNIFORM), 0.8)  # one draw of ours serves both of its choices
    mixed = method.masked_update(UPDATE, NOISE, progress, chance)
    assert mixed.tolist() == pytest.approx(MASKED[mask], abs=1e-8)
    one, other = masked(method, UPDATE, NOISE, UNIFORM), masked(method, -UPDATE / 2, NOISE.flip(0), UNIFORM.flip(0))
    assert (MODEL + one).tolist() == pytest.approx(SENT[mask], abs=1e-8)
    mean = RunningMean({"w": one.shape})
    mean.add({"w": one}, 3)
    mean.add({"w": other}, 1)
    assert (MODEL + mean.value()["w"]).tolist() == pytest.approx(AVERAGED[mask], abs=1e-8)


# FedPM: BerivanIsik/sparse-random-networks, cf6b549, models/masked_layers.py, server.py and client.py

INPUTS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]]), torch.tensor([1, 0])
SIGNS = torch.tensor([1.0, -1, 1, -1, -1, 1, 1, -1])  # of the fixed weights: a layer of 2 x 3, then its two biases
SCORES = torch.tensor([0.3, -1.2, 0.0, 2.0, -0.4, 0.9, -0.7, 1.1])
DRAWN = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 1])
LOSS = 2.360645055770874
GRADIENT = [
    *(0.05392656475305557, 0.032056741416454315, 0.19472277164459229),
    *(0.035513218492269516, -0.07506159693002701, -0.22759249806404114),
    *(0.0569753535091877, 0.10887178778648376),
]


def test_fedpm_has_its_loss_and_the_gradients_of_its_scores() -> None:
    method = FedPM(lam=0.0, ste="prob", weight_scale="fedpm").bind(make_task(nn.Linear(3, 2)))
    local = begin(method, SCORES)
    local.frozen["w"] = SIGNS * math.e / math.sqrt(3)
    loss = method.loss(local.trainable, local.frozen, INPUTS, 1 - DRAWN)
    assert loss.item() == pytest.approx(LOSS, rel=1e-6)
    found = torch.autograd.grad(loss, local.trainable["s"])[0]
    assert found.tolist() == pytest.approx(GRADIENT, rel=1e-5)


def test_fedpm_averages_masks_and_counts_bits() -> None:
    rows = [[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1]]
    method = flat(6, delta=0.01, soften=0.01, weighting="clients", aggregation="bayes")
    uploads = [upload_of(method, torch.tensor(row).bool()) for row in rows]
    state = server(method, state_of(torch.zeros(6)), *uploads)
    theta = [0.9900000691413879, 0.6633333563804626, 0.33666667342185974, 0.009999989531934261, 0.6633333563804626]
    assert state.model["theta"].tolist() == pytest.approx([*theta, 0.6633333563804626], abs=1e-6)
    scores = [4.595120906829834, 0.6781843900680542, -0.6781842708587646, -4.595120906829834, 0.6781843900680542]
    local = method.begin(method.broadcast(state), INPUTS, Rng(0))
    assert local.trainable["s"].tolist() == pytest.approx([*scores, 0.6781843900680542], abs=1e-4)
    bits = [method.sizes(upload).others["official code"] / 6 for upload in uploads]
    assert sum(bits) / 3 == pytest.approx(1.4046914700120225, rel=1e-6)


# FedDQ: lqu-001/FedDQ, 8946cc1, fashion_mnist/models/mask.py and the widths of fashion_mnist.py

RANGE = torch.tensor([-0.031, -0.0172, -0.006, -0.0024, 0.0, 0.0011, 0.0049, 0.0098, 0.0203, 0.0442])


@pytest.mark.parametrize(
    ("resolution", "width", "levels", "first", "last"),
    [
        (0.005, 4, [-6, -3, -1, 0, 0, 0, 1, 2, 4, 7], -0.030079998075962067, 0.03509333357214928),
        (0.001, 7, [-52, -29, -10, -4, 0, 2, 8, 17, 34, 63], -0.030790550634264946, 0.03730393573641777),
        (0.02, 2, [-1, -1, 0, 0, 0, 0, 0, 0, 1, 1], -0.025066666305065155, 0.025066666305065155),
    ],
)
def test_feddq_has_its_widths_and_levels(
    resolution: float, width: int, levels: list[int], first: float, last: float
) -> None:
    _, span = quantizers.extent(RANGE)
    assert schedules.Rule(resolution=resolution).width_for(span) == width
    part = quantizers.symmetric(RANGE, span, width)
    assert [int(level) - 2 ** (width - 1) for level in part.levels] == levels
    restored = quantizers.restore(part, len(RANGE), "symmetric_nearest")
    assert [float(restored[0]), float(restored[-1])] == pytest.approx([first, last], rel=1e-6)


# FedCompress: FederatedML/FedCompress, 8610253, src/utils.py; and TensorFlow 2.15's k-means++, which it seeds by

EMBEDDINGS = [[1.0, 0.5, -0.25], [0.2, -0.8, 0.6], [-0.4, 0.1, 0.9], [0.3, 0.3, 0.3], [1.5, -0.5, 0.0]]
ACCURACIES = [0.31, 0.48, 0.60, 0.66, 0.71, 0.735, 0.75, 0.758, 0.757, 0.761, 0.7615, 0.762, 0.762, 0.7618]
SCORED = [20.1, 21.9, 23.0, 23.6, 23.9, 24.1, 24.15, 24.17, 24.2, 24.19, 24.2, 24.21, 24.2, 24.22]
WEIGHTS = torch.tensor([-0.92, -0.5, -0.43, -0.1, 0.03, 0.08, 0.31, 0.77])
# How often of 80,000 three seeds are the weights of these places: all that came out more than 2,000 times.
SEEDED = {
    (1, 3, 7): 19279,
    (1, 4, 7): 10090,
    (0, 3, 7): 7918,
    (1, 5, 7): 7270,
    (0, 4, 7): 6737,
    (2, 4, 7): 5498,
    (2, 5, 7): 4794,
    (2, 3, 7): 4775,
    (0, 2, 6): 4077,
    (0, 5, 7): 3238,
}


def test_fedcompress_has_its_score() -> None:
    assert effective_rank(gram(torch.tensor(EMBEDDINGS))) == pytest.approx(2.9722981, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(most=12), [8, 8, 8, 8, 8, 8, 8, 8, 9, 9, 9, 9, 10, 10]),
        (Rule(most=10, patience=2, first=1), [8, 8, 8, 8, 8, 8, 8, 8, 9, 9, 10, 10, 10, 10]),
    ],
)
def test_fedcompress_takes_more_clusters_when_it_does(rule: Rule, expected: list[int]) -> None:
    numbers = [rule.least]
    for rounds in range(1, len(ACCURACIES) + 1):
        numbers.append(rule.following(ACCURACIES[:rounds], SCORED[:rounds], numbers))
    assert numbers[1:] == expected


def test_fedcompress_seeds_are_drawn_with_its_chances() -> None:
    """Within five standard deviations; a wrong number of candidates is off by more than ten."""
    draws, values = 4000, WEIGHTS.tolist()
    found = collections.Counter(
        tuple(min(range(8), key=lambda i: abs(values[i] - seed)) for seed in seeds(WEIGHTS, 3, Rng(draw)).tolist())
        for draw in range(draws)
    )
    for places, often in SEEDED.items():
        chance = often / 80_000
        deviation = math.sqrt(chance * (1 - chance) * (1 / draws + 1 / 80_000))
        assert abs(found[places] / draws - chance) < 5 * deviation, places
