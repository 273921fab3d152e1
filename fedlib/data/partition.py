"""How the training samples are dealt out to the clients: seeded, hashed, and drawn on the page.

The first three follow the official code of FedMRN (`Leopold1423/fedmrn-mm24`, f0fb8a0). They use numpy's legacy
`RandomState`, whose stream is frozen for good, so that seed 1234 gives the client sizes of the authors' scripts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlib.errors import SpecError
from fedlib.rng import Rng

SMALLEST = 10  # samples that a client of a Dirichlet partition has


@dataclass(frozen=True)
class Partition:
    """`indices(k)` gives client k's sample indices (int64), in the order in which they were dealt."""

    clients: int
    indices: Callable[[int], np.ndarray]
    hash: str

    @classmethod
    def of(cls, shards: list[np.ndarray]) -> Partition:
        digest = hashlib.sha256()
        for shard in shards:
            digest.update(np.int64(len(shard)).tobytes() + shard.astype("<i8").tobytes())
        return cls(len(shards), shards.__getitem__, digest.hexdigest()[:16])


def iid(labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """A random permutation cut into shares whose sizes differ by at most one."""
    return np.array_split(np.random.RandomState(seed).permutation(len(labels)), clients)


def dirichlet(labels: np.ndarray, clients: int, seed: int, beta: float) -> list[np.ndarray]:
    """Class by class: shuffle, draw shares from a symmetric Dirichlet(beta) over the clients, cut.

    A smaller beta is more skewed. A client that already holds its fair share n/N gets no more. The whole draw is
    repeated until the smallest client has SMALLEST samples; after 1,000 tries SpecError (a partitioner must end).
    """
    random = np.random.RandomState(seed)
    n, classes = len(labels), np.unique(labels)
    for _ in range(1000):
        shards: list[list[np.ndarray]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, dtype=np.int64)
        for c in classes:
            members = np.flatnonzero(labels == c)
            random.shuffle(members)
            shares = random.dirichlet(np.repeat(beta, clients)) * (sizes < n / clients)
            total = shares.sum()
            if not total > 0:
                break
            cuts = (np.cumsum(shares / total) * len(members)).astype(np.int64)[:-1]
            for shard, part in zip(shards, np.split(members, cuts), strict=True):
                shard.append(part)
            sizes += np.diff(np.concatenate([[0], cuts, [len(members)]]))
        if sizes.sum() == n and sizes.min() >= SMALLEST:
            return [np.concatenate(shard) for shard in shards]
    raise SpecError(
        f"partition: no Dirichlet({beta}) draw gave each of {clients} clients {SMALLEST} samples in 1,000 tries; "
        "take a larger beta or fewer clients"
    )


def labels_per_client(labels: np.ndarray, clients: int, seed: int, count: int) -> list[np.ndarray]:
    """Every client gets the `count` least used labels (ties: the lower label); a class is cut into equal shards.

    The authors sort ties with an unstable sort, so that their label sets depend on numpy's version; ours is stable.
    """
    classes, inverse = np.unique(labels, return_inverse=True)
    if not 1 <= count <= len(classes):
        raise SpecError(f"partition.count: {count} is outside 1..{len(classes)}, the number of classes")
    used = np.zeros(len(classes), dtype=np.int64)
    held = np.zeros((clients, len(classes)), dtype=bool)
    for k in range(clients):
        chosen = np.argsort(used, kind="stable")[:count]
        held[k, chosen] = True
        used[chosen] += 1
    random = np.random.RandomState(seed)
    shards: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for c in range(len(classes)):
        members = np.flatnonzero(inverse == c)
        random.shuffle(members)
        holders = np.flatnonzero(held[:, c])
        if len(holders) == 0:
            raise SpecError(f"partition: {clients} clients with {count} labels each leave class {classes[c]} to nobody")
        for k, part in zip(holders.tolist(), np.array_split(members, len(holders)), strict=True):
            shards[k].append(part)
    return [np.concatenate(shard) for shard in shards]


def quota(labels: np.ndarray, clients: int, seed: int, beta: float) -> list[np.ndarray]:
    """Equal shards of n // clients samples; what is left over belongs to nobody.

    A client has shares of the classes from a symmetric Dirichlet(beta), draws a class by them and a sample of it that
    nobody has yet, and so on. A class that is used up is out. As `google-research/federated` (a5af8c4) deals CIFAR-10.
    """
    random = np.random.RandomState(seed)
    members = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    left = np.array([len(of) for of in members])
    shards = []
    for shares in np.nan_to_num(random.dirichlet(np.repeat(beta, len(members)), clients)):  # tiny numbers make 0 / 0
        shard = np.empty(len(labels) // clients, dtype=np.int64)
        for place, point in enumerate(random.random_sample(len(shard))):
            open_shares = shares * (left > 0)
            if not open_shares.any():  # of all that it wanted nothing is left
                open_shares = 1.0 * (left > 0)
            sums = open_shares.cumsum()
            c = int(np.searchsorted(sums, point * sums[-1], side="right"))
            left[c] -= 1
            shard[place] = members[c][left[c]]
        shards.append(shard)
    return shards


def natural(owners: np.ndarray | None, clients: int) -> list[np.ndarray]:
    """One client for each of the `clients` owners with the most samples (ties: the lower number), in their order."""
    if owners is None:
        raise SpecError("partition.kind: 'natural' needs data whose samples have owners; take iid, dirichlet or labels")
    counts = np.bincount(owners)
    if clients > np.count_nonzero(counts):
        raise SpecError(f"partition: {clients} clients, but the data has {np.count_nonzero(counts)} owners; take fewer")
    return [np.flatnonzero(owners == owner) for owner in np.sort(np.argsort(-counts, kind="stable")[:clients])]


KINDS: dict[str, Callable[..., list[np.ndarray]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "labels": labels_per_client,
    "quota": quota,
}


# Of each kind: the parameters, with type, smallest and largest value.
PARAMETERS: dict[str, dict[str, tuple[type, float, float]]] = {
    "iid": {},
    "natural": {},
    "given": {},
    "dirichlet": {"beta": (float, 1e-3, 1e6)},
    "quota": {"beta": (float, 1e-3, 1e6)},
    "labels": {"count": (int, 1, 10**6)},
    "resampled": {"size": (int, 1, 10**6)},
}


def require_samples(kind: str, clients: int, data: str, samples: int) -> None:
    """SpecError where a partition of so many training samples must leave a client without any; 0 samples: not known."""
    least = {"dirichlet": SMALLEST, "resampled": 0}.get(kind, 1)
    if samples and clients * least > samples:
        raise SpecError(
            f"clients: {clients} are too many for the {samples} training samples of {data}, of which partition {kind} "
            f"gives at least {least} to each; allowed: 1 to {samples // least}"
        )


def make(
    labels: np.ndarray,
    clients: int,
    kind: str,
    seed: int,
    owners: np.ndarray | None = None,
    shards: Sequence[np.ndarray] | None = None,
    **parameters: float,
) -> Partition:
    """Partition of the samples with these `labels` [n] by kind and its own parameters; `natural` takes the owners [n],
    `given` the shards as they are.

    `resampled` (parameter `size`) is for benchmarks with more clients than samples: each client draws `size` samples by
    itself when it is asked for, so memory does not grow with the clients. It is not a partition in the strict sense.
    SpecError where a client would have no sample.
    """
    if kind == "resampled":
        size = int(parameters["size"])
        root = Rng(seed).child("resampled")
        name = hashlib.sha256(repr((kind, clients, seed, size, len(labels))).encode()).hexdigest()[:16]
        return Partition(clients, lambda k: _resampled(root.child(k), len(labels), size), name)
    if kind == "natural":
        return Partition.of(natural(owners, clients))
    if kind == "given":
        if shards is None or len(shards) != clients:
            raise SpecError(f"partition.kind: 'given' needs data with {clients} shards; take iid, dirichlet or labels")
        return Partition.of(list(shards))
    if kind != "iid" and labels.ndim == 1 and labels.dtype.kind == "f":
        raise SpecError(f"partition.kind: {kind!r} needs labels, these are numbers; take iid, owners or index lists")
    if labels.ndim > 1 and kind != "iid":
        raise SpecError(f"partition.kind: {kind!r} needs one label a sample, these have {labels.shape[1]}; take iid")
    shards = KINDS[kind](labels, clients, seed, **parameters)
    if empty := sum(len(shard) == 0 for shard in shards):
        raise SpecError(
            f"clients: {clients} are too many for these {len(labels)} training samples, of which partition {kind} "
            f"gives none to {empty} clients; take fewer clients"
        )
    return Partition.of(shards)


def _resampled(rng: Rng, n: int, size: int) -> np.ndarray:
    return np.random.RandomState(rng.seed() % 2**32).randint(0, n, size)
