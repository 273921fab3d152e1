"""`python -m fedlib prove COMMIT`: records get the new code's digest where the old code makes them too, else not."""

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import projects
import pytest
from commands import disk_full_after
from jobs import CPU, MakeSpec

from fedlib import __main__
from fedlib.engines.in_process import InProcess
from fedlib.errors import DataError, RunError
from fedlib.runs import digest, proof, record, rounds
from fedlib.runs.spec import Spec

Project = tuple[Path, Spec, str]
EQUAL = "fedlib/core/averaging.py", "BLOCK = 2**15", "BLOCK = 2 * 2**14"
CHANGED = "fedlib/engines/in_process.py", "sum(column) / sum(counts) for", "sum(column) / sum(counts) + 0.01 for"


def git(root: Path, *arguments: str) -> str:
    name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", "-C", root, *name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tiny: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A repository with the code and the record of one run; its commit."""
    spec = tiny()
    shutil.copytree(digest.PACKAGE, tmp_path / "fedlib", ignore=shutil.ignore_patterns("__pycache__"))
    projects.write(tmp_path)
    record.save(rounds.run(spec, InProcess(CPU), root=tmp_path), tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "old")
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "PACKAGE", tmp_path / "fedlib")
    # What is imported here is the old code; what counts is the project's.
    here = functools.partial(digest.code_digest, package=tmp_path / "fedlib")
    monkeypatch.setattr(digest, "_digest_here", here)
    return tmp_path, spec, git(tmp_path, "rev-parse", "HEAD")


def edit(root: Path, file: str, old: str, new: str) -> None:
    text = (root / file).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (root / file).write_text(text.replace(old, new), encoding="utf-8")


def kept(root: Path, spec: Spec) -> record.Record:
    found = record.load(spec, root)
    assert found
    return found


