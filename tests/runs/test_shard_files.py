"""Nodes that hold their own clients' samples and no others: their uploads are those of a machine with all data."""

from collections.abc import Callable
from pathlib import Path

import known_answers
import projects
import pytest
import torch

from fedlib.__main__ import main
from fedlib.core.client import Reply
from fedlib.data import sets
from fedlib.engines.in_process import InProcess
from fedlib.errors import DataError, RunError
from fedlib.runs import build, rounds, shard_files
from fedlib.runs.shard_files import Shards
from fedlib.runs.spec import Spec

CPU = torch.device("cpu")
OWN = frozenset({1, 4, 8})


@pytest.mark.parametrize("name", known_answers.CASES)
def test_uploads_are_those_of_a_machine_with_all_data(name: str, tmp_path: Path, one_thread: None) -> None:
    spec = Spec.from_dict(known_answers.TINY | known_answers.CASES[name])
    shard_files.save(spec, OWN, tmp_path)
    whole, part = build.job(spec, CPU), Shards(tmp_path, OWN).job_of(spec.key(), CPU)
    message = rounds.broadcast(whole.method, rounds.initial(whole), 1)
    memory = b"" if spec.feedback or spec.persistent else None
    for client in OWN:
        expected, found = (InProcess(CPU).client(job, message, 1, client, memory) for job in (whole, part))
        assert isinstance(found, bytes | Reply) and found == expected
    assert part.method.fingerprint() == whole.method.fingerprint()


def test_all_runs_with_the_same_data_and_partition_share_files(tiny: Callable[..., Spec], tmp_path: Path) -> None:
    one, same, other = tiny(), tiny(method="fedmrn", lr=0.5), tiny(partition={"kind": "iid", "seed": 2})
    assert shard_files.name_of(one) == shard_files.name_of(same) != shard_files.name_of(other)
    shard_files.save(one, {1, 2}, tmp_path)
    shard_files.save(one, {4, 8}, tmp_path)
    assert Shards(tmp_path, OWN).describe(same) == sets.digest("digits")
    with pytest.raises(DataError, match=r"no samples of clients \[1, 4, 8\] for digits"):
        Shards(tmp_path, OWN).describe(other)


def test_a_file_holds_no_other_client_s_samples(tiny: Callable[..., Spec], tmp_path: Path) -> None:
    spec = tiny()
    file = shard_files.save(spec, OWN, tmp_path)
    whole = build.task(spec, CPU)
    own = sum(len(whole.indices(client)) for client in OWN)
    assert file.stat().st_size < own * (64 * 4 + 8 + 8) + 2000  # 64 pixels, a label and a place each
    part = Shards(tmp_path, OWN).task(spec, CPU)
    assert len(part.train[0]) == len(whole.train[0]) and not len(part.test[0])
    for index in (torch.from_numpy(whole.indices(0)), slice(3), 0):
        with pytest.raises(RunError, match="samples of other clients"):
            part.train[0][index]
    with pytest.raises(KeyError):
        part.shard(0)


def test_a_file_that_was_cut_short_is_named(tiny: Callable[..., Spec], tmp_path: Path) -> None:
    file = shard_files.save(tiny(), OWN, tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"1-8\.safetensors cannot be read"):
        Shards(tmp_path, OWN).describe(tiny())


def test_clients_that_a_run_does_not_have_are_named(tiny: Callable[..., Spec], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"clients: \[10\] are not among the 10 of main_fedavg"):
        shard_files.save(tiny(), {9, 10}, tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    projects.small(tmp_path)
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    words = ["shards", "fedmrn", "--profile", "smoke", "--clients", "1-3", "--folder", str(tmp_path / "node")]
    assert main(words) == 0
    (file,) = (tmp_path / "node").rglob("*.safetensors")  # both runs have one partition
    assert capsys.readouterr().out == f"{file}\n" and file.name == "1-3.safetensors"
