"""Images made on the spot: standardised, repeatable, and each kind with the statistics that it is named for."""

import hashlib
import math

import numpy as np
import pytest
import torch

from fedlib.data import synthetic
from fedlib.errors import SpecError
from fedlib.rng import Rng, uniform

KINDS = sorted(synthetic.KINDS)
SHAPES: list[synthetic.Shape] = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 98, 40), (2, 4, 5)]


def power(kind: str, count: int = 200, side: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Power by frequency [count, side, side] of grey images without their means, and the frequencies, cycles a side."""
    grey = synthetic.levels(kind, count, (1, side, side), seed=1)[:, 0].astype(np.float64)
    spectrum = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    down, across = np.meshgrid(*[np.fft.fftfreq(side, 1 / side)] * 2, indexing="ij")
    return spectrum, down, across


def slope(kind: str) -> float:
    """Of the logarithm of the power, averaged over a ring and all images, against that of the frequency."""
    spectrum, down, across = power(kind)
    ring = np.hypot(down, across).round()
    frequencies = np.arange(1, 16)
    mean = [spectrum.mean(0)[ring == f].mean() for f in frequencies]
    return float(np.polyfit(np.log(frequencies), np.log(mean), 1)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sets_are_standardised_and_images_differ(kind: str, shape: synthetic.Shape) -> None:
    x = synthetic.images(kind, 50, shape, seed=4)
    assert x.dtype == torch.float32 and x.shape == (50, *shape) and x.is_contiguous()
    assert abs(float(x.double().mean())) < 1e-6
    assert abs(float(x.double().std(correction=0)) - 1) < 1e-6
    assert len({image.numpy().tobytes() for image in x}) == 50
    assert bool((x.flatten(1).std(1) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_bytes_and_another_seed_others(kind: str) -> None:
    one, again, other = (synthetic.images(kind, 9, (3, 12, 10), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert float((one == other).float().mean()) < 0.1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("leaves", "fc42f0dd01fb46f1"), ("noise", "e3ae34495aeed29d"), ("stripes", "82ae21b84caba29c")],
)
def test_known_images(kind: str, expected: str) -> None:
    """Of the kinds that every machine makes alike; standardising too."""
    content = synthetic.images(kind, 20, (3, 16, 12), seed=20240125).numpy().astype("<f4").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == expected


def test_kinds_draw_from_streams_of_their_own() -> None:
    sets = [synthetic.images(kind, 40, (1, 12, 12), seed=0).flatten() for kind in KINDS]
    correlation = torch.corrcoef(torch.stack(sets))
    assert float((correlation - torch.eye(len(KINDS))).abs().max()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_set_is_the_start_of_a_larger_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "PLACES", 10 * 64)
    whole = synthetic.levels(kind, 34, (2, 8, 8), seed=2)
    for count in (1, 9, 10, 11, 29):
        np.testing.assert_array_equal(synthetic.levels(kind, count, (2, 8, 8), seed=2), whole[:count])
    assert len({image.tobytes() for image in whole}) == 34, "blocks differ"


def test_spectra_fall_as_the_kinds_say() -> None:
    """Photographs' power falls as about f^-2; amplitudes f^-0.5 to f^-2 make a power between f^-1 and f^-4."""
    assert abs(slope("noise")) < 0.1
    assert -3 < slope("leaves") < -1.5
    assert -4 < slope("spectrum") < -1


def test_exponents_of_single_images() -> None:
    spectrum, down, across = power("spectrum")
    ring = np.hypot(down, across)
    inside = (ring >= 1) & (ring <= 12)
    exponents = [-np.polyfit(np.log(ring[inside]), np.log(image[inside]), 1)[0] / 2 for image in spectrum]
    assert 0.3 < min(exponents) < 0.7 and 1.7 < max(exponents) < 2.2
    assert abs(float(np.mean(exponents)) - 1.25) < 0.15


def test_channels_of_spectra_correlate_and_those_of_noise_do_not() -> None:
    for kind, expected in (("spectrum", 0.64), ("noise", 0.0)):
        x = synthetic.images(kind, 300, (3, 16, 16), seed=3).transpose(0, 1).flatten(1)
        off = torch.corrcoef(x)[~torch.eye(3, dtype=torch.bool)]
        torch.testing.assert_close(off, torch.full((6,), expected), atol=0.05, rtol=0)


def test_noise_has_all_levels_alike() -> None:
    often = np.bincount(synthetic.levels("noise", 400, (1, 32, 32), seed=0).reshape(-1), minlength=256)
    mean = often.sum() / 256
    assert len(often) == 256 and float(((often - mean) ** 2 / mean).sum()) < 255 + 5 * math.sqrt(2 * 255)


def test_leaves_have_flat_regions_with_edges_in_between() -> None:
    for shape in SHAPES[:4]:
        pixels = synthetic.levels("leaves", 100, shape, seed=1)
        same = (pixels[..., 1:] == pixels[..., :-1]).all(1)
        assert 0.4 < same.mean() < 0.9
        assert len(np.unique(pixels[0].reshape(shape[0], -1), axis=1).T) > 4
    noise = synthetic.levels("noise", 100, (1, 28, 28), seed=1)
    assert (noise[..., 1:] == noise[..., :-1]).mean() < 0.01


def test_leaves_painted_one_after_another() -> None:
    """A disc image and one of rectangles, from the draws by Python's own numbers."""
    c, h, w = shape = (2, 12, 9)
    pixels = synthetic.levels("leaves", 2, shape, seed=7)
    root, least = Rng(7).child("foreign images", "leaves", 0), 4**-2  # the largest radius is half of 9 - 1
    count = math.ceil(3 * h * w / (math.pi * 2 * math.log(4) / (1 - least)))  # area: pi times the mean of r^2
    chance = ((uniform(root.child("leaves").seed(), 0, 8 * count) + 1) / 2).reshape(2, 4, count).tolist()
    colour = uniform(root.child("colours").seed(), 0, 2 * c * (count + 1)).reshape(2, c, count + 1)
    for image in (0, 1):
        expected = np.empty(shape)
        expected[:] = colour[image, :, :1, None]
        for leaf, (down, across, first, second) in enumerate(zip(*chance[image], strict=True), 1):
            a, b = (1 / math.sqrt(1 - u * (1 - least)) for u in (first, second))  # P(radius > r) ~ r^-2 - 4^-2
            for y in range(h):
                for x in range(w):
                    p, q = y - (down * h - 0.5), x - (across * w - 0.5)
                    if p * p + q * q <= a * a if image == 0 else abs(p) <= a and abs(q) <= b:
                        expected[:, y, x] = colour[image, :, leaf]
        np.testing.assert_array_equal(pixels[image], np.floor((expected + 1) * 128))


def test_stripes_have_a_direction() -> None:
    """More than 0.7 of an image's power within 20 degrees of one direction; of noise about 40 / 180."""
    for kind, low, high in (("stripes", 0.7, 1.0), ("noise", 0.15, 0.4)):
        spectrum, down, across = power(kind)
        angle = np.arctan2(down, across)
        doubled = (spectrum * np.exp(2j * angle)).sum((1, 2))  # opposite frequencies are one direction
        main = np.angle(doubled)[:, None, None] / 2
        near = np.abs(np.sin(angle - main)) < math.sin(math.radians(20))
        share = (spectrum * near).sum((1, 2)) / spectrum.sum((1, 2))
        assert low < np.median(share) < high
        if kind == "stripes":
            directions = np.histogram(main, 6, (-math.pi / 2, math.pi / 2))[0]
            assert directions.min() > 15, "200 images in all directions"


def test_every_second_striped_image_has_two_tones() -> None:
    pixels = synthetic.levels("stripes", 40, (1, 28, 28), seed=2)
    tones = [len(np.unique(image)) for image in pixels]
    assert set(tones[1::2]) == {2} and min(tones[::2]) > 10


def test_voices_end_in_silence_and_most_have_a_pitch() -> None:
    """Silence is below all sound; while it lasts, a voice is louder in the lower half of the mel scale."""
    pixels = synthetic.levels("voices", 200, (1, 98, 40), seed=3)[:, 0].astype(int)
    silent = (pixels == 0).all(2)
    ends = 98 - silent.sum(1)
    assert 98 // 3 <= ends.min() < 45 and ends.max() > 90
    for image, end in zip(pixels, ends, strict=True):
        assert image[:end].min() > 0 and image[end:].max(initial=0) == 0
    loud = [image[:end] for image, end in zip(pixels, ends, strict=True)]
    voiced = np.mean([image[:, :20].max() > image[:, 20:].max() for image in loud])
    assert 0.7 < voiced <= 1
    both = synthetic.levels("voices", 5, (2, 98, 40), seed=3)
    np.testing.assert_array_equal(both[:, 0], both[:, 1])


def test_the_wave_is_a_sine() -> None:
    turns = np.linspace(-3, 3, 10_001, dtype=np.float32)
    np.testing.assert_allclose(synthetic._wave(turns), np.sin(2 * np.pi * turns.astype(np.float64)), atol=1.2e-3)


@pytest.mark.parametrize(
    ("kind", "count", "shape", "message"),
    [
        ("photos", 2, (1, 8, 8), "'photos' is unknown; allowed: leaves, noise, spectrum, stripes, voices"),
        ("noise", 0, (1, 8, 8), "count of foreign images: 0 must be an integer from 1"),
        ("noise", 2.5, (1, 8, 8), "count of foreign images: 2.5 must be an integer"),
        ("noise", 2, (0, 8, 8), "channels of foreign images: 0 must be an integer from 1"),
        ("noise", 2, (1, 3, 8), "height of foreign images: 3 must be an integer from 4 to 512"),
        ("noise", 2, (1, 8, 513), "width of foreign images: 513 must be an integer from 4 to 512"),
    ],
)
def test_what_cannot_be_made_is_named(kind: str, count: int, shape: synthetic.Shape, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        synthetic.images(kind, count, shape, seed=0)
