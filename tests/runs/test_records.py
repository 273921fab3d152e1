"""Records: what makes one stale, what it holds, and that its bytes are those that were really passed."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT
from jobs import CPU, MakeSpec, job_of, ran
from typing_extensions import override

from fedlib.core.client import Job, Memories
from fedlib.data import sets
from fedlib.engines.in_process import InProcess
from fedlib.methods import registry
from fedlib.runs import integrity, record, rounds
from fedlib.runs.digest import code_digest
from fedlib.runs.spec import Spec

Kept = tuple[Spec, record.Record]


def run(spec: Spec, root: Path, engine: InProcess | None = None) -> record.Record:
    return rounds.run(spec, engine or InProcess(CPU), root=root)


# Freshness


@pytest.fixture
def kept(tiny: MakeSpec, tmp_path: Path) -> Kept:
    """A spec and its saved record, read back."""
    spec = tiny()
    rounds.load_or_run(spec, InProcess(CPU), root=tmp_path)
    found = record.load(spec, tmp_path)
    assert found and record.stale(found, spec) == ""
    return spec, found


@pytest.mark.parametrize(
    "field, value",
    [
        *[("seed", 1), ("lr", 0.2), ("rounds", 4), ("epochs", 2), ("batch", 16), ("clients", 11), ("cohort", 3)],
        *[("evaluate_every", 1), ("method", "fedmrn"), ("model", "cnn2"), ("data", "fashion-mnist")],
        *[("partition", {"kind": "iid", "seed": 2}), ("label", "other"), ("optimizer", "adam")],
    ],
)
def test_another_spec_makes_a_record_stale(tiny: MakeSpec, kept: Kept, field: str, value: Any) -> None:
    assert re.search(rf"spec differs in {field}\b", record.stale(kept[1], tiny(**{field: value})))


def test_other_hyper_parameters_make_a_record_stale(tiny: MakeSpec, tmp_path: Path) -> None:
    found = run(tiny(method="fedmrn", hyper={"magnitude": 0.01}), tmp_path)
    assert record.stale(found, tiny(method="fedmrn", hyper={"magnitude": 0.01})) == ""
    assert "hyper" in record.stale(found, tiny(method="fedmrn", hyper={"magnitude": 0.02}))


@pytest.mark.parametrize(
    "key, words", [("data", "data set differs"), ("code", "code has changed"), ("format", "format")]
)
def test_other_data_code_or_format_makes_a_record_stale(kept: Kept, key: str, words: str) -> None:
    spec, found = kept
    assert words in record.stale(found | {key: "other"}, spec)
    assert words in record.stale({k: v for k, v in found.items() if k != key}, spec)


def test_a_field_that_a_record_is_too_old_to_have_stands_for_its_default(tiny: MakeSpec, kept: Kept) -> None:
    spec, found = kept
    old = found | {"spec": {k: v for k, v in found["spec"].items() if k not in ("sampling", "held_out")}}
    assert record.stale(old, spec) == ""
    assert "spec differs in sampling" in record.stale(old, tiny(sampling="spaced"))
    assert "spec differs in lr" in record.stale(
        found | {"spec": {k: v for k, v in old["spec"].items() if k != "lr"}}, spec
    )


def test_every_reason_is_told(tiny: MakeSpec, kept: Kept) -> None:
    reason = record.stale(kept[1] | {"data": "other", "code": "other"}, tiny(lr=0.2, batch=16))
    assert all(words in reason for words in ("lr", "batch", "data", "code"))


def test_a_change_of_the_data_set_s_entry_is_another_data_set() -> None:
    entry = sets.ENTRIES["digits"]
    changed: list[dict[str, Any]] = [
        {"mean": (0.4,)},
        {"std": (0.4,)},
        {"scale": 15.0},
        {"version": 2},
        {"shipped": "sha256:0"},
        {"files": (("a", "sha256:0"),)},
    ]
    digests = {sets.digest(sets.Entry(**(vars(entry) | change))) for change in [{}, *changed]}
    assert len(digests) == len(changed) + 1


def test_a_fresh_record_is_not_trained_again_and_a_stale_one_is(tiny: MakeSpec, tmp_path: Path) -> None:
    class Refuses(InProcess):
        def train(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("trained")

    spec, refuses = tiny(), Refuses(CPU)
    first = rounds.load_or_run(spec, InProcess(CPU), root=tmp_path)
    assert rounds.load_or_run(spec, refuses, root=tmp_path) == first
    with pytest.raises(AssertionError, match="trained"):
        rounds.load_or_run(spec, refuses, root=tmp_path, again=True)
    with pytest.raises(AssertionError, match="trained"):
        rounds.load_or_run(tiny(lr=0.3), refuses, root=tmp_path)
    assert record.load(spec, tmp_path) == first


# What was changed since


def edit_at(found: dict[str, Any], place: str, value: Any) -> None:
    """A value at keys and indices with slashes between them; CUT removes what stands there."""
    *path, last = [int(part) if part.lstrip("-").isdigit() else part for part in place.split("/")]
    inner: Any = found
    for part in path:
        inner = inner[part]
    if value is CUT:
        del inner[last]
    else:
        inner[last] = value


CUT = "cut"
EDITS = [
    ("rounds/0/accuracy", 0.999, "changed after it was written"),
    ("final/accuracy", 0.999, "final accuracy 0.999 is not that of the last round"),
    ("final/accuracy", CUT, "a part is missing"),
    ("final/loss", 0.0, "final loss 0.0 is not that of the last round"),
    ("final", CUT, "a part is missing"),
    ("rounds", [], "has other rounds than 1 to 3"),
    ("rounds/1", CUT, "has other rounds than 1 to 3"),
    ("rounds/-1/round", 4, "has other rounds than 1 to 3"),
    ("rounds/1/accuracy", 1.2, "round 2: accuracy 1.2"),
    ("rounds/1/accuracy", -0.1, "round 2: accuracy -0.1"),
    ("rounds/1/accuracy", None, "round 2: accuracy None"),
    ("rounds/1/accuracy", math.nan, "a number that is not finite"),
    ("rounds/1/uplink_bytes", 0, "round 2: bytes or bits"),
    ("rounds/1/uplink_bytes", -5, "round 2: bytes or bits"),
    ("rounds/1/downlink_bytes", 1.5, "round 2: bytes or bits"),
    ("rounds/1/paper_bits", -1, "round 2: bytes or bits"),
    ("rounds/1/uplink_bytes", 1, "final uplink_bytes"),
    ("final/downlink_bytes", 1, "final downlink_bytes"),
    ("final/paper_bits", 1, "final paper_bits"),
    ("final/uploads", 1, "final uploads 1 is not the number"),
    ("final/refused", 1, "final refused 1 is not the number"),
    ("rounds/1/clients", [1, 1, 2, 3], "round 2: clients"),
    ("rounds/1/clients", [0, 1, 2, 10], "round 2: clients"),
    ("final/uplink_parts", {"model": 1}, "uplink_parts do not add up"),
    ("parameters/weights", -1, "parameters or seconds"),
    ("made/seconds", -1, "parameters or seconds"),
    ("made", None, "a part is missing or of another kind"),
]


@pytest.mark.parametrize("place, value, words", EDITS, ids=[f"{place}-{value}"[:40] for place, value, _ in EDITS])
def test_an_edited_record_is_named_and_not_used(
    tiny: MakeSpec, tmp_path: Path, place: str, value: Any, words: str
) -> None:
    """Without its digest made anew, and with it."""
    spec = tiny()
    file = record.save(run(spec, tmp_path), tmp_path)
    found = json.loads(file.read_text())
    edit_at(found, place, value)
    for remade in (False, True) if not words.startswith("changed") else (False,):
        file.write_text(json.dumps(found | ({"digest": integrity.digest(found)} if remade else {})))
        read = record.load(spec, tmp_path)
        expected = words if remade else "changed after it was written"
        assert read and expected in record.stale(read, spec)
    assert "fault" not in rounds.load_or_run(spec, InProcess(CPU), root=tmp_path)


def test_a_record_with_a_number_that_json_does_not_have_is_not_written(tiny: MakeSpec, tmp_path: Path) -> None:
    found = run(tiny(), tmp_path)
    found["rounds"][1]["loss"] = math.inf
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.save(found, tmp_path)


# What a record holds


def test_a_record_is_complete(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(method="fedmrn", hyper={"mask": "signed"}, rounds=3, evaluate_every=2)
    found = run(spec, tmp_path)
    assert Spec.from_dict(found["spec"]) == spec
    assert found["code"] == code_digest("fedmrn", "mlp", "digits") and found["data"] == sets.digest("digits")
    assert found["partition"] == job_of(spec).task.partition.hash
    assert found["parameters"] == {"weights": 64 * 64 + 64 * 10, "others": 0, "frozen": 0}
    assert [entry["round"] for entry in found["rounds"]] == [1, 2, 3]
    for entry in found["rounds"]:
        evaluated = entry["round"] in (2, 3)  # every second, and the last
        assert (entry["accuracy"] is not None) == (entry["loss"] is not None) == evaluated
        assert entry["uplink_bytes"] > 0 and entry["downlink_bytes"] > 0 and entry["seconds"] >= 0
        assert entry["paper_bits"] == 4 * 4736 and len(entry["clients"]) == 4 and entry["refused"] == []
        assert len(entry["clients"]) == len(set(entry["clients"])) == 4
        assert all(0 <= client < 10 for client in entry["clients"])
    final, last = found["final"], found["rounds"][-1]
    assert (final["accuracy"], final["loss"]) == (last["accuracy"], last["loss"])
    assert 0 <= final["accuracy"] <= 1 and math.isfinite(final["loss"])
    assert final["uploads"] == sum(len(entry["clients"]) for entry in found["rounds"])
    for name in ("uplink_bytes", "downlink_bytes", "paper_bits"):
        assert final[name] == sum(entry[name] for entry in found["rounds"])
    made = found["made"]
    assert made["engine"] == "InProcess" and made["device"].startswith("cpu")
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", made["commit"])
    assert made["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "numpy", "torchvision", "safetensors", "constriction"} <= made["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["time"]) and made["seconds"] >= 0


def test_the_commit_of_a_repository_around_the_project_is_not_told(tmp_path: Path) -> None:
    copy = tmp_path / "mine" / "fl"
    shutil.copytree(ROOT / "fedlib", copy / "fedlib", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from fedlib.runs import machine; print(machine.made([], 'x', 1.0)['commit'])"
    git = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]

    def told(repository: Path) -> str:
        for command in (["init", "-q"], ["add", "."], [*git, "commit", "-qm", "m"]):
            subprocess.run(["git", *command], cwd=repository, check=True)
        env = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=copy, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert told(copy.parent) == "unknown"
    assert re.fullmatch(r"[0-9a-f]{40}", told(copy))


def test_a_record_comes_back_from_its_text_with_one_line_a_round(tiny: MakeSpec, tmp_path: Path) -> None:
    found = run(tiny(), tmp_path)
    text = record.text(found)
    assert json.loads(text) == found | {"digest": integrity.digest(found)}
    assert list(json.loads(text))[-1] == "rounds"
    lines = text.splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines if '"round":' in line] == found["rounds"]
    assert text.endswith("}\n")
    saved = record.save(found, tmp_path)
    assert saved == tmp_path / "records" / "tiny" / "smoke" / "main_fedavg_iid_seed0.json"
    assert saved.read_text() == text and record.load(tiny(), tmp_path) == found


def test_two_runs_of_one_spec_are_equal_to_the_byte(tiny: MakeSpec, tmp_path: Path) -> None:
    specs = [tiny(), tiny(method="fedmrn"), tiny(model="cnn2", rounds=1, cohort=2)]
    first = [json.dumps(ran(spec, tmp_path)) for spec in specs]
    torch.manual_seed(99)  # no global generator has a say
    assert [json.dumps(ran(spec, tmp_path)) for spec in reversed(specs)] == first[::-1]  # nor has what ran before
    assert json.dumps(ran(tiny(seed=1), tmp_path)) != first[0]


def test_stable_leaves_out_times_and_the_machine_alone(tiny: MakeSpec, tmp_path: Path) -> None:
    found = run(tiny(), tmp_path)
    stable = record.stable(found)
    assert found.keys() - stable.keys() == {"made"}
    for entry, kept in zip(found["rounds"], stable["rounds"], strict=True):
        assert entry.keys() - kept.keys() == {"seconds"}
        assert all(entry[key] == value for key, value in kept.items())


# The ledger


class Weighing(InProcess):
    """The reference engine, beside which every message is weighed."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.up: dict[int, int] = {}
        self.down: dict[int, int] = {}

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        for client, upload in super().train(job, message, round, cohort, memories):
            assert type(message) is bytes and type(upload) is bytes
            self.down[round] = self.down.get(round, 0) + len(message)
            self.up[round] = self.up.get(round, 0) + len(upload)
            yield client, upload


