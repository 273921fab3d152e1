"""Tables, figures and measures of FedCompress, against runs and a benchmark written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import MakeSpec, job_of
from page_records import written

from fedlib.claims import benchmarks, measures
from fedlib.claims.results import rounds, runs
from fedlib.methods.fedcompress import clustering
from fedlib.pages import client_diagnostics, fedcompress, figures
from fedlib.pages.page import Page

Record = dict[str, Any]
LABELS: dict[str, Any] = {"labels": ["few"], "groups": ["main"], "against": ["fedavg"]}


def run(label: str, up: int, down: int, accuracy: float, seed: int = 0, zipped: float = 2.0, **hyper: Any) -> Record:
    """Two rounds of two clients; `up` and `down` are bytes of one message; fixed width takes half as long again."""
    notes = {"clusters": 4, "score": 5.0, "validation": 0.5, "losses": [0.2, 0.1], "before": 0.75}
    notes["sent_bits"] = {"ours": 8 * down, "fixed": 12 * down, "zip": 8 * zipped * down}
    notes["model_bits"] = {"ours": 16 * down, "fixed": 24 * down, "zip": 40 * down}
    entry = {"accuracy": accuracy, "loss": 0.5, "notes": notes, "paper_bits": 16 * zipped * up}
    entry |= {"uplink_bytes": 2 * up, "downlink_bytes": 2 * down, "other_bits": {"fixed": 24 * up}}
    return written(label, [dict(entry), dict(entry)], seed=seed, hyper=hyper)


FULL = [run("fedavg", 1000, 1000, 0.9, seed) for seed in (0, 1, 2)]
FEW = [run("few", 100, 300, 0.85 + 0.01 * seed, seed, zipped=4.0, norms="frozen") for seed in (0, 1, 2)]
BOTH = runs([*FULL, *FEW]), rounds([*FULL, *FEW])


def test_traffic_is_of_both_directions_by_each_meter() -> None:
    """Two rounds, two clients: 4 messages each way."""

    def count(record: Record, meter: str) -> float:
        return float(measures.count_traffic(runs([record]), rounds([record]), meter).iloc[0])

    assert count(FEW[0], "ours") == 8 * 4 * (100 + 300)
    assert count(FEW[0], "fixed") == 12 * 4 * (100 + 300)
    assert count(FEW[0], "zip") == 32 * 4 * (100 + 300)
    named = run("few", 100, 300, 0.9)
    for entry in named["rounds"]:
        entry["other_bits"]["zip"] = 7.0
    assert count(named, "zip") == 2 * 7 + 16 * 4 * 300, "a method whose own definition is another"


def test_ratios_by_hand() -> None:
    ours = measures.traffic_ratio(*BOTH, **LABELS, meter="ours")
    assert ours == {"few, main, iid": dict.fromkeys(range(3), pytest.approx(2000 / 400))}
    zipped = measures.traffic_ratio(*BOTH, **LABELS, meter="zip")
    assert zipped == {"few, main, iid": dict.fromkeys(range(3), pytest.approx(2.5))}
    assert measures.model_ratio(BOTH[0], **LABELS, meter="fixed") == {
        "few, main, iid": dict.fromkeys(range(3), pytest.approx(10 / 3))
    }
    assert measures.traffic_ratio(runs(FEW), rounds(FEW), **LABELS, meter="ours") == {}


def test_ratios_in_a_table() -> None:
    shown = fedcompress.ratio_table(*BOTH, "fedavg", "ratios")
    for words in ("<td>86.0 ± 1.0</td>", "<td>4.0 ± 1.0</td>", "<td>5.00</td>", "<td>3.33</td>"):
        assert words in shown.body
    assert "<td>90.0 ± 0.0</td>" in shown.body and "<td>1.00</td>" in shown.body
    assert "over those of the method" in shown.caption and len(shown.frame) == 3 * 6


def test_curves_end_at_all_that_was_sent() -> None:
    shown = figures.accuracy_curves(*BOTH, "megabytes", panel="data")
    assert "digits, few: 86" in shown.body and shown.frame["megabytes"].max() == pytest.approx(4 * 2000 / 1e6)


def test_history_by_round() -> None:
    shown = fedcompress.history_figure(runs(FEW), rounds(FEW), ("clusters", "up", "down"), "What.", "history")
    for words in ("few, clusters of a tensor: 4 to 4", "bytes of a mean upload: 100 to 100", "broadcast: 300 to 300"):
        assert words in shown.body
    assert set(shown.frame["quantity"]) == {"clusters", "up", "down"}


def test_accuracy_against_all_that_a_run_sends() -> None:
    shown = figures.trade_off(BOTH[0], "frontier", cost=figures.MEGABYTES)
    assert "iid, few: 0.00 MB, 86.0 %" in shown.body and shown.frame["MB"].max() == pytest.approx(4 * 2000 / 1e6)


def test_distillation_in_a_table() -> None:
    """Of two rounds both count: before 75 %, after 85 to 87 %."""
    length = {"distil_epochs": 3, "images": 130, "distil_batch": 64}
    few = [run("few", 100, 300, 0.85 + 0.01 * seed, seed, **length) for seed in (0, 1, 2)]
    other = run("noise", 1, 1, 0.3, foreign="noise", **length)
    other["spec"]["group"] = "distillation"
    found = fedcompress.compare_distillations(Page("fedcompress", "lab", runs([*few, other]), rounds([*few, other])))
    assert found["steps"].tolist() == [6] * 4 and found["cost"].round(6).tolist() == [-10, -11, -12, 45]
    body = fedcompress.distillation_table(found, "table").body
    for words in ("leaves", "noise", "0.2000", "0.1000", "75.0 ± 0.0", "86.0 ± 1.0", "-11.0 ± 1.0"):
        assert words in body
    longer = run("few", 100, 300, 0.85, **length)
    notes = longer["rounds"][0]["notes"] | {"before": 0.95}
    longer["rounds"] += [longer["rounds"][0] | {"round": n, "notes": notes} for n in range(3, 10)]
    found = fedcompress.compare_distillations(Page("fedcompress", "lab", runs([longer]), rounds([longer])))
    assert found["cost"].round(6).tolist() == [10], "rounds 5 to 8 where there are as many"


def test_a_contact_sheet_names_its_kinds() -> None:
    shown = fedcompress.contact_sheet((1, 8, 8), "sheet", each=2)
    assert all(kind in shown.body for kind in ("leaves", "stripes", "spectrum", "noise", "voices"))
    assert "8 x 8" in shown.caption and len(shown.frame) == 5 * 2 * 8


def test_weights_of_a_client_phase_by_phase(tiny: MakeSpec) -> None:
    hyper = dict(images=32, distil_batch=32, distil_epochs=1, clustered_epochs=1, least=4, most=4)
    job = job_of(tiny(method="fedcompress", model="pooled4", hyper=hyper, optimizer="adam", lr=1e-3, held_out=0.1))
    phases, _ = client_diagnostics.follow_client(job)
    assert [moment for moment, _ in phases] == ["as received", "after ordinary epochs", "after clustered epochs"]
    first, ordinary, last = (state for _, state in phases)
    assert first["conv2.weight"].unique().numel() <= 4 < ordinary["conv2.weight"].unique().numel()
    assert len(clustering.centroids(last)) == 4 and not clustering.centroids(ordinary)
    shown = fedcompress.weights_figure(phases, "conv2.weight", "What.", "weights")
    assert "as received: 4 values" in shown.body
    assert shown.frame.groupby("moment", sort=False)["what"].value_counts()["as received", "centroid"] == 4
    assert (shown.frame["what"] == "weight").sum() == 3 * 4608 and (shown.frame["what"] == "centroid").sum() == 2 * 4


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"network": "net", "shape": [1, 8, 8]}
    fast = {variant: {"ms": 2.0, "ratio": 1.0} for variant in fedcompress.VARIANTS}
    fast["clustered"] = {"ms": 1.0, "ratio": 0.5}
    files = {kind: {"bytes": 4000, "ms": 1.0, "ratio": 1.0} for kind in ("dense", "int8")}
    files["coded"] = {"bytes": 500, "ms": 2.0, "ratio": 2.0}
    times = [row | {"batch": batch, "variants": fast} for batch in (1, 64)]
    content = {"times": times, "files": [row | {"files": files}], "cpu": "a chip", "clusters": 16, "turns": 3}
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "inference.json").write_text(json.dumps(content))
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))


@pytest.mark.usefixtures("bench")
def test_inference_comes_from_the_benchmark() -> None:
    found = benchmarks.inference_speed(["net"], "dense", "clustered")
    assert found == {"clustered against dense": {0: 2.0, 1: 2.0}}
    assert benchmarks.inference_speed(["other"], "dense", "clustered") == {}
    times, files = fedcompress.inference_table("times"), fedcompress.size_table("files")
    assert "<td>0.50</td>" in times.body and "a chip" in times.caption
    assert "<td>4,000</td>" in files.body and "<td>0.12</td>" in files.body and "16 clusters" in files.caption
