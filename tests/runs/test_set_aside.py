"""Training images that a search is judged by: no client has them, and the test images have no part in it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlib.data import sources
from fedlib.errors import SpecError
from fedlib.runs import build
from fedlib.runs.spec import Spec

Tiny = Callable[..., Spec]
CPU = torch.device("cpu")


def rows(x: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in x.contiguous()}


def test_a_share_is_taken_from_all_clients_and_evaluated_in_place_of_the_test_set(tiny: Tiny) -> None:
    whole = sources.load("digits")
    task = build.task(tiny(data="digits", clients=10, cohort=2, validation=0.2), CPU)
    held, trained = task.test[0], torch.cat([task.shard(client)[0] for client in range(10)])
    count = len(whole.train_y)
    assert (len(held), len(trained)) == (int(0.2 * count), count - int(0.2 * count))
    assert rows(held) | rows(trained) == rows(whole.train_x)
    assert len(rows(held) & rows(trained)) < 5, "but for images that stand twice in the data"


def test_the_share_does_not_depend_on_seed_or_partition(tiny: Tiny) -> None:
    """Searches of different methods, and with different seeds, are judged by the same images."""
    first, second = (
        build.task(tiny(data="digits", clients=10, cohort=2, validation=0.1, seed=seed), CPU).test[0] for seed in (0, 7)
    )
    assert torch.equal(first, second)


def test_without_a_share_nothing_changes() -> None:
    dataset = sources.load("digits")
    assert build.set_aside(dataset, 0.0) is dataset


def test_owners_go_with_their_samples() -> None:
    dataset = sources.load("digits")
    owned = replace(dataset, owners=np.arange(len(dataset.train_y)))
    left = build.set_aside(owned, 0.25)
    assert left.owners is not None
    assert torch.equal(left.train_y, dataset.train_y[torch.from_numpy(left.owners)])


@pytest.mark.parametrize("share", [-0.1, 0.95, "0.1"])
def test_a_share_that_leaves_nothing_is_refused(tiny: Tiny, share: object) -> None:
    with pytest.raises(SpecError, match="validation"):
        tiny(validation=share)
