"""GitHub's workflows: read by rules of our own, since nothing here runs them. They call the Makefile's targets."""

import copy
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from common import ROOT
from ruamel.yaml import YAML

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {
    file.name: YAML(typ="safe").load(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yml"))
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE))
ACTION = re.compile(r"actions/[a-z-]+@(v\d+|[0-9a-f]{40})")
WRITERS = {("book.yml", "publish"), ("release.yml", "release")}  # each needs what it may write, and calls little


def faults(name: str, workflow: dict[str, Any]) -> Iterator[str]:
    """What breaks a rule, as a line each."""
    if missing := {"name", "on", "permissions", "jobs"} - workflow.keys():
        yield f"without {missing}"
    if workflow.get("permissions") != {"contents": "read"}:
        yield "the workflow as a whole may do more than read"
    for job, description in workflow.get("jobs", {}).items():
        yield from (f"{job}: {fault}" for fault in job_faults(name, job, description, set(workflow["jobs"])))


def job_faults(name: str, job: str, description: dict[str, Any], jobs: set[str]) -> Iterator[str]:
    if missing := {"runs-on", "timeout-minutes", "steps"} - description.keys():
        yield f"without {missing}"
    writes = "write" in description.get("permissions", {}).values()
    if writes != ((name, job) in WRITERS):
        yield "its permission to write"
    if "needs" in description and description["needs"] not in jobs:
        yield f"needs {description['needs']}, which is no job"
    for step in description.get("steps", []):
        if ("run" in step) == ("uses" in step):
            yield f"a step does one thing: {step}"
        if "uses" in step and not ACTION.fullmatch(step["uses"]):
            yield f"{step['uses']} is not pinned to a major version or a commit of GitHub's own"
        keeps = step.get("with", {}).get("persist-credentials") is not False
        if step.get("uses", "").startswith("actions/checkout@") and keeps and not writes:
            yield "keeps credentials that it does not need"
        if "run" in step:
            called = re.findall(r"^\s*make ([a-z]+)", step["run"], re.MULTILINE)
            yield from (f"make {target} is no target" for target in called if target not in TARGETS)
            if not called and not step["run"].startswith("gh release create "):
                yield f"calls no target: {step['run']}"
            if "${{" in step["run"]:
                yield f"an expression in a script, where it could be a command: {step['run']}"


@pytest.mark.parametrize("name", ["book.yml", "release.yml", "tests.yml"])
def test_workflow_keeps_the_rules(name: str) -> None:
    assert list(faults(name, WORKFLOWS[name])) == []


def test_no_workflow_is_left_out() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {"book.yml", "release.yml", "tests.yml"}


def broken(*path: Any, value: Any) -> dict[str, Any]:
    """book.yml with one thing changed."""
    workflow: dict[str, Any] = copy.deepcopy(WORKFLOWS["book.yml"])
    *way, last = path
    place: Any = workflow
    for key in way:
        place = place[key]
    place[last] = value
    return workflow


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        (broken("permissions", value={"contents": "write"}), "more than read"),
        (broken("jobs", "build", "permissions", value={"contents": "write"}), "build: its permission to write"),
        (broken("jobs", "publish", "needs", value="built"), "publish: needs built"),
        (broken("jobs", "publish", "steps", 2, "run", value="make published"), "make published is no target"),
        (broken("jobs", "publish", "steps", 2, "run", value="git push"), "calls no target"),
        (broken("jobs", "publish", "steps", 2, "uses", value="actions/cache@v5"), "does one thing"),
        (broken("jobs", "build", "steps", 0, "uses", value="actions/checkout@main"), "not pinned"),
        (broken("jobs", "build", "steps", 0, "with", value={}), "credentials"),
        (broken("jobs", "build", "steps", 2, "run", value="make book ${{ github.head_ref }}"), "an expression"),
    ],
)
def test_rules_find_what_breaks_them(workflow: dict[str, Any], message: str) -> None:
    assert any(message in fault for fault in faults("book.yml", workflow))


def test_every_python_of_the_lock_is_tested() -> None:
    (first, last) = re.findall(r"for Python 3\.(\d+) to 3\.(\d+)", (ROOT / "requirements.lock").read_text())[0]
    tested = WORKFLOWS["tests.yml"]["jobs"]["linux"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{minor}" for minor in range(int(first), int(last) + 1)]
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert least == f">={tested[0]}"


def test_what_travels_between_jobs_lies_where_the_makefile_puts_it() -> None:
    (html,) = re.findall(r"^HTML := (\S+)$", MAKEFILE, re.MULTILINE)
    for name, folder in (("book.yml", html), ("release.yml", "dist")):
        steps = [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]
        moves = [step["with"]["path"] for step in steps if "-artifact@" in step.get("uses", "")]
        assert moves == [folder, folder]


def test_portable_names_what_is_there() -> None:
    (listed,) = re.findall(r"^PORTABLE := (.+)$", MAKEFILE, re.MULTILINE)
    folders = re.findall(r"\$\(addprefix tests/,([^)]*)\)", listed)[0].split()
    files = re.findall(r"tests/\S+\.py", listed)
    assert folders and files and all((ROOT / "tests" / folder).is_dir() for folder in folders)
    assert all((ROOT / file).is_file() for file in files)
