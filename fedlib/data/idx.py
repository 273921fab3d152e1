"""MNIST's file format, and EMNIST: digits and letters by hand, in one archive of such files."""

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedlib.errors import DataError

EMNIST = "EMNIST/raw/gzip.zip"  # torchvision's place for it
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # by label


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


def read_emnist(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