def logs(root: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (root / "records" / "proofs").glob("*.json")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The runs that either side is asked for."""
    ask, questions = proof._ask, list[dict[str, Any]]()

    def noted(process: proof.Replay, question: dict[str, Any]) -> None:
        questions.extend([] if "file" in question else [question])
        ask(process, question)

    monkeypatch.setattr(proof, "_ask", noted)
    return questions


@pytest.mark.slow
def test_equal_code_stamps_its_records_and_is_remembered(
    project: Project, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, spec, commit = project
    before = kept(root, spec)
    edit(root, *EQUAL)
    assert record.stale(before, spec) == proof.CODE
    assert __main__.main(["prove", commit[:10]]) == 0
    assert "1 records, 1 stale for their code alone" in capsys.readouterr().out
    after = kept(root, spec)
    assert record.stale(after, spec) == "" and after == before | {"code": after["code"]} != before
    assert asked == [spec.as_dict()] * 2  # cheap, so with all its rounds
    (log,) = logs(root)
    assert (log["old"], log["records"]) == (commit, 1)
    assert log["equal"] == [{"run": f"tiny/smoke/{spec.name}", "rounds": spec.rounds}]
    assert log["machine"] and log["time"] and log["versions"].keys() == {"python", "torch"}
    assert len(git(root, "worktree", "list").splitlines()) == 1

    record.save(before, root)  # as if it had been stopped before it could stamp
    assert __main__.main(["prove", commit]) == 0
    assert len(asked) == 2 and kept(root, spec) == after
    assert __main__.main(["prove", commit]) == 0  # nothing is left
    assert "nothing to stamp" in capsys.readouterr().out


@pytest.mark.slow
def test_a_changed_formula_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    root, spec, commit = project
    before = kept(root, spec)
    edit(root, *CHANGED)
    assert __main__.main(["prove", commit]) == 2
    error = capsys.readouterr().err
    assert f"{spec.name} differs in round 2: accuracy 0." in error and "no record was stamped" in error
    assert kept(root, spec) == before and not logs(root)
    assert not (root / ".cache" / "proofs").exists()
    assert len(git(root, "worktree", "list").splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("capsys")  # the output is kept in memory, where no disk is full
def test_a_full_disk_leaves_no_stamp_without_its_proof(project: Project) -> None:
    """Three files are written: what was equal so far, the proof, and, longer than both, the stamped record."""
    root, spec, commit = project
    edit(root, *EQUAL)
    before = projects.files(root)
    with proof._replaying(digest.PACKAGE.parent) as old, proof._replaying(root) as new:
        with disk_full_after(100), pytest.raises(DataError, match=r"\.jsonl: cannot be written \(File too large\)"):
            proof._proved(commit, old, new)
        assert projects.files(root) == before

        made = proof._proved(commit, old, new)
        assert made and record.stale(kept(root, spec), spec) == ""
        length = made.stat().st_size
        made.unlink()  # as if it had been stopped before it was written
        stamped, file = kept(root, spec), record.path(spec, root)
        file.write_bytes(before[str(file.relative_to(root))])
        with disk_full_after(100), pytest.raises(DataError, match=r"proofs/.*\.json: cannot be written"):
            proof._proved(commit, old, new)
        assert not made.exists() and record.stale(kept(root, spec), spec) == proof.CODE

        assert length + 100 < len(file.read_bytes())
        with disk_full_after(length + 100), pytest.raises(DataError, match=f"{file.name}: cannot be written"):
            proof._proved(commit, old, new)
        assert len(logs(root)) == 1 and record.stale(kept(root, spec), spec) == proof.CODE
        assert proof._proved(commit, old, new) and kept(root, spec) == stamped


def test_a_commit_whose_code_does_not_answer(project: Project) -> None:
    root, spec, _ = project
    before, main = kept(root, spec), root / "fedlib" / "__main__.py"
    text = main.read_text(encoding="utf-8")
    main.write_text("raise SystemExit(1)")
    git(root, "commit", "-q", "-a", "-m", "no command")
    main.write_text(text, encoding="utf-8")
    edit(root, *EQUAL)
    with pytest.raises(RunError, match="ended without an answer, for the reason above; no record was stamped"):
        proof.prove("HEAD")
    assert kept(root, spec) == before


def test_an_unknown_commit(project: Project) -> None:
    with pytest.raises(RunError, match="git rev-parse --verify"):
        proof.prove("nowhere")


# Which runs stand for the others


def entry(spec: Spec, seconds: float) -> record.Record:
    return {"spec": spec.as_dict(), "made": {"seconds": seconds}}


def test_the_fastest_run_of_a_kind_stands_for_it(tiny: MakeSpec) -> None:
    slow, fast, other = tiny(seed=1, rounds=10), tiny(lr=0.2, rounds=10), tiny(optimizer="adam", rounds=10)
    found = proof.trials([entry(slow, 40.0), entry(fast, 20.0), entry(other, 3.0)])
    assert [(trial.spec, trial.rounds, trial.seconds) for trial in found] == [(fast, 2, 4.0), (other, 10, 3.0)]
    assert found[0].shortened == fast.as_dict() | {"rounds": 2}


@pytest.mark.parametrize("alike", [{"lr": 0.2}, {"seed": 1}, {"rounds": 9}, {"hyper": {"magnitude": 0.3}}])
@pytest.mark.parametrize(
    "other",
    [
        *[{"method": "topk"}, {"model": "cnn2"}, {"optimizer": "adam"}, {"momentum": 0.5}, {"feedback": True}],
        *[{"held_out": 0.1}, {"sampling": "spaced"}, {"hyper": {"mask": "signed"}}, {"hyper": {"decay": 0.5}}],
        {"downlink": {"method": "feddq", "hyper": {"quantizer": "affine_nearest"}}},
    ],
    ids=str,
)
def test_kinds_are_told_apart_by_all_that_chooses_code(
    tiny: MakeSpec, alike: dict[str, Any], other: dict[str, Any]
) -> None:
    def kind(hyper: dict[str, Any] | None = None, **fields: Any) -> str:
        own = {} if "method" in fields else {"magnitude": 0.2} | (hyper or {})
        return proof.kind(tiny(**{"method": "fedmrn", "hyper": own} | fields))

    assert kind() == kind(**alike) != kind(**other)


def test_kinds_are_told_apart_by_what_the_writer_does(tiny: MakeSpec) -> None:
    options = ({"width": 5}, {"width": 6}, {"coding": "entropy"})
    base = {"schedule": "fixed", "quantizer": "affine_nearest"}
    kinds = [proof.kind(tiny(downlink={"method": "feddq", "hyper": base | more})) for more in options]
    assert kinds[0] == kinds[1] != kinds[2]
