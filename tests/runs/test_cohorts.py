"""Who trains in a round, and on what: cohorts, samples held out, owners, sequences, samples enough for all clients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import present
from jobs import CPU, MakeSpec
from projects import HERE, objection, put

from fedlib.data import partition, sets, sources
from fedlib.data.objective import cross_entropy
from fedlib.data.text import NO_LABEL
from fedlib.errors import SpecError
from fedlib.rng import Rng
from fedlib.runs import build, rounds


def test_held_out_samples_are_a_shuffled_share(tiny: MakeSpec) -> None:
    task = build.task(tiny(held_out=0.25, partition={"kind": "labels", "count": 2, "seed": 1}), CPU)
    for client in range(3):
        trained, held = task.indices(client), task._split(client)[1]
        assert sorted([*trained, *held]) == sorted(task.partition.indices(client))
        assert len(held) == int(0.25 * (len(trained) + len(held)))
        assert len(torch.unique(task.held(client)[1])) == 2, "of both classes, although the data is dealt by class"
        assert (task._split(client)[1] == held).all()
    plain = build.task(tiny(), CPU)
    assert (plain.indices(0) == plain.partition.indices(0)).all() and not len(plain.held(0)[1])


def test_poisson_cohorts_have_the_law_that_they_claim(tiny: MakeSpec) -> None:
    spec = tiny(clients=100, cohort=20, sampling="poisson")
    task = build.task(spec, CPU)
    cohorts = [rounds.draw_cohort(spec, task, number) for number in range(400)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    # Binomial(100, 0.2): mean 20, deviation 4; of 400 draws the mean has deviation 0.2, the deviation about 0.14.
    assert abs(sizes.mean() - 20) < 1 and abs(sizes.std() - 4) < 0.7
    times = np.bincount(np.concatenate(cohorts), minlength=100)
    assert abs(times.mean() - 80) < 4 and times.min() > 40 and times.max() < 125  # Binomial(400, 0.2), deviation 8
    assert all(len(set(cohort)) == len(cohort) for cohort in cohorts)
    together = np.mean([0 in cohort and 1 in cohort for cohort in cohorts])
    assert abs(together - 0.04) < 0.04, "independent of each other"
    assert cohorts[:3] == [rounds.draw_cohort(spec, task, number) for number in range(3)]


def test_spaced_cohorts_take_turns(tiny: MakeSpec) -> None:
    """Every client once in each pass, and always as many rounds apart; 3 and 10 share no factor."""
    spec = tiny(clients=10, cohort=3, sampling="spaced")
    task = build.task(spec, CPU)
    cohorts = [rounds.draw_cohort(spec, task, number) for number in range(1, 41)]
    assert all(len(set(cohort)) == 3 for cohort in cohorts)
    for client in range(10):
        turns = [number for number, cohort in enumerate(cohorts) if client in cohort]
        assert len(turns) == 12 and set(np.diff(turns)) == {3, 4}, (
            "at least 10 // 3 rounds apart, at most 40 * 3 / 10 times"
        )
    assert cohorts[:10] == cohorts[10:20] and rounds.draw_cohort(spec, task, 2, attempt=1) == cohorts[1]
    other = tiny(clients=10, cohort=3, sampling="spaced", seed=spec.seed + 1)
    assert [rounds.draw_cohort(other, task, number) for number in range(1, 11)] != cohorts[:10]
    first = [int(Rng(seed).stream().permutation(4)[0]) for seed in range(400)]
    assert min(np.bincount(first, minlength=4)) > 65, "each client may be the first; 100 on average, deviation 8.7"


def test_one_client_an_owner() -> None:
    owners = np.array([3, 1, 1, 3, 7, 7, 7, 2])
    found = partition.make(np.zeros(8), 3, "natural", 0, owners=owners)
    assert [found.indices(k).tolist() for k in range(3)] == [[1, 2], [0, 3], [4, 5, 6]]
    with pytest.raises(SpecError, match="5 clients, but the data has 4 owners; take fewer"):
        partition.make(np.zeros(8), 5, "natural", 0, owners=owners)
    with pytest.raises(SpecError, match="'natural' needs data whose samples have owners"):
        partition.make(np.zeros(8), 2, "natural", 0)
    with pytest.raises(SpecError, match="'dirichlet' needs one label a sample, these have 4"):
        partition.make(np.zeros((8, 4)), 2, "dirichlet", 0, beta=1.0)


def test_the_loss_of_sequences_leaves_padding_out() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1, 4, NO_LABEL], [0, NO_LABEL, NO_LABEL]])
    logs = logits.double().log_softmax(2)
    by_hand = -(logs[0, 0, 1] + logs[0, 1, 4] + logs[1, 0, 0])
    assert float(cross_entropy(logits, y, "sum")) == pytest.approx(float(by_hand))
    assert float(cross_entropy(logits, y, "mean")) == pytest.approx(float(by_hand) / 3)


# How many clients the samples of a data set are enough for


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
    tmp_path: Path, deal: dict[str, Any], clients: int, most: int
) -> None:
    said = objection(tmp_path, put("partitions/iid", deal), put(f"{HERE}/clients", clients))
    assert f"profiles.smoke.main: clients: {clients} are too many for the 1437 training samples of digits" in said
    assert deal["kind"] in said and f"allowed: 1 to {most}" in said


def test_as_many_clients_as_there_are_samples_for(tiny: MakeSpec) -> None:
    assert tiny(clients=1437) and tiny(clients=143, partition={"kind": "dirichlet", "beta": 9.0, "seed": 0})
    assert tiny(clients=10**9, partition={"kind": "resampled", "size": 5, "seed": 0})


@pytest.mark.parametrize("name", sets.ENTRIES)
def test_the_table_knows_how_many_samples_there_are(name: str) -> None:
    if not present(name):
        pytest.skip(f"{name} is not here")
    assert sets.ENTRIES[name].samples == len(sets.read(sets.ENTRIES[name], sources.verify(name)).train_y)


def test_clients_that_the_deal_leaves_without_samples_are_told_before_the_first_round(tmp_path: Path) -> None:
    """Each class has about 144 samples of digits, and some 700 of the clients to share them."""
    many = put("partitions/iid", {"kind": "labels", "count": 5}), put(f"{HERE}/clients", 1400)
    said = objection(tmp_path, *many)
    assert "clients: 1400 are too many for these 1437 training samples" in said
    assert "partition labels gives none to" in said and "take fewer clients" in said


def test_clients_of_data_whose_size_is_not_known_beforehand() -> None:
    """Such as a user's own."""
    with pytest.raises(SpecError, match="clients: 9 are too many for these 8 training samples, of which partition iid"):
        partition.make(np.arange(8), 9, "iid", seed=0)
