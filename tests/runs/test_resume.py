"""A run killed at any moment goes on from its last checkpoint to the very same record."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from common import ROOT
from jobs import MakeSpec, ran

from fedlib.runs import record
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.spec import Spec

KILLED = 9  # wait status of a process that SIGKILL ended

# A process that has imported everything, and forks once a job. It never computes itself: threads do not survive a fork.
SERVER = """
import json, os, signal, sys, time
from pathlib import Path
import sklearn.datasets, torch, torch._dynamo
torch.set_num_threads(1)
from fedlib.engines import select
from fedlib.runs import rounds
from fedlib.runs.spec import Spec

def kill_at(name, number, before):
    "SIGKILL to ourselves just before or just after the numbered call of os.<name>"
    real, calls = getattr(os, name), 0
    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, name, counted)

def child(job):
    os.setsid()
    rounds.run.__kwdefaults__["save_every"] = 0.0
    if job["moment"]:
        kill_at(*job["moment"])
    with select.open_engine(job["engine"], "cpu", 2) as engine:
        rounds.load_or_run(Spec.from_dict(job["spec"]), engine, root=Path(job["root"]))

def serve():
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.monotonic()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                child(job)
                code = 0
            finally:
                os._exit(code)
        if job["delay"] is not None:
            while job["await"] and not Path(job["await"]).exists():
                time.sleep(0.005)
            time.sleep(job["delay"])
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"pid": pid, "status": status, "seconds": time.monotonic() - begin}), flush=True)

if __name__ == "__main__":
    serve()
"""
Job = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Run `load_or_run`, checkpoints after every round, in a process that may be killed: its status and seconds."""
    script = tmp_path_factory.mktemp("server") / "server.py"
    script.write_text(SERVER)
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script)],
        env=os.environ | one_thread,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin and server.stdout

    def ask(
        spec: Spec,
        root: Path,
        engine: str = "process",
        delay: float | None = None,
        after: Path | None = None,
        moment: tuple[str, int, bool] | None = None,
    ) -> dict[str, Any]:
        assert server.stdin and server.stdout
        asked = {"spec": spec.as_dict(), "root": str(root), "engine": engine, "delay": delay, "moment": moment}
        server.stdin.write(json.dumps(asked | {"await": str(after) if after else None}) + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    yield ask
    server.stdin.close()
    server.wait(10)
    server.stdout.close()


def recorded(spec: Spec, root: Path) -> str:
    """The repeatable part of the record on disk."""
    found = record.load(spec, root)
    assert found
    return json.dumps(record.stable(found))


def undisturbed(spec: Spec, root: Path) -> str:
    return json.dumps(ran(spec, root))


def whole(spec: Spec, root: Path) -> tuple[int, bool]:
    """Rounds in the checkpoint (0: none) and whether there is a record; fails where one can be seen half-written."""
    checkpoint = Checkpoint(spec, root)
    loaded = checkpoint.load(spec.chosen)
    assert (loaded is not None) == checkpoint.file.exists()
    found = record.load(spec, root)
    if found:
        assert len(found["rounds"]) == spec.rounds
    return (len(loaded[2]["rounds"]) if loaded else 0), found is not None


@pytest.fixture
def spec(tiny: MakeSpec) -> Spec:
    """Twelve rounds, some of them not evaluated; server and clients keep something between rounds."""
    hyper = {"magnitude": 0.1, "decay": 0.9}
    return tiny(method="fedmrn", hyper=hyper, feedback=True, rounds=12, evaluate_every=5, cohort=5, epochs=2)


# Kills


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_kills_at_random_times_change_nothing(spec: Spec, job: Job, tmp_path: Path) -> None:
    expected = undisturbed(spec, tmp_path / "reference")
    job(spec, tmp_path / "warm up")
    duration = job(spec, tmp_path / "measured")["seconds"]
    assert recorded(spec, tmp_path / "measured") == expected
    random_ = random.Random(20)
    on_the_way = 0
    for trial in range(20):
        root = tmp_path / str(trial)
        delay = (trial + random_.random()) / 20 * duration
        status = job(spec, root, delay=delay)["status"]
        assert status in (0, KILLED)
        done, finished = whole(spec, root)
        on_the_way += status == KILLED and not finished and done > 0
        assert job(spec, root)["status"] == 0
        assert recorded(spec, root) == expected, f"killed after {delay:.3f} s, in round {done + 1}"
        assert not Checkpoint(spec, root).file.exists()
    assert on_the_way, "no kill fell between the first checkpoint and the end"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_kills_inside_a_write_change_nothing(spec: Spec, job: Job, tmp_path: Path, call: str, before: bool) -> None:
    expected = undisturbed(spec, tmp_path / "reference")
    # One write a round but for the last, then the record: the twelfth write is the record's.
    for number in (1, 7, 12):
        root = tmp_path / str(number)
        assert job(spec, root, moment=(call, number, before))["status"] == KILLED
        visible = number - 1 if before or call == "fsync" else number
        assert whole(spec, root) == (min(visible, 11), visible == 12)
        left = [path for path in root.rglob("*") if path.is_file() and path.name.startswith(".")]
        assert len(left) == (visible < number)  # the kill did leave a temporary file
        assert job(spec, root)["status"] == 0
        assert recorded(spec, root) == expected
        assert len(list((root / "records").rglob("*.json"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_run_killed_in_every_round_changes_nothing(spec: Spec, job: Job, tmp_path: Path) -> None:
    expected = undisturbed(spec, tmp_path / "reference")
    for done in range(1, spec.rounds):
        assert job(spec, tmp_path, moment=("replace", 1, False))["status"] == KILLED
        assert whole(spec, tmp_path) == (done, False)
    assert job(spec, tmp_path)["status"] == 0
    assert recorded(spec, tmp_path) == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_five_kills_of_a_pool_change_nothing(tiny: MakeSpec, job: Job, tmp_path: Path) -> None:
    spec = tiny(method="fedmrn", rounds=40, evaluate_every=5, cohort=5, epochs=2)
    expected = undisturbed(spec, tmp_path / "reference")
    random_ = random.Random(5)
    on_the_way = 0
    for trial in range(5):
        root = tmp_path / str(trial)
        # Workers start for seconds; counted is from the first checkpoint on.
        delay = random_.random() * 0.5
        job(spec, root, engine="pool", delay=delay, after=Checkpoint(spec, root).file)
        on_the_way += not whole(spec, root)[1]
        assert job(spec, root, engine="process" if trial else "pool")["status"] == 0
        assert recorded(spec, root) == expected
    assert on_the_way, "no kill fell before the end"
