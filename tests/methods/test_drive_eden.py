"""DRIVE and one-bit EDEN: messages worked by hand and in integers, the known error of one bit, and that both agree."""

import math

import numpy as np
import pytest
import torch
from common import sylvester
from jobs import MakeSpec
from small_task import CPU, ONE, coded, layers_task, make_task, noise, served, uploaded
from torch import Tensor, nn

from fedlib import rng
from fedlib.core.plan import Plan
from fedlib.errors import PayloadError
from fedlib.methods.baselines.drive import CENTROIDS, Drive, Eden, quantised
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.wire import container, rotation

pytestmark = pytest.mark.usefixtures("one_thread")
Codec = Drive | Eden
both = pytest.mark.parametrize("codec", [Drive(), Eden()], ids=["drive", "eden"])
CENTROID = {"drive": 1.0, "eden": 0.7978845608028654}


def message(codec: Codec, u: Tensor, place: Rng) -> list[memoryview]:
    """The three sections."""
    return coded(codec.bind(layers_task((1, len(u)))), u, place)


def decoded(codec: Codec, parts: list[memoryview], d: int) -> Tensor:
    return codec.bind(layers_task((1, d))).decode(parts, None)


def scale_of(parts: list[memoryview]) -> float:
    return float(np.frombuffer(parts[2], "<f4")[0])


def place_with_signs(*expected: int) -> Rng:
    """A place in the tree of draws whose rotation starts with the given signs."""
    places = map(Rng, range(1000))
    return next(p for p in places if rng.signs(p.child("rotation").seed(), 0, len(expected)).tolist() == list(expected))


@both
def test_message_worked_by_hand(codec: Codec) -> None:
    """D u = (1, -2, 3, 4), R u = (3, 1, -4, 2): bits 1, 1, 0, 1, scale (9 + 1 + 16 + 4) / (3 + 1 + 4 + 2) = 3.

    R^-1 (1, 1, -1, 1) = D (1, -1, 1, 1) = (1, 1, 1, 1). Without the 4: R u = (1, 3, -2, 0), whose zero gets a one, and
    scale 14 / 6.
    """
    place = place_with_signs(1, -1, 1, 1)
    for u, scale in (([1.0, 2.0, 3.0, 4.0], 3.0), ([1.0, 2.0, 3.0], 14 / 6)):
        parts = message(codec, torch.tensor(u), place)
        assert bytes(parts[0]) == place.child("rotation").seed().to_bytes(8, "little")
        assert bytes(parts[1]) == bytes([0b1011])
        assert scale_of(parts) == pytest.approx(scale / CENTROID[codec.name], rel=1e-6)
        assert decoded(codec, parts, len(u)).tolist() == pytest.approx([scale] * len(u), rel=1e-6)


@both
def test_two_entries_are_never_told_apart(codec: Codec) -> None:
    """(2, 1) becomes (+-3, +-1) / sqrt(2) in some order, so 2.5 and 0: H D is not uniform over the rotations."""
    for number in range(8):
        parts = message(codec, torch.tensor([2.0, 1.0]), Rng(number))
        assert decoded(codec, parts, 2).tolist() == pytest.approx([2.5, 0.0], rel=1e-6)


KNOWN = ("37fd68a470c99a0a", "b898b89080ec00ed", "61054a45")  # seed, signs, scale


def test_known_answer() -> None:
    """Whole numbers, so that no rounding decides a sign: a change here is a change of the wire format."""
    u = torch.arange(-20, 21).float() ** 3
    assert tuple(part.hex() for part in message(Drive(), u, Rng(20240806))) == KNOWN


