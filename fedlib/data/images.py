"""From files to arrays: the data sets of images. Each reader gets the folder that the entry's files start from."""

import gzip
import hashlib
import io
import itertools
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedlib.errors import DataError

EMNIST = "EMNIST/raw/gzip.zip"  # torchvision's place for it
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # by label
DIGITS = "428ad214e900fe9343f94d9fedc8a16d461db8cd1bc0f61eecf448b8c5f16b35"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""train_x uint8 [n,c,h,w], train_y [n], test_x, test_y"""


def read_idx(path: Path) -> np.ndarray:
    """Array of uint8 in a file of MNIST's IDX format, in the file's own shape. Raises DataError as `parse` does."""
    return parse(path.read_bytes(), str(path))


def parse(raw: bytes, where: str) -> np.ndarray:
    """Array of uint8 from the bytes of an IDX file.

    Raises DataError, which names `where`, when the header is another, or there are more or fewer bytes than it says.
    Source: "the IDX file format" on the MNIST page of LeCun, Cortes and Burges.
    """
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(
            f"{where}: not an IDX file of bytes (starts with {raw[:4].hex() or 'nothing'}, expected 000008..)"
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{where}: ends inside its header ({len(raw)} bytes of {start})")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{where}: {len(raw) - start} bytes of data, but its header {shape} asks for {math.prod(shape)}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_emnist(folder: Path) -> Arrays:
    """697,932 and 116,323 grey images of 28 x 28 in 62 classes, the split "by class" (Cohen et al. 2017).

    The archive's images lie on their side, and are turned upright. It does not say who wrote what, so that its clients
    are dealt out like others; the federated EMNIST of LEAF and TensorFlow has a client for each writer. As float32 the
    images take 2.6 GB. Raises DataError when the archive cannot be read.
    """
    path = folder / EMNIST
    arrays = []
    try:
        with zipfile.ZipFile(path) as archive:
            for part in ("train", "test"):
                for kind in ("images-idx3", "labels-idx1"):
                    name = f"emnist-byclass-{part}-{kind}-ubyte.gz"
                    arrays.append(parse(gzip.decompress(archive.read(f"gzip/{name}")), f"{path}: {name}"))
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); mend it by python -m fedlib data get emnist") from error
    train_x, train_y, test_x, test_y = arrays
    return train_x.transpose(0, 2, 1)[:, None], train_y, test_x.transpose(0, 2, 1)[:, None], test_y


def read_fashion_mnist(folder: Path) -> Arrays:
    """60,000 and 10,000 grey images of 28 x 28, from the four IDX files."""
    raw = folder / "FashionMNIST" / "raw"
    train_x, test_x = (read_idx(raw / f"{part}-images-idx3-ubyte")[:, None] for part in ("train", "t10k"))
    train_y, test_y = (read_idx(raw / f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    return train_x, train_y, test_x, test_y


def read_cifar10(folder: Path) -> Arrays:
    """50,000 and 10,000 colour images of 32 x 32, through torchvision.

    The files are pickles: torchvision compares their MD5 before it opens them, and only these files are ever unpickled.
    """
    from torchvision.datasets import CIFAR10

    train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    train_x, test_x = (part.data.transpose(0, 3, 1, 2) for part in (train, test))
    return train_x, np.array(train.targets), test_x, np.array(test.targets)


def read_cifar10_jpeg(folder: Path) -> Arrays:
    """CIFAR-10's images after a lossy JPEG encoding, in another order.

    A result on them is not a result on CIFAR-10. The JPEGs lie one after another: image i is
    `jpeg[offsets[i]:offsets[i+1]]`. Pillow decodes all in about 6 s on one core; torchvision's decoder is deprecated.
    """
    from PIL import Image

    with np.load(folder / "cifar10-jpeg" / "cifar10-jpeg.npz", allow_pickle=False) as file:

        def images(part: str) -> np.ndarray:
            jpeg, ends = file[f"{part}_jpeg"].tobytes(), file[f"{part}_offsets"].tolist()
            decoded = [np.asarray(Image.open(io.BytesIO(jpeg[a:b]))) for a, b in itertools.pairwise(ends)]
            return np.stack(decoded).transpose(0, 3, 1, 2)

        return images("train"), file["train_labels"], images("test"), file["test_labels"]


def read_digits(folder: Path) -> Arrays:
    """1,437 and 360 grey images of 8 x 8 with values 0..16, from scikit-learn itself; needs no file in `folder`.

    The split is numpy's permutation under seed 0, the last 360 for testing. Which images these are moves the accuracy
    by more than the seed of a run does, so the hash covers their order too. Raises DataError when scikit-learn is
    absent, or its digits or numpy's permutation are others.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "data set 'digits' comes with scikit-learn, which is absent: pip install scikit-learn"
        ) from error
    x, y = (array.astype(np.uint8) for array in load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].reshape(-1, 1, 8, 8), y[order]
    found = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
    if found != DIGITS:
        raise DataError(
            f"data set 'digits': other images or another order: expected sha256:{DIGITS}, found sha256:{found}; "
            "install the versions of scikit-learn and numpy that pyproject.toml names"
        )
    return x[:1437], y[:1437], x[1437:], y[1437:]
