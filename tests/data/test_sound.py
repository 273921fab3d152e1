"""Spoken digits: archives packed anew, damaged or foreign, spectrograms, and the real recordings where they are."""

import gzip
import hashlib
import io
import math
import tarfile
import wave
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common import present
from hypothesis import given
from hypothesis import strategies as st
from tiny_set import Capture, Serve, files_below, root_with

from fedlib.data import archive, partition, sets, sound, sources
from fedlib.data.sources import load
from fedlib.errors import DataError

NAME = "free-spoken-digit-dataset.tar.gz"
PLACE = Path("data-extra") / "spoken-digits" / NAME
SILENCE = math.log(1e-6)


def wav(values: list[int], rate: int = 8000, channels: int = 1, width: int = 2) -> bytes:
    packed = io.BytesIO()
    with wave.open(packed, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", "not compressed"))
        file.writeframes(np.array(values, f"i{width}").tobytes())
    return packed.getvalue()


def pack(files: list[tuple[str, bytes]], prefix: str = "any/recordings/", level: int = 9, time: int = 0) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=level, mtime=time) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for name, body in files:
            member = tarfile.TarInfo(prefix + name)
            member.size, member.mtime = len(body), time
            tar.addfile(member, io.BytesIO(body))
    return packed.getvalue()


def fingerprint(files: list[tuple[str, bytes]]) -> str:
    """What `sha256sum *.wav | sha256sum` prints."""
    lines = [f"{hashlib.sha256(body).hexdigest()}  {name}\n" for name, body in sorted(files)]
    return "wav:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def expecting(files: list[tuple[str, bytes]], *addresses: str) -> sets.Entry:
    return replace(
        sets.find("spoken-digits"),
        files=((f"spoken-digits/{NAME}", fingerprint(files)),),
        mirrors=[[f"{address}#{NAME}"] for address in addresses],
    )


FEW = [(f"{digit}_theo_{digit}.wav", wav([digit, -digit, 7])) for digit in range(4)]
PACKED = pack(FEW)


@cache
def whole() -> tuple[list[tuple[str, bytes]], bytes]:
    """All 3,000 names, sorted by speaker, digit and take, and the archive in another order.

    Recording i is 3 samples i + 1; but the first one has 8,005, the second 8,000, and the third none.
    """
    files: list[tuple[str, bytes]] = []
    for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"):
        for digit in range(10):
            for take in range(50):
                i = len(files)
                files.append((f"{digit}_{speaker}_{take}.wav", wav([i + 1] * {0: 8005, 1: 8000, 2: 0}.get(i, 3))))
    return files, pack([("README.md", b"not a recording"), *reversed(files)], level=1)


@pytest.fixture(autouse=True)
def no_mirror_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLIB_MIRROR", raising=False)


# --- reading ---


def stored(folder: Path, packed: bytes) -> Path:
    path = folder / "spoken-digits" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(packed)
    return path


def test_recordings_are_sorted_padded_and_cut(tmp_path: Path) -> None:
    path = stored(tmp_path, whole()[1])
    keys, waves = sound.recordings(path)
    assert keys.tolist() == [[s, d, t] for s in range(6) for d in range(10) for t in range(50)]
    assert waves.shape == (3000, 8000) and waves.dtype == np.int16
    assert (waves[:2] == [[1], [2]]).all() and not waves[2].any()
    assert (waves[3:, :3] == np.arange(4, 3001)[:, None]).all() and not waves[3:, 3:].any()


def test_samples_and_owners(tmp_path: Path) -> None:
    files, packed = whole()
    entry = expecting(files)
    stored(tmp_path / "data-extra", packed)
    data = load(replace(entry, mean=(1.0,), std=(2.0,)), tmp_path)
    assert data.train_x.shape == (2700, 1, 98, 40) and data.test_x.shape == (300, 1, 98, 40)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.owners is not None and data.owners.tolist() == [s for s in range(6) for _ in range(450)]
    assert data.train_y.tolist() == [d for _ in range(6) for d in range(10) for _ in range(45)]
    assert data.test_y.tolist() == [d for _ in range(6) for d in range(10) for _ in range(5)]
    assert data.classes == tuple("0123456789")

    # takes 5 and 6 of George's nought are recordings 5 and 6, take 0 is a second without zeros, take 2 is silence
    short = torch.zeros(2, 8000, dtype=torch.int16)
    short[0, :3], short[1, :3] = 6, 7
    assert torch.equal(data.train_x[:2], (sound.log_mel(short)[:, None] - 1) / 2)
    assert (data.test_x[0, 0] > data.test_x[2, 0]).any(1).all()
    assert data.test_x[2].unique().tolist() == pytest.approx([(SILENCE - 1) / 2])

    dealt = partition.make(data.train_y.numpy(), clients=6, kind="natural", seed=0, owners=data.owners)
    assert [len(dealt.indices(k)) for k in range(6)] == [450] * 6


