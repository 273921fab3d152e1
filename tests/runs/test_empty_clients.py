"""Clients and samples: how many clients a data set is enough for, and what becomes of those without samples."""

from pathlib import Path
from typing import Any

import pytest
from common import present
from jobs import CPU, MakeSpec, job_of, message_of
from projects import HERE, RUN, Refused, edit, put

from fedlib.data import sets, sources
from fedlib.engines.in_process import InProcess
from fedlib.errors import RunError
from fedlib.runs import rounds

# Each class has about 144 samples of digits, and some 700 clients to share them.
MOSTLY_EMPTY: dict[str, Any] = {"clients": 1400, "partition": {"kind": "labels", "count": 5, "seed": 1}}


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
    if not present(name):
        pytest.skip(f"{name} is not here")
    assert sets.ENTRIES[name].samples == len(sets.read(sets.ENTRIES[name], sources.verify(name)).train_y)


@pytest.mark.parametrize("method", ["fedavg", "fedmrn"])
def test_clients_without_samples_are_skipped(tiny: MakeSpec, tmp_path: Path, method: str) -> None:
    spec = tiny(method=method, cohort=20, rounds=2, **MOSTLY_EMPTY)
    job = job_of(spec)
    for entry in rounds.run(spec, InProcess(CPU), root=tmp_path)["rounds"]:
        cohort = entry["clients"]
        assert 0 < len(cohort) < 20 and all(len(job.task.partition.indices(client)) for client in cohort)
        assert cohort == rounds.draw_cohort(spec, job.task, entry["round"]) and entry["refused"] == []
        assert entry["downlink_bytes"] == len(cohort) * len(message_of(job)), "in full precision: always of one size"


def test_cohorts_of_clients_without_samples_only_end_the_run(tiny: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no usable update"):
        rounds.run(tiny(cohort=1, rounds=50, **MOSTLY_EMPTY), InProcess(CPU), root=tmp_path)
