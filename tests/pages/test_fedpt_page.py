"""Tables, figures and measures of partial training, against runs and a benchmark written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from page_records import written

from fedlib.claims import benchmarks, measures
from fedlib.claims.results import rounds, runs
from fedlib.pages import fedpt, figures

Record = dict[str, Any]


def run(label: str, accuracy: float, trained: int = 100, seed: int = 0, noise: float | None = None) -> Record:
    """One round of two clients, whose uploads are 48 bytes beside their entries; the network has 100 parameters."""
    entry = {"accuracy": accuracy, "notes": {"clipped": 0.5}, "paper_bits": 64 * trained}
    entry |= {"uplink_bytes": 2 * (4 * trained + 48), "downlink_bytes": 2 * (4 * trained + 56)}
    spent = {"mechanism": "dp_fedavg", "clip_norm": 0.5, "noise_multiplier": noise, "delta": 0.01}
    spent |= {"epsilon": 3.0 if noise else None}
    name = f"{label}-{seed}-{noise}-{trained}"
    return written(label, [entry], {} if noise is None else {"privacy": spent}, seed=seed, name=name)


FULL = [run("none", 0.9, 100, seed) for seed in (0, 1, 2)]
HALF = [run("half", 0.89, 50, seed) for seed in (0, 1, 2)]
TENTH = [run("tenth", 0.6, 10, seed) for seed in (0, 1, 2)]
ALL = [*FULL, *HALF, *TENTH]


def test_the_private_gap_is_told_for_each_amount_of_noise() -> None:
    records = [run("a", 0.5, noise=1, seed=s) for s in (0, 1)] + [run("b", 0.7, noise=1, seed=s) for s in (0, 1)]
    records += [run("a", 0.4, noise=4, seed=s) for s in (0, 1)] + [run("b", 0.3, noise=4, seed=s) for s in (0, 1)]
    records += [run("b", 0.0, seed=s) for s in (0, 1)]
    where: dict[str, Any] = {"labels": ["b"], "groups": ["main", "other"], "against": ["a"]}
    assert measures.private_gap(runs(records), **where) == {
        "b, main, iid, noise 1": dict.fromkeys((0, 1), pytest.approx(20)),
        "b, main, iid, noise 4": dict.fromkeys((0, 1), pytest.approx(-10)),
    }
    assert measures.private_gap(runs(FULL), **where) == {}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(network: str, policy: str, *numbers: float) -> dict[str, Any]:
        size, time = numbers
        peak = {"sgd": 10 * size, "momentum": 20 * size, "adam": 30 * size}
        ratios = {"step_ratio": time, "step_ratios": [time, time + 0.1], "macs_ratio": time}
        sizes = {"bytes_up": size, "peak_bytes": peak, "state_bytes": peak}
        return {"network": network, "policy": policy} | sizes | ratios

    rows = [row("net", "none", 100, 1.0), row("net", "x/some", 50, 0.7), row("net", "x/most", 10, 0.4)]
    content = {"rows": [*rows, row("other", "none", 8, 1.0), row("other", "y/z", 4, 0.5)], "turns": 2, "cpu": "a chip"}
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "partial.json").write_text(json.dumps(content))
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))


@pytest.mark.usefixtures("bench")
def test_time_and_memory_come_from_the_benchmark() -> None:
    assert benchmarks.step_time(["net"]) == {
        "net, x/some": {0: 0.7, 1: 0.7 + 0.1},
        "net, x/most": {0: 0.4, 1: 0.5},
    }
    assert benchmarks.peak_memory(["net", "other"]) == {
        "net, x/some": dict.fromkeys(range(3), 0.5),
        "net, x/most": dict.fromkeys(range(3), 0.1),
        "other, y/z": dict.fromkeys(range(3), 0.5),
    }
    shown = fedpt.compare_with_full()
    assert shown["bytes each way"].tolist() == [100, 50, 10, 100, 50]
    assert shown["memory, Adam"].tolist() == shown["formula, SGD"].tolist() == [100, 50, 10, 100, 50]
    figure = fedpt.savings_figure(["net", "other"], "figure")
    assert "x/most: 10, 40, 10; y/z: 50, 50, 50" in figure.body and "a chip" in figure.caption
    assert figure.frame["network"].tolist() == ["net", "net", "other"]


def test_policies_in_a_table() -> None:
    body = fedpt.policy_table(runs(ALL), "table").body
    for words in (
        "<td>50.00 %</td>",
        "<td>2.00</td>",
        "<td>256</td>",
        "<td>248</td>",
        "<td>89.0 ± 0.0</td>",
        "<td>10.00</td>",
    ):
        assert words in body


def test_accuracy_against_a_setting() -> None:
    """Mean, lowest and highest; cases and panels in the order of the records; names stand side by side."""
    records = [run("a", 0.5), run("a", 0.7, seed=1), run("a", 0.8, 50), run("b", 0.2, 50)]
    table = runs(records)
    table = table.assign(size=fedpt.count_trained(table))
    found = figures.accuracy_by_setting(table, "size", "entries", "What.", "spread", panel="label")
    assert "a a 100: 60.0; a a 50: 80.0; b b 50: 20.0" in found.body
    assert "seeds 0, 1" in found.caption and found.frame["accuracy"].tolist() == pytest.approx([50, 70, 80, 20])
    named = table.assign(size=table["size"].astype("str") + " entries")
    each = figures.accuracy_by_setting(named, "size", "size", "What.", "each")
    assert "a 100 entries: 60.0" in each.body


def test_what_private_runs_spent_in_a_table() -> None:
    records = [run("a", 0.5, noise=2, seed=s) for s in (0, 1)] + [run("a", 0.6, noise=0)]
    body = fedpt.private_table(runs(records), rounds(records), "Spent.", "private").body
    # The noise in the mean: 100 entries of deviation 2 * 0.5 / 2, whose length is 0.5 * 9.975 in the mean.
    assert "<td>3.00</td>" in body and "<td>none</td>" in body and "<td>50 %</td>" in body and "<td>4.99</td>" in body