GOOD = wav([1, 2, 3])


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (None, "cannot be read .*No such file"),
        (b"<html>log in first</html>", "cannot be read .not a gzip file"),
        (b"", "cannot be read"),
        (PACKED[:-40], "cannot be read .Compressed file ended"),
        (pack([("7_nobody_3.wav", GOOD)]), "has a recording '7_nobody_3.wav', expected a name like 7_george_32.wav"),
        (pack([("10_theo_3.wav", GOOD)]), "has a recording '10_theo_3.wav'"),
        (pack([("7_theo_3_4.wav", GOOD)]), "has a recording '7_theo_3_4.wav'"),
        (pack([("7_theo.wav", GOOD)]), "has a recording '7_theo.wav'"),
        (pack([]), "0 recordings, 0 of them different, expected 50 takes of each digit by each of 6 speakers"),
        (pack([("7_theo_3.wav", GOOD)] * 2), "2 recordings, 1 of them different"),
        (pack([("7_theo_3.wav", b"<html></html>")]), f"{NAME}: 7_theo_3.wav: not a WAV file of samples"),
    ],
)
def test_an_archive_without_the_recordings(tmp_path: Path, packed: bytes | None, reason: str) -> None:
    path = stored(tmp_path, packed or b"")
    if packed is None:
        path.unlink()
    with pytest.raises(DataError, match=reason) as caught:
        sound.read_spoken_digits(tmp_path)
    assert str(path) in str(caught.value) and "python -m fedlib data get spoken-digits" in str(caught.value)


def test_as_many_recordings_but_others(tmp_path: Path) -> None:
    files = whole()[0]
    for last, reason in (("9_yweweler_50.wav", "has a recording"), (files[0][0], "3000 recordings, 2999 of them")):
        folder = tmp_path / last
        stored(folder, pack([*files[:-1], (last, GOOD)], level=1))
        with pytest.raises(DataError, match=reason):
            sound.read_spoken_digits(folder)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "ends in its header"),
        (GOOD[:30], "ends in its header"),
        (GOOD[:40], "fmt chunk and/or data chunk missing"),
        (b"OggS" + GOOD[4:], "file does not start with RIFF id"),
        (GOOD[:8] + b"AVI " + GOOD[12:], "not a WAVE file"),
        (GOOD[:20] + b"\3" + GOOD[21:], "unknown format: 3"),  # floats
        (wav([1, 2, 3], rate=16000), "are 1, 16 and 16000, expected 1, 16 and 8000"),
        (wav([1, 2, 3, 4], channels=2), "are 2, 16 and 8000, expected"),
        (wav([1, 2, 3], width=1), "are 1, 8 and 8000, expected"),
        (wav([1, 2, 3], width=4), "are 1, 32 and 8000, expected"),
        (GOOD[:-1], "5 bytes of samples, but its header asks for 6"),
    ],
)
def test_a_file_that_is_no_such_recording(raw: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=f"^the place: .*{reason}.*data get spoken-digits"):
        sound.samples(raw, "the place")


def test_samples_by_hand() -> None:
    raw = b"RIFF" + bytes.fromhex("2a000000") + b"WAVEfmt " + bytes.fromhex("10000000 0100 0100 401f0000 803e0000 0200")
    raw += bytes.fromhex("1000") + b"data" + bytes.fromhex("06000000 0100 ff7f 0080")
    assert sound.samples(raw, "").tolist() == [1, 32767, -32768]


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(GOOD)))
def test_any_damage_to_a_recording_is_told(changes: list[tuple[int, int]], end: int) -> None:
    raw = bytearray(GOOD)
    for place, value in changes:
        raw[place] = value
    try:
        found = sound.samples(bytes(raw[:end]), "the place")
    except DataError as error:
        assert str(error).startswith("the place: ")
    else:
        assert found.dtype == np.int16 and len(found) <= 3


# --- spectrograms, against numbers worked by hand and another transform ---


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


# --- fetching ---


def test_packed_anew_is_the_same_and_other_recordings_are_not(tmp_path: Path) -> None:
    def found(packed: bytes) -> str:
        path = tmp_path / "archive"
        path.write_bytes(packed)
        return sources._hash(path, "wav:")

    right = fingerprint(FEW)
    assert found(PACKED) == right
    for packed in (
        *(pack(FEW, prefix="repository-26eb9aa/recordings/"), pack(FEW, prefix="")),
        *(pack(FEW, level=0), pack(FEW, level=1, time=1), pack(FEW[::-1])),
        pack([("README.md", b"text"), *FEW, ("wav", b"text")]),
    ):
        assert packed != PACKED and found(packed) == right
    for files in (
        [*FEW[:3], ("3_theo_3.wav", wav([3, -3, 8]))],
        [*FEW[:3], ("3_theo_4.wav", FEW[3][1])],
        *([*FEW[:3]], [*FEW, FEW[0]], [*FEW, ("4_theo_4.wav", b"")], []),
        [(FEW[0][0], FEW[1][1]), (FEW[1][0], FEW[0][1]), *FEW[2:]],
    ):
        assert found(pack(files)) == fingerprint(files) != right
    assert sources._hash(tmp_path / "absent", "wav:") == "no file"


