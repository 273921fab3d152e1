"""The package as one installs it: from a wheel, away from any checkout, with what it depends on and no more."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import fedlib, numpy as np, torch

if __name__ == "__main__":
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    y = (x[:, 0] > 0).astype(int)
    run = fedlib.federate(
        torch.nn.Linear(4, 2), (x, y), (x, y), method="fedmrn", clients=3, rounds=2, engine="pool", folder="kept"
    )
    assert run.uploads == 6 and len(run.table) == 2
    codec = fedlib.Codec(run.model, "eden")
    codec.decode(codec.encode(run.model.state_dict()))
    try:
        run.plot()
    except fedlib.errors.DataError as error:
        print(error)
    print(fedlib.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    copytree(ROOT / "fedlib", tree / "fedlib", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", str(folder), str(tree)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return folder / "site"


def test_a_script_far_from_any_checkout_runs_on_the_wheel(installed: Path, tmp_path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    absent = {line.split("==")[0].replace("-", "_") for lines in extras.values() for line in lines}
    (tmp_path / "script.py").write_text(SCRIPT.format(absent=absent))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said, where = done.stdout.splitlines()[-2:]
    assert said == "plot: matplotlib is not installed; pip install matplotlib, or use the table"
    assert where == str(installed / "fedlib" / "__init__.py")
    assert {file.name for file in tmp_path.iterdir()} == {"script.py", "kept"}  # nothing beside what it asked for
