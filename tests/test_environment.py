"""What a fresh machine is given: the same versions in all files, a Makefile that lists itself, no machine's address."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from common import ROOT
from ruamel.yaml import YAML

from fedlib.engines.flower import extra

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)")


def pins(lines: list[str]) -> dict[str, str]:
    """Version by package name, from lines such as `torch==2.15.0 ; platform_machine != 'aarch64'`."""
    found = [match.groups() for line in lines if (match := PIN.match(line))]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def files() -> list[Path]:
    """Every text file that Git holds or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    paths = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    return [path for path in paths if b"\0" not in path.read_bytes()]


@pytest.fixture(scope="module")
def project() -> dict[str, list[str]]:
    """Requirements of pyproject.toml by group; the run path is the group `run`."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"run": table["dependencies"], **table["optional-dependencies"]}


@pytest.fixture(scope="module")
def lock() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def fleet_lock() -> list[str]:
    lines = (ROOT / "requirements-fleet.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_direct_dependency_is_pinned_and_locked_at_the_same_version(
    project: dict[str, list[str]], lock: list[str], fleet_lock: list[str]
) -> None:
    requirements = [requirement for group in project.values() for requirement in group]
    direct = pins(requirements)
    assert len(direct) == len(requirements), "a dependency without an exact version, or named twice"
    for locked, groups in (
        (pins(lock), project.keys() - {"fleet"}),
        (pins(fleet_lock), {"run", "fleet", "privacy", "test"}),
    ):
        own = pins([requirement for group in groups for requirement in project[group]])
        assert own == {name: locked.get(name) for name in own}


def test_a_lock_pins_each_package_once(lock: list[str], fleet_lock: list[str]) -> None:
    assert len(pins(lock)) == len(lock)
    assert len(pins(fleet_lock)) == len(fleet_lock)


def test_flower_is_in_its_own_lock_alone(lock: list[str], fleet_lock: list[str]) -> None:
    assert pins(fleet_lock)["flwr"] == extra.VERSION and "flwr" not in pins(lock)


def test_conda_installs_the_lock(lock: list[str]) -> None:
    recipe = YAML(typ="safe").load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in recipe if isinstance(entry, dict))
    assert "-r requirements.lock" in pip
    # What either section pins by itself agrees with the lock.
    conda = [entry.replace("=", "==", 1) for entry in recipe if isinstance(entry, str) and "==" not in entry]
    own = pins(conda + pip)
    assert own.pop("python") in {"3.11", "3.12", "3.13"}
    assert own == {name: pins(lock).get(name) for name in own}


def test_the_running_environment_is_the_lock(lock: list[str]) -> None:
    from importlib.metadata import PackageNotFoundError, version

    differing = {}
    for name, wanted in pins([line for line in lock if ";" not in line]).items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        if found != wanted:
            differing[name] = f"{found}, locked {wanted}"
    assert not differing


def test_make_help_lists_every_target_for_users() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^make ([\w-]+)", shown, re.MULTILINE))
    assert listed >= {"book", "test", "test-fleet", "check", "smoke", "lab", "bench", "serve", "clean", "help"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in listed)


@pytest.mark.parametrize("needs", [["make", "book"], ["make", "test"]])
def test_an_old_python_is_refused_before_anything_is_made(needs: list[str], tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    venv = tmp_path / "venv"
    run = subprocess.run([*needs, f"PYTHON={old}", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "older than Python 3.11" in run.stderr
    assert not venv.exists()


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    # In pieces: this file is read too.
    names = "|".join(("py" + "pi", "python" + "hosted", "npm" + "js", "deb" + "ian"))
    hosts = rf"\b(?:{names})\.(?:org|com|net)\b"
    wrong = re.compile(hosts + r"|(?<![\w.$}~)])/(?:home|root|Users)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if wrong.search(line)
    ]
    assert not found, "\n".join(found)
    assert (
        wrong.search("https://registry.npm" + "js.org/x")
        and wrong.search("cd /home" + "/me")
        and not wrong.search(sys.prefix and "book/start/home/x")
    )
