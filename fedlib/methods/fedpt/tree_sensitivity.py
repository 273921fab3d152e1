"""The most that one client can weigh in a binary tree over rounds, the noise of DP-FTRL (Kairouz et al. 2021)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

NEVER = 2**40  # a round after all others
Nodes = dict[tuple[int, int], np.ndarray]


@functools.lru_cache(maxsize=64)
def kappa(rounds: int, participations: int = 1, separation: int = 1) -> int:
    """Squared sensitivity of the tree over C^2: the largest possible sum, over its complete nodes, of (a client's
    participations there)^2, if it takes part at most so often and at least `separation` rounds apart.

    Exact. It takes seconds where a client may take part in every tenth of 1600 rounds, and far longer at a smaller
    separation. For one participation it is floor(log2 rounds) + 1.
    """
    if separation == 1 and participations >= rounds:  # in every round
        return sum((rounds >> level) << 2 * level for level in range(rounds.bit_length()))
    # By participations n in a node and value v there: the first round, from the node's start, in which the client may
    # take part afterwards, at the place a if it might not before round a. `first` is for nodes that begin with round 0.
    node: Nodes = {(0, 0): np.arange(2), (1, 1): np.array([separation, NEVER])}
    first: Nodes = {key: value[:1] for key, value in node.items()}
    nodes, size = [node], 1
    while 2 * size <= rounds:
        first = _join(first, node, size, size, participations, 1)
        if 4 * size <= rounds:
            longer = {key: np.append(value, np.full(size, NEVER)) for key, value in node.items()}
            node = _join({**longer, (0, 0): np.arange(2 * size + 1)}, node, size, size, participations, 1)
        nodes.append(node)
        size *= 2
    done = size
    for level in reversed(range(len(nodes) - 1)):
        if rounds >> level & 1:
            first = _join(first, nodes[level], done, 2**level, participations, 0)
            done += 2**level
    return max(value for _, value in first)


def queue_weight(clients: int, cohort: int, rounds: int) -> int:
    """As `kappa`, for clients that take turns in a fixed order, `cohort` a round: the most that any place weighs."""
    most = 0
    for places in np.array_split(np.arange(clients), -(-clients * rounds // 10**7)):
        takes_part = (places[:, None] - cohort * np.arange(rounds)) % clients < cohort
        weight = np.zeros(len(places), dtype=np.int64)
        for level in range(rounds.bit_length()):
            nodes = takes_part[:, : rounds >> level << level].reshape(len(places), -1, 1 << level)
            weight += np.square(nodes.sum(axis=2)).sum(axis=1)
        most = max(most, int(weight.max()))
    return most


def _join(left: Nodes, right: Nodes, offset: int, size: int, most: int, closes: int) -> Nodes:
    """Both side by side; if it closes, as children of one node."""
    found: Nodes = {}
    for (n, v), free in left.items():
        options = [(n, v, free)]
        start = (free - offset).clip(0, size)
        options += [(n + m, v + w, then[start] + offset) for (m, w), then in right.items() if 0 < m <= most - n]
        for m, w, then in options:
            key = m, w + closes * m * m
            found[key] = np.minimum(found.get(key, NEVER), then)
    kept: Nodes = {}
    best: dict[int, Any] = {}
    for n, v in sorted(found, reverse=True):  # a higher value first; a lower one only where it leaves more room
        if np.any(found[n, v] < best.get(n, NEVER)):
            kept[n, v] = found[n, v]
            best[n] = np.minimum(best.get(n, NEVER), found[n, v])
    return kept
