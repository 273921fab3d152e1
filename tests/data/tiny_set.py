"""A data set of four images of four pixels, with all its files, and what the tests of data sets share."""

import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from common import present

from fedlib.data import images, sets, sources

Serve = Callable[..., str]
Capture = pytest.CaptureFixture[str]
MIRROR = Path(os.environ.get("FEDLIB_MIRROR", ""))  # read before any test clears it
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def sha256(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


IMAGES = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)


LABELS = np.array([2, 0, 1], np.uint8)


FILES = dict(zip(NAMES, (idx(IMAGES), idx(LABELS), idx(IMAGES[:1]), idx(LABELS[:1])), strict=True))


TINY = sets.Entry(
    name="tiny",
    read=images.read_fashion_mnist,
    classes=("a", "b", "c"),
    mean=(0.5,),
    std=(0.25,),
    folder="data",
    files=tuple((f"FashionMNIST/raw/{name}", sha256(raw)) for name, raw in FILES.items()),
)


IN_PLACE = sorted(f"data/FashionMNIST/raw/{name}" for name in NAMES)


def mirrored(*addresses: str, entry: sets.Entry = TINY) -> sets.Entry:
    offers = [[f"{address}/{name}.gz" for name in NAMES] for address in addresses]
    return replace(entry, mirrors=offers)


def zipped(files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(raw) for name, raw in files.items()}


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def root_with(name: str, file: str, factory: pytest.TempPathFactory) -> Path:
    """A root below which a real data set of one file is present: this project, or one filled from FEDLIB_MIRROR."""
    if present(name):
        return sources.home()
    if not (MIRROR / file).is_file():
        pytest.skip(f"data-extra/{name} is absent: python -m fedlib data get {name}")
    root = factory.mktemp("home")
    sources.get(name, root, mirror=MIRROR)
    return root