STORED = pack(FEW, level=0)  # so that damage reaches the tar archive


@given(st.sampled_from([PACKED, STORED]), st.data())
def test_any_damage_to_an_archive_is_found(
    tmp_path_factory: pytest.TempPathFactory, packed: bytes, data: st.DataObject
) -> None:
    path, raw = tmp_path_factory.getbasetemp() / "damaged.tar.gz", bytearray(packed)
    place, value = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 255))
    raw[place] ^= value
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    found = sources._hash(path, "wav:")
    assert found.startswith(("wav:", "no readable archive ("))
    if found == fingerprint(FEW):  # dates, owners, the folder's name and what comes after the last recording
        assert sorted((name, source.read()) for name, source in archive.members(path) if "wav" in name) == FEW


@pytest.mark.parametrize("layout", [NAME, f"{NAME}.gz", f"any/{NAME}", f"spoken-digits/{NAME}"])
def test_from_a_mirror_folder_as_it_is(tmp_path: Path, layout: str) -> None:
    given = tmp_path / "mirror" / layout
    given.parent.mkdir(parents=True)
    given.write_bytes(gzip.compress(PACKED) if layout.endswith(".gz.gz") else PACKED)
    entry = expecting(FEW)
    assert not present(entry, tmp_path)
    sources.get(entry, tmp_path, mirror=tmp_path / "mirror")
    assert (tmp_path / PLACE).read_bytes() == PACKED
    assert present(entry, tmp_path)


def test_from_a_server_that_packed_it_anew(tmp_path: Path, serve: Serve, capsys: Capture) -> None:
    anew = pack(FEW, prefix="repository-26eb9aa/recordings/", level=1)
    address = serve({"archive/26eb9aa.tar.gz": anew})
    sources.get(expecting(FEW, f"{address}/archive/26eb9aa.tar.gz"), tmp_path)
    assert f"from mirror {address}/archive, hashes right" in capsys.readouterr().out
    assert (tmp_path / PLACE).read_bytes() == anew
    assert files_below(tmp_path) == [PLACE.as_posix()]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (pack(FEW[:3]), f"expected {fingerprint(FEW)}, found {fingerprint(FEW[:3])}"),
        (b"<html>", f"expected {fingerprint(FEW)}, found no readable archive .not a gzip file"),
        (PACKED[:-40], "found no readable archive .Compressed file ended"),
    ],
)
def test_a_server_without_the_archive(tmp_path: Path, serve: Serve, body: bytes, reason: str) -> None:
    entry = expecting(FEW, serve({"x.tar.gz": body}) + "/x.tar.gz")
    with pytest.raises(DataError, match=reason):
        sources.get(entry, tmp_path)
    assert files_below(tmp_path) == []


# --- the real recordings, where they are ---


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return root_with("spoken-digits", NAME, tmp_path_factory)


def test_real_recordings(home: Path) -> None:
    data = load("spoken-digits", home)
    assert data.train_x.shape == (2700, 1, 98, 40) and data.test_x.shape == (300, 1, 98, 40)
    assert data.train_y.bincount().tolist() == [270] * 10 and data.test_y.bincount().tolist() == [30] * 10
    assert data.owners is not None and np.bincount(data.owners).tolist() == [450] * 6
    assert data.train_x.mean().item() == pytest.approx(0, abs=1e-3)
    assert data.train_x.std().item() == pytest.approx(1, abs=1e-3)
    # of George's and Jackson's nought and of the last nine, take 5: the frame at 0.1 s, bands 0, 10, 25 and 39
    back = data.train_x * 6.1572 - 8.3862
    for i, values in (
        (0, [-1.465, -0.685, -1.662, -0.630]),
        (450, [1.532, 1.289, -0.304, -0.624]),
        (2699, [-0.605, -0.280, -2.250, -2.936]),
    ):
        assert back[i, 0, 10, [0, 10, 25, 39]].tolist() == pytest.approx(values, abs=0.01)


def test_real_recordings_are_all_different_and_short(home: Path) -> None:
    """So that none is in both sets; what is cut off is little."""
    path = home / PLACE
    _, waves = sound.recordings(path)
    assert len({whole.tobytes() for whole in waves}) == 3000
    sizes = np.array(
        [len(sound.samples(source.read(), name)) for name, source in archive.members(path) if "wav" in name]
    )
    assert (sizes > 8000).sum() == 20 and sizes.max() == 18_262 and sizes.min() == 1_148
    data = load("spoken-digits", home)
    both = torch.cat([data.train_x, data.test_x]).flatten(1).numpy()
    assert len({x.tobytes() for x in both}) == 3000