@both
@pytest.mark.parametrize("d", [1, 2, 5, 41, 300, 1024])
def test_message_equals_integer_arithmetic(codec: Codec, d: int) -> None:
    """Signs are those of the exact rotation; decoding rounds once, by the scale, in whatever order a library adds."""
    u = torch.randint(-50, 51, (d,), generator=torch.Generator().manual_seed(d)).float()
    seed, signs, _ = parts = message(codec, u, Rng(d))
    n = rotation.padded(d)
    diagonal = rng.signs(int.from_bytes(seed, "little"), 0, d).astype(np.int64)
    y = sylvester(n)[:, :d] @ (diagonal * u.long().numpy())
    bit = np.array([signs[i // 8] >> i % 8 & 1 for i in range(n)])
    assert np.array_equal(bit, y >= 0)
    scale = np.sum(y**2) / max(np.sum(np.abs(y)), 1) / math.sqrt(n) / CENTROID[codec.name]
    assert scale_of(parts) == pytest.approx(scale, rel=1e-6)
    factor = np.float32(scale_of(parts) * CENTROID[codec.name] / math.sqrt(n))
    whole = diagonal * (sylvester(n)[:d] @ (2 * bit - 1))
    assert np.array_equal(decoded(codec, parts, d).numpy(), whole.astype(np.float32) * factor)


VECTORS = {
    "one": noise(1),
    "three": noise(3),
    "gauss": noise(1000),
    "heavy tails": noise(4096) ** 5,
    "one large": torch.nn.functional.one_hot(torch.tensor(77), 300).float() * -3,
    "tiny": noise(500) * 1e-30,
    "huge": noise(500) * 1e30,
    "zero": torch.zeros(50),
}


@pytest.mark.parametrize("u", VECTORS.values(), ids=VECTORS)
def test_one_bit_eden_is_drive(u: Tensor) -> None:
    """The centroid cancels: scale_EDEN c = (||y||^2 / c ||y||_1) c."""
    ours, theirs = (message(codec, u, Rng(5)) for codec in (Drive(), Eden()))
    assert ours[:2] == theirs[:2], "seed and bits"
    assert scale_of(theirs) * 0.7978845608 == pytest.approx(scale_of(ours), rel=1e-6)
    a, b = decoded(Drive(), ours, len(u)), decoded(Eden(), theirs, len(u))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert bool(torch.isfinite(a).all())
    assert float(a.double().norm()) >= 0.5 * float(u.double().norm()), "nothing has vanished"


def test_eden_takes_the_nearest_centroid() -> None:
    z = torch.linspace(-3, 3, 601)
    distance = (z[:, None] - torch.tensor([-0.79788, 0.79788])).abs()
    assert torch.equal((quantised(z) > 0).long(), 1 - distance.flip(1).argmin(1)), "a tie goes up"
    values = noise(1_000_000).abs()
    assert CENTROIDS[1] == pytest.approx(float(values.mean()), abs=5 * float(values.std()) / 1000)
    assert CENTROIDS[0] == -CENTROIDS[1]


@both
def test_known_error_of_one_bit(codec: Codec) -> None:
    """||decoded - u||^2 / ||u||^2 tends to pi/2 - 1 = 0.5708, whatever u; the projection on u is exactly u."""
    for u in (noise(2**17), noise(2**17) ** 3, torch.linspace(-1, 4, 2**17)):
        found = decoded(codec, message(codec, u, Rng(1)), len(u))
        assert float((found - u).square().sum() / u.square().sum()) == pytest.approx(math.pi / 2 - 1, abs=0.01)
        assert float(found.double() @ u.double() / u.double().square().sum()) == pytest.approx(1, rel=1e-5)


@both
def test_mean_over_rotations_tends_to_the_update(codec: Codec) -> None:
    u, rotations = noise(1000), 500
    found = torch.stack([decoded(codec, message(codec, u, Rng(0).child(k)), 1000) for k in range(rotations)])
    error, standard_error = found.mean(0) - u, found.std(0) / rotations**0.5
    assert bool((error.abs() <= 5 * standard_error).all()), "5, not 4: 1,000 entries at once"
    assert float((error / standard_error).square().mean()) == pytest.approx(1, abs=0.15), "nor is it too exact"
    assert float(standard_error.norm() / u.norm()) < 0.05, "fine enough to tell"


@both
def test_zero_update_is_scale_zero(codec: Codec) -> None:
    parts = message(codec, torch.zeros(41), Rng(0))
    assert scale_of(parts) == 0
    assert not decoded(codec, parts, 41).any()


@both
def test_upload_in_bytes(codec: Codec, tiny: MakeSpec) -> None:
    """4,736 weights in 8,192 bits; one layer with biases: 3 weights in 4 bits, 3 biases in 12 bytes."""
    task = build.task(tiny(), CPU)
    method = codec.bind(task)
    upload = uploaded(method, task.shard(0), Rng(0))
    assert container.section_sizes(upload) == (8, 1024, 4, 0) and len(method.sections) == 4
    assert len(upload) - (8 + 1024 + 4) <= 64
    assert method.sizes(upload).paper == 8192 + 32
    method = codec.bind(make_task(nn.Linear(1, 3), Plan(epochs=1, batch=4, lr=0.3)))
    zero = {"weight": torch.zeros(3, 1), "bias": torch.zeros(3)}
    upload = uploaded(method, ONE, Rng(0), zero)
    assert container.section_sizes(upload) == (8, 1, 4, 12)
    found = served(method, upload, model=zero)
    assert found["bias"].tolist() == pytest.approx([0.2, -0.1, -0.1]), "0.3 (2/3, -1/3, -1/3), in full precision"


@both
def test_largest_scale_still_gives_finite_updates(codec: Codec) -> None:
    """All bits one: the whole vector is in one entry, sqrt(n) times the scale."""
    parts = [memoryview(part) for part in (bytes(8), b"\xff" * 1024, np.float32(3.7e36).tobytes())]
    found = decoded(codec, parts, 8192)
    assert bool(found.isfinite().all()) and float(found.abs().max()) > 2e38


@both
def test_bits_past_the_padded_length_are_refused(codec: Codec) -> None:
    parts = [memoryview(part) for part in (bytes(8), bytes([0b10000]), np.float32(1).tobytes())]
    with pytest.raises(PayloadError, match="only its lowest 4 bits may be set"):
        decoded(codec, parts, 3)