@pytest.mark.parametrize("method", ["fedavg", "fedmrn"])
@pytest.mark.parametrize("model", ["mlp", "cnn2"])
def test_the_ledger_adds_up_what_was_passed(tiny: MakeSpec, tmp_path: Path, method: str, model: str) -> None:
    scale, spec = Weighing(), tiny(method=method, model=model, rounds=2, cohort=3)
    found = run(spec, tmp_path, scale)
    assert [entry["uplink_bytes"] for entry in found["rounds"]] == [scale.up[1], scale.up[2]]
    assert [entry["downlink_bytes"] for entry in found["rounds"]] == [scale.down[1], scale.down[2]]
    final, weights = found["final"], found["parameters"]["weights"]
    assert final["uplink_bytes"] == sum(scale.up.values()) == sum(final["uplink_parts"].values())
    assert final["downlink_bytes"] == sum(scale.down.values())
    assert list(final["uplink_parts"]) == [*registry.METHODS[method].sections, "container"]
    total = weights + found["parameters"]["others"]
    part = {"fedavg": ("model", 4 * total), "fedmrn": ("mask", -(-weights // 8))}[method]
    assert final["uplink_parts"][part[0]] == 6 * part[1]
    assert 0 < final["uplink_parts"]["container"] <= 6 * 64
    assert final["paper_bits"] == 6 * {"fedavg": 32 * total, "fedmrn": weights}[method]
