"""Spoken digits as spectrograms, a client for each speaker.

The recordings are the free spoken digit dataset (Jackson et al., CC BY-SA 4.0): 50 takes of every digit by each of six
speakers, trimmed to the word. Its README names the takes for testing.
"""

import io
import itertools
import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlib.data import archive
from fedlib.data.text import Owned
from fedlib.errors import DataError

ARCHIVE = "spoken-digits/free-spoken-digit-dataset.tar.gz"
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")  # by number
TAKES = 50  # of a digit by a speaker
TESTED = 5  # of these, the first ones
RATE = 8000  # samples a second
LENGTH = 8000  # samples of a recording, as it is read
FRAME, HOP, FFT = 200, 80, 512  # samples: 25 ms every 10 ms, filled up with zeros to a power of two
BANDS, LOW, HIGH = 40, 60.0, 3800.0  # Hz
FLOOR = 1e-6  # what silence has in place of a magnitude of 0
MEND = "to mend it: python -m fedlib data get spoken-digits"


def read_spoken_digits(folder: Path) -> Owned:
    """2,700 and 300 recordings: x float32 [n,1,98,40] spectrograms as of `log_mel`, y the digit, owners in SPEAKERS.

    Sorted by speaker, digit and take. Takes 0 to 4 are for testing. Raises DataError as `recordings` does.
    """
    keys, waves = recordings(folder / ARCHIVE)
    x, (speaker, digit, take) = log_mel(torch.from_numpy(waves))[:, None].numpy(), keys.T
    tested = take < TESTED
    return x[~tested], digit[~tested], x[tested], digit[tested], speaker[~tested]


def recordings(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Speaker, digit and take of each recording, int64 [3000,3], and its first second, int16 [3000,8000].

    Zeros follow a shorter one; only 20 are longer. Raises DataError when the archive cannot be read, a recording is
    missing, there twice or has another name than `digit_speaker_take.wav`, and as `samples` does.
    """
    keys = list(itertools.product(range(len(SPEAKERS)), range(10), range(TAKES)))
    rows = {f"{digit}_{SPEAKERS[speaker]}_{take}.wav": row for row, (speaker, digit, take) in enumerate(keys)}
    waves = np.zeros((len(keys), LENGTH), np.int16)
    names = []
    try:
        for name, source in archive.members(path):
            if not name.endswith(".wav"):
                continue
            if name not in rows:
                raise DataError(
                    f"{path}: has a recording {name!r}, expected a name like 7_{SPEAKERS[0]}_32.wav; {MEND}"
                )
            second = samples(source.read(), f"{path}: {name}")[:LENGTH]
            waves[rows[name], : len(second)] = second
            names.append(name)
    except (OSError, *archive.BROKEN) as error:
        raise DataError(f"{path}: cannot be read ({error}); {MEND}") from error
    if sorted(names) != sorted(rows):
        raise DataError(
            f"{path}: {len(names)} recordings, {len({*names})} of them different, "
            f"expected {TAKES} takes of each digit by each of {len(SPEAKERS)} speakers; {MEND}"
        )
    return np.array(keys), waves


def samples(raw: bytes, where: str) -> np.ndarray:
    """All samples int16 [n] in the bytes of a WAV file, mono, 16 bits, 8 kHz.

    Raises DataError, which names `where`, when it is none, is of another kind or ends before its header says.
    """
    try:
        with wave.open(io.BytesIO(raw)) as file:
            channels, width, rate, n = file.getparams()[:4]
            data = file.readframes(n)
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: a chunk longer than the one around it
        raise DataError(f"{where}: not a WAV file of samples ({str(error) or 'ends in its header'}); {MEND}") from error
    if (channels, 8 * width, rate) != (1, 16, RATE):
        raise DataError(
            f"{where}: channels, bits and samples a second are {channels}, {8 * width} and {rate}, "
            f"expected 1, 16 and {RATE}; {MEND}"
        )
    if len(data) != 2 * n:
        raise DataError(f"{where}: {len(data)} bytes of samples, but its header asks for {2 * n}; {MEND}")
    return np.frombuffer(data, np.int16)


def log_mel(waves: Tensor) -> Tensor:
    """Spectrograms float32 [n,frames,40] of samples int16 [n,length]: ln(FLOOR + magnitude in a band).

    A magnitude is that of the Fourier transform of a frame under a periodic Hann window, with samples from -1 to 1. The
    first frame begins at sample 0 and the last ends inside, so that a second has 98.
    """
    window, weights, spectrograms = torch.hann_window(FRAME), filters(), []
    for block in waves.split(100):  # the transforms of all recordings together would take 600 MB
        frames = (block / 32768).unfold(1, FRAME, HOP) * window
        spectrograms.append((torch.fft.rfft(frames, FFT).abs() @ weights).add_(FLOOR).log_())
    return torch.cat(spectrograms)


def filters() -> Tensor:
    """Weight of each of the transform's frequencies in each band, float32 [257,40]: triangles of height 1.

    Band i begins at `edges()[i]`, is highest at the next edge and ends at the one after it.
    """
    frequencies = torch.arange(FFT // 2 + 1, dtype=torch.float64)[:, None] * (RATE / FFT)
    low, centre, high = edges().unfold(0, BANDS, 1)
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


def edges() -> Tensor:
    """Frequencies in Hz, float64 [42], evenly spaced from LOW to HIGH on the mel scale 2595 log10(1 + f / 700) of HTK.

    Source: Young et al., The HTK Book, "Filterbank Analysis".
    """
    low, high = (2595 * math.log10(1 + frequency / 700) for frequency in (LOW, HIGH))
    return 700 * (10 ** (torch.linspace(low, high, BANDS + 2, dtype=torch.float64) / 2595) - 1)
