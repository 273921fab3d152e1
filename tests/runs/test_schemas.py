"""The JSON schemas by which editors check experiments and claims, and the hooks that check before a commit."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from common import ROOT
from projects import put
from ruamel.yaml import YAML

from fedlib.claims.measures import MEASURES
from fedlib.claims.published import Published
from fedlib.data import partition, sets
from fedlib.methods import registry
from fedlib.models.registry import MODELS
from fedlib.runs.experiments import Experiment
from fedlib.runs.validation import Table, schema

MODELS_OF: dict[str, type[Table]] = {"experiments": Experiment, "published": Published}
FILES = sorted(path for folder in MODELS_OF for path in (ROOT / folder).glob("*.yaml"))


def kept(folder: str) -> Any:
    return json.loads((ROOT / folder / "schema.json").read_text())


def content(path: Path) -> Any:
    return YAML(typ="safe").load(path)


@pytest.mark.parametrize("folder", MODELS_OF)
def test_the_schema_is_up_to_date(folder: str) -> None:
    assert kept(folder) == schema(MODELS_OF[folder]), "python -m fedlib schema"


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.name}" for path in FILES])
def test_every_file_names_its_schema_and_fits_it(path: Path) -> None:
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    jsonschema.Draft202012Validator(kept(path.parent.name)).validate(content(path))


def test_the_schemas_have_the_names_of_the_tables() -> None:
    types = kept("experiments")["$defs"]
    for field, table in (("method", registry.METHODS), ("data", sets.ENTRIES), ("model", MODELS)):
        assert types["Values"]["properties"][field]["enum"] == sorted(table)
    assert set(partition.PARAMETERS) <= set(types)
    assert kept("published")["$defs"]["Claim"]["properties"]["measure"]["enum"] == sorted(MEASURES)


WRONG: list[tuple[str, str, Any]] = [
    ("experiments", "settings/data/lab", "mnist"),
    ("experiments", "settings/lr/lab", "0.1"),
    ("experiments", "settings/colour", {}),
    ("experiments", "methods/a b", {"method": "fedavg", "hyper": {}}),
    ("experiments", "methods/feddq/method", "feddqq"),
    ("experiments", "partitions/iid/beta", 0.3),
    ("experiments", "profiles/huge", {}),
    ("experiments", "profiles/lab/main/seeds", 0),
    ("experiments", "profiles/lab/main/grid", {"seed": [1]}),
    ("experiments", "profiles/lab/main/grid", {"lr": [0]}),
    ("published", "claims/0/measure", "bits"),
    ("published", "claims/0/margin", "x"),
    ("published", "claims/0/arguments", {"labels": "feddq", "groups": ["main"]}),
    ("published", "claims/0/tolerance", 1),
]


@pytest.mark.parametrize("folder, where, value", WRONG, ids=[f"{w}={v}" for _, w, v in WRONG])
def test_the_schema_refuses_what_the_command_line_refuses(folder: str, where: str, value: Any) -> None:
    found = content(ROOT / folder / "feddq.yaml")
    put(where, value)(found)
    with pytest.raises(ValueError):  # pydantic's
        MODELS_OF[folder].model_validate(found)
    assert not jsonschema.Draft202012Validator(kept(folder)).is_valid(found)


def test_the_hooks_are_what_make_check_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name, value in re.findall(r"^(\w+) := (python .*)$", makefile, re.MULTILINE):
        makefile = makefile.replace(f"$({name})", value)
    recipes = (re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE) for target in ("lint", "check"))
    commands = [line.strip() for found in recipes if found for line in found[1].splitlines()]
    (repository,) = content(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    for hook in repository["hooks"]:
        assert (hook["language"], hook["pass_filenames"], hook["always_run"]) == ("system", False, True)
