"""Data of a caller's own, checked where it is read: arrays, tensors, or a data set of torch that fits into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.data.objective import Measure, Objective
from fedlib.data.sets import Dataset, Entry
from fedlib.data.text import NO_LABEL
from fedlib.errors import DataError

NO_METRICS: Mapping[str, Measure] = {}


def dataset(
    train: Any,
    test: Any,
    loss: Measure | None = None,
    metrics: Mapping[str, Measure] = NO_METRICS,
    owners: Any = None,
    shards: Sequence[Any] | None = None,
) -> Dataset:
    """A data set from pairs (x, y), or from data sets of torch that give such pairs one by one.

    x: float or integer [n, ...]; floats become float32, integers int64. y: integer labels from 0, [n] or, of sequences,
    [n, length] with NO_LABEL where there is padding; or, beside a loss, floats, which are no labels. owners: whose
    each training sample is [n]. shards: places in `train` of each client's samples.
    DataError names array, index and value.
    """
    (train_x, train_y), (test_x, test_y) = (
        _pair(given, name, labels=loss is None) for given, name in ((train, "train"), (test, "test"))
    )
    objective = Objective(loss, metrics, classes=not train_y.is_floating_point())
    for what, one, other in (("x", train_x, test_x), ("y", train_y, test_y)):
        if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
            raise DataError(
                f"test {what}: {list(other.shape[1:])} of {_name(other)} a sample, where train has "
                f"{list(one.shape[1:])} of {_name(one)}; give both the same"
            )
    count = int(max(train_y.max(), test_y.max())) + 1 if objective.classes else 0
    return Dataset(
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        classes=tuple(map(str, range(count))),
        owners=None if owners is None else _owners(owners, len(train_y)),
        shards=None if shards is None else _shards(shards, len(train_y)),
        objective=objective,
    )


def entry(held: Dataset, code: str) -> Entry:
    """What stands in the table of data sets: the name is a digest of what is in it, and of its objective's code."""
    digest = hashlib.sha256(code.encode())
    for tensor in (held.train_x, held.train_y, held.test_x, held.test_y):
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    for places in (held.owners, *(held.shards or ())):
        digest.update(b"" if places is None else np.int64(len(places)).tobytes() + places.astype("<i8").tobytes())
    name = f"own-{digest.hexdigest()[:16]}"
    return Entry(name, _unread, held.classes, samples=len(held.train_y), held=held, code=code)


def _unread(folder: Any) -> Any:
    raise DataError("data of one's own has no files")


def _pair(given: Any, name: str, labels: bool) -> tuple[Tensor, Tensor]:
    if isinstance(given, torch.utils.data.Dataset):
        given = _stacked(given, name)
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise DataError(f"{name}: {type(given).__name__} given; expected a pair (x, y), or a torch Dataset")
    x, y = (_tensor(part, f"{name} {what}") for part, what in zip(given, "xy", strict=True))
    if x.ndim < 2:
        raise DataError(f"{name} x: shape {list(x.shape)}; expected samples of at least one number each, [n, ...]")
    if len(x) != len(y):
        raise DataError(f"{name}: {len(x)} samples in x and {len(y)} in y; give as many of both")
    if not len(x):
        raise DataError(f"{name}: no sample; at least one is needed")
    return x, _labels(y, x, f"{name} y") if labels or not y.is_floating_point() else y


def _stacked(given: Any, name: str) -> tuple[Any, Any]:
    try:
        rows = [given[index] for index in range(len(given))]
        xs, ys = zip(*((row[0], row[1]) for row in rows), strict=True)
        return torch.stack([torch.as_tensor(np.asarray(x)) for x in xs]), np.asarray([np.asarray(y) for y in ys])
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(
            f"{name}: this data set gives no pairs (x, y) of equal shapes ({type(error).__name__}: {error}); "
            "give it a transform that does, or arrays"
        ) from error


def _tensor(part: Any, name: str) -> Tensor:
    """Checked to be finite numbers."""
    try:
        tensor = part.detach().cpu() if isinstance(part, Tensor) else torch.as_tensor(np.asarray(part))
    except (TypeError, ValueError) as error:
        kind = np.asarray(part, dtype=object).ravel()[:1]
        raise DataError(f"{name}: no numbers ({type(error).__name__}); it begins with {kind.tolist()!r:.40}") from error
    if tensor.is_complex():
        raise DataError(f"{name}: complex numbers; give real ones")
    if not tensor.is_floating_point():
        return tensor.long()
    tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        place = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
        raise DataError(f"{name}: {float(tensor[place])} at {list(place)}; replace what is not finite")
    return tensor.contiguous()


def _labels(y: Tensor, x: Tensor, name: str) -> Tensor:
    if y.is_floating_point():
        bad = (y != y.round()).nonzero()
        where = f"{float(y[tuple(bad[0])]):g} at {bad[0].tolist()}" if len(bad) else "floats"
        raise DataError(f"{name}: {where}, no integer labels; cast them, or give a loss for numbers")
    if y.ndim > 2 or (y.ndim == 2 and (x.ndim < 2 or y.shape[1] < 2)):
        raise DataError(f"{name}: shape {list(y.shape)}; expected one label a sample [n], or one a token [n, length]")
    wrong = (y < 0) & ((y != NO_LABEL) if y.ndim == 2 else True)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        hint = f"; {NO_LABEL}, for padding, is for sequences" if int(y[tuple(place)]) == NO_LABEL else ""
        raise DataError(f"{name}: {int(y[tuple(place)])} at {place}; labels count from 0{hint}")
    return y


def _owners(owners: Any, samples: int) -> np.ndarray:
    found = np.asarray(owners)
    if found.ndim != 1 or len(found) != samples:
        raise DataError(f"owners: shape {list(found.shape)}; expected one for each of {samples} training samples")
    return np.unique(found, return_inverse=True)[1].astype(np.int64)  # whatever they are called


def _shards(shards: Sequence[Any], samples: int) -> tuple[np.ndarray, ...]:
    found = []
    for client, given in enumerate(shards):
        places = np.asarray(given)
        if places.ndim != 1 or not len(places) or places.dtype.kind not in "iu":
            raise DataError(f"partition[{client}]: expected at least one place of a sample, integers [n]")
        if places.min() < 0 or places.max() >= samples:
            bad = int(places[(places < 0) | (places >= samples)][0])
            raise DataError(f"partition[{client}]: {bad}; train has places 0 to {samples - 1}")
        found.append(places.astype(np.int64))
    if not found:
        raise DataError("partition: no client; give an index list for each")
    return tuple(found)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
