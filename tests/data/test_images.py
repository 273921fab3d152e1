"""Reading of images: files by hand, damaged ones, every data set's own format, and the real files where they are."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import present
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_set import MIRROR, NAMES, Serve, files_below, idx, sha256

from fedlib.data import images, sets, sources
from fedlib.data.images import CHARACTERS, EMNIST, read_idx
from fedlib.data.sources import load
from fedlib.errors import DataError

# --- reading ---


@given(st.lists(st.integers(0, 4), min_size=0, max_size=4), st.integers(0, 2**32))
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path_factory.getbasetemp() / "any-idx"
    path.write_bytes(idx(array))
    assert np.array_equal(read_idx(path), array) and read_idx(path).shape == array.shape


def test_idx_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes.fromhex("00000802 00000002 00000003 010203 0405ff"))
    assert read_idx(path).tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "starts with nothing"),
        ("000008", "not an IDX file"),
        ("00000d01 00000001 00000000", "not an IDX file of bytes"),  # floats
        ("1f8b0808", "not an IDX file"),  # still gzip'd
        ("00000803 00000001 0000", "ends inside its header"),
        ("00000802 00000002 00000003 0102030405", "5 bytes of data, but its header \\(2, 3\\) asks for 6"),
        ("00000802 00000002 00000003 01020304050607", "7 bytes of data"),
        ("00000804 ffffffff ffffffff ffffffff ffffffff 01", "1 bytes of data"),
    ],
)
def test_idx_refused(tmp_path: Path, raw: str, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes.fromhex(raw))
    with pytest.raises(DataError, match=reason) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_digits(tmp_path: Path) -> None:
    data = load("digits", tmp_path)
    assert files_below(tmp_path) == []
    assert data.train_x.shape == (1437, 1, 8, 8) and data.test_x.shape == (360, 1, 8, 8)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.train_x.min() == -1 and data.train_x.max() == 1
    assert data.train_x.mean().item() == pytest.approx(-0.39, abs=0.01)
    assert data.train_x.std().item() == pytest.approx(0.75, abs=0.01)
    assert data.classes == tuple("0123456789")
    assert data.train_y.bincount().min() > 125 and data.test_y.bincount().min() > 25
    # known answer: the split is numpy's permutation under seed 0
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    assert data.train_y[:5].tolist() == labels[[360, 1773, 1482, 600, 850]].tolist()
    assert data.test_y[-3:].tolist() == labels[[1528, 975, 607]].tolist()
    assert np.array_equal(data.train_x[0].numpy().ravel(), pixels[360] / 8 - 1)


def tiny_jpegs(folder: Path) -> sets.Entry:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    parts: dict[str, Any] = {}
    for part, chosen in (("train", [0, 1, 2]), ("test", [2])):
        jpegs = []
        for i in chosen:
            buffer = io.BytesIO()
            image = np.zeros((32, 32, 3), np.uint8)
            image[:, :16] = colours[i]
            Image.fromarray(image).save(buffer, "JPEG", quality=75)
            jpegs.append(buffer.getvalue())
        parts[f"{part}_jpeg"] = np.frombuffer(b"".join(jpegs), np.uint8)
        parts[f"{part}_offsets"] = np.cumsum([0, *map(len, jpegs)]).astype(np.uint32)
        parts[f"{part}_labels"] = np.array(chosen, np.uint8)
    path = folder / "cifar10-jpeg.npz"
    np.savez(path, **parts)
    return replace(sets.find("cifar10-jpeg"), files=(("cifar10-jpeg/cifar10-jpeg.npz", sha256(path.read_bytes())),))


def test_cifar10_jpeg(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    entry = tiny_jpegs(tmp_path / "mirror")
    sources.get(entry, tmp_path, mirror=tmp_path / "mirror")
    assert (tmp_path / "data-extra" / "cifar10-jpeg" / "cifar10-jpeg.npz").is_file()
    data = load(entry, tmp_path)
    assert data.train_x.shape == (3, 3, 32, 32) and data.train_y.tolist() == [0, 1, 2]
    back = data.train_x * torch.tensor(entry.std).view(3, 1, 1) + torch.tensor(entry.mean).view(3, 1, 1)
    # the left half of each image has its colour, the right half is black; where they meet the JPEG blurs the colour
    expected = torch.eye(3)[:, :, None, None] * (torch.arange(32) < 16)
    apart = torch.cat([torch.arange(14), torch.arange(18, 32)])
    assert torch.allclose(back[..., apart], expected.expand(3, 3, 32, 32)[..., apart], atol=0.02)
    assert torch.equal(data.test_x[0], data.train_x[2])


class OldPickler(pickle.Pickler):
    """Writes an array's type as numpy of 2009 did: with integers for flags."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def old_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    OldPickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def test_cifar10_through_torchvision(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    bodies = {f"data_batch_{i}": old_pickle({"data": pixels + np.uint8(i), "labels": [i, 9]}) for i in range(1, 6)}
    bodies["test_batch"] = old_pickle({"data": pixels[:1], "labels": [7]})
    bodies["batches.meta"] = old_pickle({"label_names": list(images.CIFAR10_CLASSES)})
    md5 = {name: hashlib.md5(body).hexdigest() for name, body in bodies.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, body in [
            ("../evil", b"x"),
            *((f"cifar-10-batches-py/{name}", body) for name, body in bodies.items()),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    entry = replace(
        sets.find("cifar10"),
        files=tuple((f"cifar-10-batches-py/{name}", f"md5:{value}") for name, value in md5.items()),
        mirrors=[[serve({"cifar-10-python.tar.gz": packed.getvalue()}) + "/cifar-10-python.tar.gz"]],
    )
    home = tmp_path / "home"
    sources.get(entry, home)
    assert files_below(tmp_path) == sorted(f"home/data-extra/cifar-10-batches-py/{name}" for name in bodies)
    data = load(entry, home)
    assert data.train_x.shape == (10, 3, 32, 32) and data.test_x.shape == (1, 3, 32, 32)
    assert data.train_y.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9] and data.test_y.tolist() == [7]
    # second row, third column of the green plane: 1024 + 34 modulo 256, plus 1 in batch 1
    assert data.train_x[0, 1, 1, 2].item() == pytest.approx((35 / 255 - 0.456) / 0.224, abs=1e-6)

    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "cifar-10-python.tar.gz").write_bytes(packed.getvalue())
    sources.get(replace(entry, mirrors=()), tmp_path / "other", mirror=tmp_path / "mirror")
    assert present(entry, tmp_path / "other")


