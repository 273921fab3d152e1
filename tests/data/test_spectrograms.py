"""Spectrograms of spoken digits against numbers worked by hand and another transform."""

import math

import numpy as np
import pytest
import torch

from fedlib.data import sound

SILENCE = math.log(1e-6)


def test_band_edges_by_hand() -> None:
    """Even steps in log(700 + f) from 760 to 4500: 41 of them, so a factor of (4500 / 760)^(1/41) = 1.044333."""
    edges = sound.edges()
    assert len(edges) == 42
    assert edges[[0, 1, 2, 40, 41]].tolist() == pytest.approx([60, 93.693, 128.880, 3608.97, 3800], abs=0.01)
    assert (edges + 700).log().diff().tolist() == pytest.approx([math.log(4500 / 760) / 41] * 41, rel=1e-9)


def test_triangles_by_hand() -> None:
    """The transform's frequencies are 15.625 Hz apart; the first band rises from 60 to 93.693 and falls to 128.880."""
    weights = sound.filters()
    assert weights.shape == (257, 40) and weights.dtype == torch.float32
    rising = [(62.5 - 60) / 33.693, (78.125 - 60) / 33.693]
    falling = [(128.880 - f) / 35.187 for f in (93.75, 109.375, 125.0)]
    assert weights[:10, 0].tolist() == pytest.approx([0, 0, 0, 0, *rising, *falling, 0], abs=1e-4)
    assert weights[6, 0] > 0.998, "93.75 Hz is all but the centre"
    assert weights.min() == 0 and weights.max() <= 1 and weights.amax(0).min() > 0.7, "no band is empty"


def test_triangles_share_every_frequency_between_the_outer_centres() -> None:
    total, frequencies = sound.filters().sum(1), torch.arange(257) * 15.625
    inside = (frequencies >= 93.70) & (frequencies <= 3608.9)
    assert total[inside].tolist() == pytest.approx([1] * int(inside.sum()), abs=1e-6)
    assert not total[(frequencies <= 60) | (frequencies >= 3800)].any()
    assert (total[~inside] < 1).all()


def tone(frequency: float, amplitude: float = 0.5) -> torch.Tensor:
    return (32767 * amplitude * torch.sin(2 * math.pi * frequency * torch.arange(8000) / 8000)).round().short()


def test_a_tone_lights_the_band_that_holds_it() -> None:
    """In every frame; 1,000 Hz lies between the centres of bands 17 and 18, 959 and 1,033 Hz, nearer to the latter."""
    centres = sound.edges()[1:-1].tolist()
    bright = sound.log_mel(torch.stack([tone(f) for f in [*centres, 1000]])).argmax(2)
    assert bright.shape == (41, 98) and (bright == torch.tensor([*range(40), 18])[:, None]).all()


def test_spectrogram_of_another_transform() -> None:
    """torch.stft centres a short window in its transform, which 156 zeros at both ends make up for."""
    waves = torch.from_numpy(np.random.default_rng(0).integers(-32768, 32768, (101, 8000)).astype(np.int16))
    padded = torch.nn.functional.pad(waves / 32768, (156, 156))
    options = dict(n_fft=512, hop_length=80, win_length=200, window=torch.hann_window(200), center=False)
    magnitudes = torch.stft(padded, return_complex=True, **options).abs()  # type: ignore[arg-type]
    expected = torch.log(torch.einsum("nft,fb->ntb", magnitudes, sound.filters()) + 1e-6)
    found = sound.log_mel(waves)
    assert found.shape == (101, 98, 40) and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-4)


def test_silence_and_where_a_sample_shows() -> None:
    """Frame t holds the samples from 80 t to 80 t + 199; of 98 frames the last ends with sample 7,959."""
    waves = torch.zeros(3, 8000, dtype=torch.int16)
    waves[1, 4100], waves[2, 7960:] = 32767, 32767
    x = sound.log_mel(waves)
    assert x[0].unique().tolist() == pytest.approx([SILENCE]) and torch.equal(x[2], x[0])
    assert (x[1] > x[0]).any(1).nonzero().flatten().tolist() == [49, 50, 51]
