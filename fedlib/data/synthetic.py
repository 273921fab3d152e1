"""Unlabelled images that no data set holds, made on the spot: what a server may distil on that has no data of its own.

"leaves" are overlapping discs, or rectangles, whose sizes follow a power law, as things in photographs do (dead leaves;
Lee, Mumford and Huang, IJCV 2001); "stripes" are waves of about one direction, smooth or in two tones; "spectrum" is
noise whose amplitudes fall with frequency as those of photographs do; "noise" has independent pixels. The first and
third are among the sets of Baradad et al. (NeurIPS 2021). "voices" are spectrograms of speech that nobody spoke, by the
source and the filter of Fant (Acoustic Theory of Speech Production, 1960), for networks that hear.

The draws are travelling ones (`fedlib.rng`), the rest IEEE additions, multiplications, divisions and square roots, and
pixels are rounded to 256 levels before anything is summed: every machine makes the same numbers. The Fourier transform
and logarithms of "spectrum", and those of "voices", may differ in their last bits, which moves a pixel by a level where
it lies on the edge of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedlib.errors import require_name, require_number
from fedlib.rng import Rng, normal, uniform

PLACES = 1 << 18  # of a block of images: what is computed at once
LEVELS = 256
WAVES = 3  # that a striped image adds up
COVER = 3  # sum of the leaves' areas over the image's: they leave about exp(-3) of it bare
SYLLABLES = 3  # of a clip
FORMANTS = ((250, 850, 90), (850, 2300, 130), (2000, 3500, 200))  # Hz: lowest, highest, and half of the width
LOW, HIGH, SILENCE = 60.0, 3800.0, 1e-6  # Hz and least magnitude, as the spectrograms of spoken digits have them

Shape = tuple[int, int, int]


def images(kind: str, count: int, shape: Shape, seed: int) -> Tensor:
    """float32 [count, c, h, w] of the given shape (c, h, w), with mean 0 and deviation 1 over the whole set.

    SpecError: unknown kind; no image, no channel, or a side of fewer than 4 or more than 512 pixels.
    """
    pixels = levels(kind, count, shape, seed)
    often, level = torch.from_numpy(pixels).flatten().bincount(minlength=LEVELS), torch.arange(LEVELS)
    total, squares = int((often * level).sum()), int((often * level**2).sum())  # exact
    mean = total / pixels.size
    deviation = math.sqrt(squares * pixels.size - total**2) / pixels.size
    standard = pixels.astype(np.float32)
    standard -= np.float32(mean)
    standard /= np.float32(deviation)
    return torch.from_numpy(standard)


def levels(kind: str, count: int, shape: Shape, seed: int) -> np.ndarray:
    """The images as uint8 [count, c, h, w], before they are standardised; a smaller set is the start of a larger one.

    Errors as of `images`.
    """
    require_name("foreign images", kind, KINDS)
    require_number("count of foreign images", count, 1, 10**9, integer=True)
    for field, value, low in zip(("channels", "height", "width"), shape, (1, 4, 4), strict=True):
        require_number(f"{field} of foreign images", value, low, 512, integer=True)
    block = max(2, PLACES // math.prod(shape[1:]) // 2 * 2)  # even: images of even and odd numbers may differ in style
    pixels = np.empty((count, *shape), np.uint8)
    for start in range(0, count, block):
        part = pixels[start : start + block]
        part[:] = KINDS[kind](Rng(seed).child("foreign images", kind, start // block), len(part), shape)
    return pixels


def _leaves(root: Rng, n: int, shape: Shape) -> np.ndarray:
    """Even images have discs, odd ones rectangles; each leaf a colour of its own, and so has what they leave bare."""
    c, h, w = shape
    low, high = 1.0, (min(h, w) - 1) / 2  # no leaf hides all others
    mean_area = 2 * math.pi * math.log(high / low) / (low**-2 - high**-2)  # of a disc
    count = math.ceil(COVER * h * w / mean_area)
    chance = (_draws(root, "leaves", n, 4, count) + 1) / 2  # float32, in [0, 1)
    row, column = chance[:, 0] * h - np.float32(0.5), chance[:, 1] * w - np.float32(0.5)
    radii = 1 / np.sqrt(low**-2 - chance[:, 2:] * np.float32(low**-2 - high**-2))  # density ~ r^-3
    front = np.zeros((n, h, w), np.uint16)  # number of the leaf that is seen; 0 is the ground
    for style, combine in enumerate((np.add, np.maximum)):
        own = slice(style, None, 2)
        height, width = radii[own, 0], radii[own, style]
        down = ((np.arange(h, dtype=np.float32)[:, None, None] - row[own].T) / height.T) ** 2  # [h, leaves, images]
        across = ((np.arange(w, dtype=np.float32)[:, None, None] - column[own].T) / width.T) ** 2
        seen = np.zeros((h, w, down.shape[2]), np.uint16)  # images last: long runs for the processor
        for leaf in range(count):
            inside = combine(down[:, None, leaf], across[None, :, leaf]) <= 1
            np.maximum(seen, np.multiply(inside, leaf + 1, dtype=np.uint16), out=seen)
        front[own] = seen.transpose(2, 0, 1)
    colours = _level(_draws(root, "colours", n, c, count + 1))
    flat = np.take_along_axis(colours, front.reshape(n, 1, h * w).astype(np.intp), axis=2)
    return flat.reshape(n, c, h, w)


def _stripes(root: Rng, n: int, shape: Shape) -> np.ndarray:
    """Waves whose directions are within 12 degrees; from one to s / 8 of them, or to two if that is more, fit into a
    shorter side of s pixels. Even images are smooth, odd ones have two tones."""
    c, h, w = shape
    direction, phase, pitch, strength = (
        _draws(root, part, n, WAVES) for part in ("direction", "phase", "pitch", "strength")
    )
    side = min(h, w)
    turns = (direction[:, :1] + direction / 16) / 4  # all directions of a line are within half a turn
    cycles = (1 + (pitch + 1) / 2 * max(side / 8 - 1, 1)) / side  # a pixel
    along, down = cycles * _wave(turns + np.float32(0.25)), cycles * _wave(turns)
    field = np.zeros((n, h, w), np.float32)
    total = np.zeros((n, 1, 1), np.float32)
    for i in range(WAVES):
        weight = ((strength[:, i] + 3) / 4)[:, None, None]
        at = down[:, i, None] * np.arange(h, dtype=np.float32) + phase[:, i, None]
        field += weight * _wave(at[:, :, None] + (along[:, i, None] * np.arange(w, dtype=np.float32))[:, None])
        total += weight
    field /= total
    field[1::2] = np.sign(field[1::2])
    middle, span = (_draws(root, part, n, c)[:, :, None, None] for part in ("middle", "span"))
    span = span / 4 + np.copysign(np.float32(0.25), span)  # never small
    return _level(middle / 2 + span * field[:, None])


def _spectrum(root: Rng, n: int, shape: Shape) -> np.ndarray:
    """Normal noise whose amplitude at frequency f is f^-a, with a uniform in [0.5, 2) for each image."""
    c, h, w = shape
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w))
    f[0, 0] = np.inf  # no mean
    exponent = (_draws(root, "exponent", n, 1).astype(np.float64) * 0.75 + 1.25).reshape(n, 1, 1, 1)
    fields = c + 1 if c > 1 else 1  # each channel's own, and one that all share
    white = normal(root.child("fields").seed(), 0, n * fields * h * w).reshape(n, fields, h, w).astype(np.float64)
    mixed = 0.6 * white[:, :c] + 0.8 * white[:, c:] if c > 1 else white  # channels correlate by 0.64
    field = np.fft.irfft2(np.fft.rfft2(mixed) * np.exp(-exponent * np.log(f)), s=(h, w))
    field /= field.std(axis=(1, 2, 3), keepdims=True)
    return _level(field / 3)  # 0.3 % of a normal law's values lie beyond


def _noise(root: Rng, n: int, shape: Shape) -> np.ndarray:
    return _level(_draws(root, "pixels", n, *shape))


def _voices(root: Rng, n: int, shape: Shape) -> np.ndarray:
    """Log magnitudes, time downwards and the mel scale across: syllables, three of four with the harmonics of a voice
    and the others hissed, through formants that glide, over a quiet noise; a third of the time or more, then silence.
    Channels are equal."""
    c, h, w = shape
    chance = (_draws(root, "syllables", n, SYLLABLES, 6 + 2 * len(FORMANTS)).astype(np.float64) + 1) / 2
    chance = chance[..., None, None]  # [n, syllables, draws, 1, 1]
    low, high = (math.log1p(edge / 700) for edge in (LOW, HIGH))
    hertz = 700 * np.expm1(np.linspace(low, high, w))
    duration = (2 + _draws(root, "durations", n, 1, 1)) / 3
    time = (np.arange(h)[:, None] + 0.5) / h / duration  # [n, h, 1]; 1 is the end
    magnitude = 0.003 * (1.2 + _draws(root, "noise", n, h, w).astype(np.float64))
    for i in range(SYLLABLES):
        place, length, loud, pitch, fall, voiced = (chance[:, i, draw] for draw in range(6))
        away = (time - (i + place) / SYLLABLES) / (0.1 + 0.15 * length)  # -1 and 1 are the syllable's ends
        tone = (90 + 190 * pitch) * (1 - 0.15 * fall * away)
        harmonics = 0.5 + 0.5 * _wave(hertz / tone + 0.25)
        resolved = 1 / (1 + (hertz / (8 * tone)) ** 2)  # higher up a band holds several of them
        source = np.where(voiced < 0.75, (1 + resolved * (harmonics - 1)) / (1 + hertz / 500), 0.3 * hertz / HIGH)
        heard: np.ndarray | float = 0.0
        for draw, (least, most, width) in enumerate(FORMANTS, 3):
            start, end = chance[:, i, 2 * draw], chance[:, i, 2 * draw + 1]
            centre = least + (most - least) * (start + (end - start) * (away + 1) / 2)
            heard = heard + 1 / (1 + ((hertz - centre) / width) ** 2)
        magnitude += np.maximum(0, 1 - away**2) * (0.3 + 0.7 * loud) * source * heard
    magnitude[np.broadcast_to(time > 1, magnitude.shape)] = SILENCE
    level = _level((1 - 2 * np.log(magnitude) / math.log(SILENCE)).astype(np.float32))
    return np.broadcast_to(level[:, None], (n, c, h, w))


def _draws(root: Rng, part: str, n: int, *shape: int) -> np.ndarray:
    """Uniform in [-1, 1), float32 [n, ...]; those of the first images do not depend on n."""
    return uniform(root.child(part).seed(), 0, n * math.prod(shape)).reshape(n, *shape)


def _level(x: np.ndarray) -> np.ndarray:
    """From [-1, 1), beyond which is cut, to 0 .. 255."""
    return np.clip(np.floor((x + 1) * (LEVELS // 2)), 0, LEVELS - 1).astype(np.uint8)


def _wave(turns: np.ndarray) -> np.ndarray:
    """sin(2 pi turns) to 0.0011, by IEEE steps alone, where a library's sine may differ in the last bit."""
    part = turns - np.rint(turns)
    parabola = 8 * part * (1 - 2 * np.abs(part))
    return parabola * (np.float32(0.775) + np.float32(0.225) * np.abs(parabola))


KINDS: dict[str, Callable[[Rng, int, Shape], np.ndarray]] = {
    "leaves": _leaves,
    "noise": _noise,
    "spectrum": _spectrum,
    "stripes": _stripes,
    "voices": _voices,
}