def test_tables_agree_with_torchvision() -> None:
    from torchvision.datasets import CIFAR10, FashionMNIST

    batches = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    assert sets.find("cifar10").files == tuple(
        (f"{CIFAR10.base_folder}/{name}", f"md5:{value}") for name, value in batches
    )
    assert sets.find("cifar10").archive == CIFAR10.filename
    assert sets.find("cifar10").mirrors == [[CIFAR10.url]]
    resources = [name for name, _ in FashionMNIST.resources]
    assert sets.find("fashion-mnist").mirrors == [
        [mirror + name for name in resources] for mirror in FashionMNIST.mirrors
    ]
    assert resources == [f"{name}.gz" for name in NAMES]


def test_normalisation_constants_are_those_of_the_authors() -> None:
    assert (sets.find("fashion-mnist").mean, sets.find("fashion-mnist").std) == ((0.2860,), (0.3530,))
    for name in ("cifar10", "cifar10-jpeg"):
        assert sets.find(name).mean == (0.485, 0.456, 0.406) and sets.find(name).std == (0.229, 0.224, 0.225)


# --- the real files, where they are ---

ABSENT = "data/ is absent: python -m fedlib data get fashion-mnist"


@pytest.mark.skipif(not present("fashion-mnist"), reason=ABSENT)
def test_fashion_mnist() -> None:
    data = load("fashion-mnist")
    assert data.train_x.shape == (60000, 1, 28, 28) and data.test_x.shape == (10000, 1, 28, 28)
    assert data.train_y.bincount().tolist() == [6000] * 10 and data.test_y.bincount().tolist() == [1000] * 10
    assert data.train_x.mean().item() == pytest.approx(0, abs=1e-3)
    assert data.train_x.std().item() == pytest.approx(1, abs=1e-3)
    # the test images are normalised by the training constants, so not quite to 0 and 1
    assert data.test_x.mean().item() == pytest.approx((0.2868 - 0.2860) / 0.3530, abs=1e-3)
    assert len(data.classes) == 10


