"""The data sets: which files belong to each, how their bytes become tensors, by which constants they are normalised.

Constants are those of the code behind "Masked Random Noise for Communication-Efficient Federated Learning" (FedMRN).
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedlib.data import idx, text
from fedlib.data.idx import read_idx
from fedlib.errors import DataError, SpecError

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""train_x uint8 [n,c,h,w], train_y [n], test_x, test_y"""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, normalised, on the CPU; c channels, h by w pixels. A text's characters lie along h."""

    name: str
    train_x: torch.Tensor  # float32 [n,c,h,w]
    train_y: torch.Tensor  # int64 [n]; of texts [n,h], NO_LABEL where there is padding
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: tuple[str, ...]  # name of label 0, 1, ...
    owners: np.ndarray | None = None  # whose each training sample is, int64 [n], where the data says so


@dataclass(frozen=True)
class Entry:
    """What is known of a data set before any byte of it is here."""

    name: str
    read: Callable[[Path], Arrays | text.Owned]  # gets the folder that `files` starts from
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # a channel each, of pixels scaled to 0..1
    std: tuple[float, ...]
    scale: float = 255.0  # the largest pixel value
    version: int = 1  # of the reading rule: raise it when `read` gives other numbers from the same files
    folder: str = "data-extra"  # below the project's root
    files: tuple[tuple[str, str], ...] = ()  # path below `folder`, "sha256:..." of the unpacked bytes
    shipped: str = ""  # SHA-256 of arrays that come with a library instead of files
    archive: str = ""  # tar file that a mirror folder may hold in place of the files
    mirrors: Callable[[], list[list[str]]] = list  # per mirror: all its addresses; "a/b#c" if our name is c, not b
    package: str = ""  # Debian's package with the same files


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
            decoded = np.empty((len(ends) - 1, 32, 32, 3), np.uint8)
            for i in range(len(decoded)):
                decoded[i] = np.asarray(Image.open(io.BytesIO(jpeg[ends[i] : ends[i + 1]])))
            return decoded.transpose(0, 3, 1, 2)

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


def _emnist_mirrors() -> list[list[str]]:
    from torchvision.datasets import EMNIST

    return [[EMNIST.url]]


def _fashion_mnist_mirrors() -> list[list[str]]:
    # Imported late: torchvision takes seconds, and only a download needs its addresses.
    from torchvision.datasets import FashionMNIST

    return [[mirror + name for name, _ in FashionMNIST.resources] for mirror in FashionMNIST.mirrors]


def _cifar10_mirrors() -> list[list[str]]:
    from torchvision.datasets import CIFAR10

    return [[CIFAR10.url]]


DIGITS = "428ad214e900fe9343f94d9fedc8a16d461db8cd1bc0f61eecf448b8c5f16b35"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
CIFAR10_MEAN, CIFAR10_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            name="fashion-mnist",
            read=read_fashion_mnist,
            classes=(
                *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
            mean=(0.2860,),
            std=(0.3530,),
            folder="data",
            files=tuple(
                (f"FashionMNIST/raw/{name}", f"sha256:{digest}")
                for name, digest in (
                    ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
                    ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
                    ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
                    ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
                )
            ),
            mirrors=_fashion_mnist_mirrors,
            package="dataset-fashion-mnist",
        ),
        Entry(
            name="cifar10",
            read=read_cifar10,
            classes=CIFAR10_CLASSES,
            mean=CIFAR10_MEAN,
            std=CIFAR10_STD,
            # The MD5s that torchvision publishes; of these files no SHA-256 is published.
            files=tuple(
                (f"cifar-10-batches-py/{name}", f"md5:{digest}")
                for name, digest in (
                    ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
                    ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
                    ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
                    ("data_batch_4", "634d18415352ddfa80567beed471001a"),
                    ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
                    ("test_batch", "40351d587109b95175f43aff81a1287e"),
                    ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
                )
            ),
            archive="cifar-10-python.tar.gz",
            mirrors=_cifar10_mirrors,
        ),
        Entry(
            name="cifar10-jpeg",
            read=read_cifar10_jpeg,
            classes=CIFAR10_CLASSES,
            mean=CIFAR10_MEAN,
            std=CIFAR10_STD,
            files=(
                (
                    "cifar10-jpeg/cifar10-jpeg.npz",
                    "sha256:b99175c1947f03f3b61ee04b3e630c260ae52244fd6eec091d702257af8a19a6",
                ),
            ),
        ),
        Entry(
            name="emnist",
            read=idx.read_emnist,
            classes=tuple(idx.CHARACTERS),
            mean=(0.0,),
            std=(1.0,),
            # The MD5 that torchvision publishes; of these files no SHA-256 is published.
            files=((idx.EMNIST, "md5:58c8d27c78d21e728a6bc7b3cc06412e"),),
            mirrors=_emnist_mirrors,
        ),
        Entry(
            name="digits",
            read=read_digits,
            classes=tuple("0123456789"),
            mean=(0.5,),  # with scale 16: x/8 - 1, so from -1 to 1
            std=(0.5,),
            scale=16.0,
            shipped=f"sha256:{DIGITS}",
        ),
        Entry(
            name="shakespeare",
            read=text.read_shakespeare,
            classes=text.CLASSES,
            mean=(0.0,),  # the model reads the characters' own numbers
            std=(1.0,),
            scale=1.0,
            files=(
                (
                    "shakespeare/tinyshakespeare.txt",
                    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                ),
            ),
            mirrors=lambda: [[f"{CHAR_RNN}/input.txt#tinyshakespeare.txt"]],
        ),
    )
}


def find(name: str | Entry) -> Entry:
    """The entry of that name; an Entry is passed through. Raises SpecError for an unknown name."""
    if isinstance(name, Entry):
        return name
    if name not in ENTRIES:
        raise SpecError(f"data: unknown data set {name!r}; allowed: {', '.join(ENTRIES)}")
    return ENTRIES[name]


def read(entry: Entry, folder: Path) -> Dataset:
    """Read and normalise an entry's files below `folder`; raises DataError when they cannot be read.

    Training and test images are normalised by the same constants, those of the training images. The authors of FedMRN
    take constants of the test images for Fashion-MNIST's test set (0.2868, 0.3524); a model should not know these.
    """
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (entry.mean, entry.std))
    train_x, train_y, test_x, test_y, *owners = entry.read(folder)

    def normalise(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float32).contiguous().div_(entry.scale).sub_(mean).div_(std)

    return Dataset(
        name=entry.name,
        train_x=normalise(train_x),
        train_y=torch.tensor(train_y, dtype=torch.int64),
        test_x=normalise(test_x),
        test_y=torch.tensor(test_y, dtype=torch.int64),
        classes=entry.classes,
        owners=owners[0] if owners else None,
    )
