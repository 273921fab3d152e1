"""The data sets: which files belong to each, how their bytes become tensors, by which constants they are normalised.

Constants are those of the code behind "Masked Random Noise for Communication-Efficient Federated Learning" (FedMRN).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlib.data import images, sound, text
from fedlib.data.objective import CLASSIFICATION, Objective
from fedlib.errors import SpecError


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, normalised, on the CPU; c channels, h by w pixels.

    A text's characters lie along h; of a recording time does, and w are bands of frequencies. Data of one's own may
    have any shape, and numbers in place of labels.
    """

    train_x: torch.Tensor  # float32 [n,c,h,w]
    train_y: torch.Tensor  # int64 [n]; of texts [n,h], NO_LABEL where there is padding
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: tuple[str, ...]  # name of label 0, 1, ...
    owners: np.ndarray | None = None  # whose each training sample is, int64 [n], where the data says so
    shards: tuple[np.ndarray, ...] | None = None  # places of each client's samples, where they are given
    objective: Objective = CLASSIFICATION


@dataclass(frozen=True)
class Entry:
    """What is known of a data set before any byte of it is here."""

    name: str
    read: Callable[[Path], images.Arrays | text.Owned]  # gets the folder that `files` starts from
    classes: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)  # a channel each, of pixels scaled to 0..1
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0  # the largest pixel value
    version: int = 1  # of the reading rule: raise it when `read` gives other numbers from the same files
    folder: str = "data-extra"  # below the project's root
    files: tuple[tuple[str, str], ...] = ()  # path below `folder`, its hash as of `sources._hash`
    most: int = 64_000_000  # bytes of its largest file, unpacked, rounded up where a server's packing decides
    shipped: str = ""  # SHA-256 of arrays that come with a library instead of files
    archive: str = ""  # tar file that a mirror folder may hold in place of the files
    mirrors: Sequence[Sequence[str]] = ()  # per mirror: all its addresses; "a/b#c" if our name is c, not b
    package: str = ""  # Debian's package with the same files
    samples: int = 0  # training samples, which a run's clients are held against; 0: not known beforehand
    held: Dataset | None = None  # itself, where it has no files; its name then tells what is in it
    code: str = ""  # digest of a caller's own loss and metrics


# Hash of each file as of `sources._hash`; an MD5 is torchvision's, where no SHA-256 is published.
FILES = """
sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888 FashionMNIST/raw/train-images-idx3-ubyte
sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9 FashionMNIST/raw/train-labels-idx1-ubyte
sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b FashionMNIST/raw/t10k-images-idx3-ubyte
sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34 FashionMNIST/raw/t10k-labels-idx1-ubyte
md5:c99cafc152244af753f735de768cd75f cifar-10-batches-py/data_batch_1
md5:d4bba439e000b95fd0a9bffe97cbabec cifar-10-batches-py/data_batch_2
md5:54ebc095f3ab1f0389bbae665268c751 cifar-10-batches-py/data_batch_3
md5:634d18415352ddfa80567beed471001a cifar-10-batches-py/data_batch_4
md5:482c414d41f54cd18b22e5b47cb7c3cb cifar-10-batches-py/data_batch_5
md5:40351d587109b95175f43aff81a1287e cifar-10-batches-py/test_batch
md5:5ff9c542aee3614f3951f8cda6e48888 cifar-10-batches-py/batches.meta
sha256:b99175c1947f03f3b61ee04b3e630c260ae52244fd6eec091d702257af8a19a6 cifar10-jpeg/cifar10-jpeg.npz
md5:58c8d27c78d21e728a6bc7b3cc06412e EMNIST/raw/gzip.zip
sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed shakespeare/tinyshakespeare.txt
wav:1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959 spoken-digits/free-spoken-digit-dataset.tar.gz
"""


def _files(folder: str) -> tuple[tuple[str, str], ...]:
    """Path and hash of each of FILES below a folder."""
    pairs = (line.split() for line in FILES.splitlines() if f" {folder}/" in line)
    return tuple((path, hash) for hash, path in pairs)


ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
SPOKEN_DIGITS = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive"
CIFAR10: dict[str, Any] = dict(
    classes=images.CIFAR10_CLASSES, samples=50_000, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            name="fashion-mnist",
            read=images.read_fashion_mnist,
            classes=(
                *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
            samples=60_000,
            mean=(0.2860,),
            std=(0.3530,),
            folder="data",
            most=47_040_016,
            files=_files("FashionMNIST"),
            mirrors=[[f"{ZALANDO}/{path.rpartition('/')[2]}.gz" for path, _ in _files("FashionMNIST")]],
            package="dataset-fashion-mnist",
        ),
        Entry(
            name="cifar10",
            read=images.read_cifar10,
            **CIFAR10,
            most=32_000_000,
            files=_files("cifar-10-batches-py"),
            archive="cifar-10-python.tar.gz",
            mirrors=[["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]],
        ),
        Entry(
            name="cifar10-jpeg",
            read=images.read_cifar10_jpeg,
            **CIFAR10,
            most=55_553_115,
            files=_files("cifar10-jpeg"),
        ),
        Entry(
            name="emnist",
            read=images.read_emnist,
            classes=tuple(images.CHARACTERS),
            samples=697_932,
            most=562_000_000,
            files=_files("EMNIST"),
            mirrors=[["https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"]],
        ),
        Entry(
            name="digits",
            read=images.read_digits,
            classes=tuple("0123456789"),
            samples=1_437,
            mean=(0.5,),  # with scale 16: x/8 - 1, so from -1 to 1
            std=(0.5,),
            scale=16.0,
            shipped=f"sha256:{images.DIGITS}",
        ),
        Entry(
            name="shakespeare",
            read=text.read_shakespeare,
            classes=text.CLASSES,
            samples=11_799,
            scale=1.0,  # the model reads the characters' own numbers
            most=1_115_394,
            files=_files("shakespeare"),
            mirrors=[[f"{CHAR_RNN}/input.txt#tinyshakespeare.txt"]],
        ),
        Entry(
            name="spoken-digits",
            read=sound.read_spoken_digits,
            classes=tuple("0123456789"),
            samples=2_700,
            mean=(-8.3862,),  # of the training set; silence is -13.8
            std=(6.1572,),
            scale=1.0,
            most=20_000_000,
            files=_files("spoken-digits"),
            mirrors=[
                [f"{SPOKEN_DIGITS}/26eb9aaf76e81b692f806f9140c2d2777410d7a1.tar.gz#free-spoken-digit-dataset.tar.gz"]
            ],
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
        train_x=normalise(train_x),
        train_y=torch.tensor(train_y, dtype=torch.int64),
        test_x=normalise(test_x),
        test_y=torch.tensor(test_y, dtype=torch.int64),
        classes=entry.classes,
        owners=owners[0] if owners else None,
    )


def digest(name: str | Entry) -> str:
    """SHA-256 in hex of all that decides a data set's numbers: expected hashes, normalisation, version of the reading.

    Needs no data on disk. Raises SpecError for an unknown name.
    """
    entry = find(name)
    numbers = (entry.mean, entry.std, entry.scale, entry.version)
    text = json.dumps([entry.name, entry.files, entry.shipped, *numbers])
    return hashlib.sha256(text.encode()).hexdigest()