@pytest.mark.skipif(not present("fashion-mnist"), reason=ABSENT)
def test_data_dvc_pins_these_files() -> None:
    """`dvc repro` writes a changed folder's hash into data.dvc without a word; this notices before it is committed."""
    folder = sources.home() / "data"
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in files_below(folder)}
    listing = [{"md5": md5[name], "relpath": name} for name in md5]
    pinned = hashlib.md5(json.dumps(listing).encode()).hexdigest()
    assert f"md5: {pinned}.dir" in (sources.home() / "data.dvc").read_text()


@pytest.mark.slow
@pytest.mark.skipif("FEDLIB_MIRROR" not in os.environ, reason="FEDLIB_MIRROR names no folder with cifar10-jpeg.npz")
def test_real_cifar10_jpeg(tmp_path: Path) -> None:
    sources.get("cifar10-jpeg", tmp_path, mirror=MIRROR)
    data = load("cifar10-jpeg", tmp_path)
    assert data.train_x.shape == (50000, 3, 32, 32) and data.test_x.shape == (10000, 3, 32, 32)
    assert data.train_y.bincount().tolist() == [5000] * 10 and data.test_y.bincount().tolist() == [1000] * 10
    # the constants are ImageNet's, so mean and spread are compared with those known for CIFAR-10 itself
    mean, std = (torch.tensor(values) for values in (sets.CIFAR10["mean"], sets.CIFAR10["std"]))
    found_mean = data.train_x.mean(dim=(0, 2, 3)) * std + mean
    found_std = data.train_x.std(dim=(0, 2, 3)) * std
    assert found_mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.002)
    assert found_std.tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.005)


# EMNIST


def emnist(name: str = "gzip/emnist-byclass-{}-ubyte.gz", labels: bytes = idx(np.array([61, 0], np.uint8))) -> bytes:
    """Three rows of two pixels each would show a wrong turn; two images, 28 by 28 as the real ones are."""
    images = np.zeros((2, 28, 28), np.uint8)
    images[0, 3, 5], images[1, 27, 0] = 255, 51
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for part in ("train", "test"):
            archive.writestr(name.format(f"{part}-images-idx3"), gzip.compress(idx(images)))
            archive.writestr(name.format(f"{part}-labels-idx1"), gzip.compress(labels))
    return packed.getvalue()


def archived(serve: Serve, body: bytes) -> sets.Entry:
    address = serve({"gzip.zip": body})
    files = ((EMNIST, f"md5:{hashlib.md5(body).hexdigest()}"),)
    return replace(sets.find("emnist"), files=files, mirrors=[[f"{address}/gzip.zip"]])


def test_emnist_from_its_archive(tmp_path: Path, serve: Serve) -> None:
    """Upright: the pixel of row 3 and column 5 in the file is in row 5 and column 3; ink is 1, paper 0."""
    entry = archived(serve, emnist())
    sources.get(entry, tmp_path)
    assert files_below(tmp_path) == [f"data-extra/{EMNIST}"]
    data = load(entry, tmp_path)
    assert data.train_x.shape == data.test_x.shape == (2, 1, 28, 28)
    assert data.train_x[0].nonzero().tolist() == [[0, 5, 3]] and float(data.train_x[0, 0, 5, 3]) == 1
    assert data.train_x[1].nonzero().tolist() == [[0, 0, 27]] and float(data.train_x[1, 0, 0, 27]) == pytest.approx(0.2)
    assert [data.classes[label] for label in data.test_y.tolist()] == ["z", "0"] and len(CHARACTERS) == 62


@pytest.mark.parametrize(
    "body, words",
    [(b"<html>", "File is not a zip file"), (emnist("other/{}"), "no item named"), (emnist(labels=b"x"), "not an IDX")],
)
def test_an_archive_that_is_none_is_refused(tmp_path: Path, serve: Serve, body: bytes, words: str) -> None:
    entry = archived(serve, body)
    sources.get(entry, tmp_path)
    with pytest.raises(DataError, match=words):
        load(entry, tmp_path)


def test_emnist_is_torchvisions() -> None:
    from torchvision.datasets import EMNIST as Theirs

    entry = sets.find("emnist")
    assert dict(entry.files)[EMNIST] == f"md5:{Theirs.md5}" and entry.mirrors == [[Theirs.url]]
    assert list(entry.classes) == Theirs.classes_split_dict["byclass"]
