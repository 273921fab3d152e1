"""How many clients the samples of a data set are enough for."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import MakeSpec
from projects import HERE, RUN, Refused, edit, put

from fedlib.data import partition, sets, sources
from fedlib.errors import SpecError


@pytest.mark.parametrize(
    "deal, clients, most",
    [
        ({"kind": "iid"}, 1438, 1437),
        ({"kind": "quota", "beta": 1.0}, 2000, 1437),
        ({"kind": "labels", "count": 2}, 10**9, 1437),
        ({"kind": "dirichlet", "beta": 100.0}, 144, 143),  # at least 10 samples each
    ],
)
def test_more_clients_than_samples_are_told_at_once(
    digits: Path, refused: Refused, deal: dict[str, Any], clients: int, most: int
) -> None:
    edit(digits, put("partitions/iid", deal))
    edit(digits, put(f"{HERE}/clients", clients))
    said = refused(*RUN)
    assert f"profiles.smoke.main: clients: {clients} are too many for the 1437 training samples of digits" in said
    assert deal["kind"] in said and f"allowed: 1 to {most}" in said


def test_as_many_clients_as_there_are_samples_for(tiny: MakeSpec) -> None:
    assert tiny(clients=1437) and tiny(clients=143, partition={"kind": "dirichlet", "beta": 9.0, "seed": 0})
    assert tiny(clients=10**9, partition={"kind": "resampled", "size": 5, "seed": 0})


@pytest.mark.parametrize("name", sets.ENTRIES)
def test_the_table_knows_how_many_samples_there_are(name: str) -> None:
    if not sources.available(name):
        pytest.skip(f"{name} is not here")
    assert sets.ENTRIES[name].samples == len(sets.read(sets.ENTRIES[name], sources.verify(name)).train_y)


def test_the_bound_for_dirichlet_is_that_of_its_draw() -> None:
    assert inspect.signature(partition.dirichlet).parameters["smallest"].default == 10


def test_clients_that_the_deal_leaves_without_samples_are_told_before_the_first_round(
    digits: Path, refused: Refused
) -> None:
    """Each class has about 144 samples of digits, and some 700 of the clients to share them."""
    edit(digits, put("partitions/iid", {"kind": "labels", "count": 5}))
    edit(digits, put(f"{HERE}/clients", 1400))
    said = refused(*RUN)
    assert "clients: 1400 are too many for these 1437 training samples" in said
    assert "partition labels gives none to" in said and "take fewer clients" in said


def test_clients_of_data_whose_size_is_not_known_beforehand() -> None:
    """Such as a user's own."""
    with pytest.raises(SpecError, match="clients: 9 are too many for these 8 training samples, of which partition iid"):
        partition.make(np.arange(8), 9, "iid", seed=0)
