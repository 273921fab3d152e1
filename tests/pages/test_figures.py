"""What the pages show: alt text with the values, points as CSV, captions that say scale, data, seeds and device."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from page_records import written
from PIL import Image

from fedlib.claims.results import rounds, runs
from fedlib.pages import figures, tables
from fedlib.pages.exhibit import Exhibit, provenance
from fedlib.runs.record import Record


def made_up(label: str, seed: int, accuracies: list[float]) -> Record:
    """A record with two rounds of 1 MB up, evaluated at both, of a network with 5 million parameters."""
    sizes = {"loss": 1.0, "uplink_bytes": 1_000_000, "downlink_bytes": 3_000_000, "paper_bits": 7_500_000.0}
    parts = {"uplink_parts": {"mask": 1_999_000, "container": 1_000}}
    record = written(label, [{"accuracy": a} | sizes for a in accuracies], parts, seed=seed)
    return record | {"parameters": {"weights": 4_999_000, "others": 1_000}}


@pytest.fixture
def records() -> list[Record]:
    return [
        made_up("a", 0, [0.5, 0.75]),
        made_up("a", 1, [0.5, 0.85]),
        made_up("b", 0, [0.1, 0.2]),
    ]


def image_of(exhibit: Exhibit) -> Image.Image:
    found = re.search(r"base64,([^\"]+)", exhibit.body)
    assert found
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


def test_curves_carry_their_values_and_their_provenance(records: list[Record]) -> None:
    shown = figures.accuracy_curves(runs(records), rounds(records), against="uplink_megabytes")
    assert (
        "test accuracy (%)" in shown.body and "iid, a: 80; iid, b: 20" in shown.body
    )  # alt text, by hand: (75 + 85) / 2
    for words in ("Profile lab", "digits", "10 clients, 2 a round", "seeds 0, 1", "cpu (test)"):
        assert words in shown.caption
    assert list(shown.frame["uplink_megabytes"]) == [1.0, 2.0] * 3
    assert list(shown.frame["downlink_megabytes"]) == [3.0, 6.0] * 3
    assert list(shown.frame["bits"]) == [0.75] * 6  # 7.5 Mbit of two uploads of 5 million parameters
    bits = figures.accuracy_curves(runs(records), rounds(records), quantity="bits")
    assert "bits a parameter" in bits.body and "iid, a: 0.75; iid, b: 0.75" in bits.body


def test_a_single_seed_is_called_one(records: list[Record]) -> None:
    assert "a single seed (0)" in provenance(runs(records[:1]))


def test_the_csv_behind_the_link_is_the_frame(records: list[Record]) -> None:
    shown = figures.accuracy_curves(runs(records), rounds(records))
    link = re.search(r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', shown._repr_html_())
    assert link and link[1] == "accuracy-against-round.csv"
    back = pd.read_csv(io.BytesIO(base64.b64decode(link[2])))
    pd.testing.assert_frame_equal(back, shown.frame, check_dtype=False)


def test_figures_are_opaque_and_repeatable(records: list[Record]) -> None:
    first, second = (figures.accuracy_curves(runs(records), rounds(records)) for _ in range(2))
    assert first.body == second.body
    alpha = np.asarray(image_of(first).convert("RGBA"))[..., 3]
    assert alpha.min() == 255


def test_the_accuracy_table_shows_mean_deviation_and_every_seed(records: list[Record]) -> None:
    row = tables.accuracy_table(runs(records)).frame.iloc[0]
    assert row["mean (%)"] == "80.00" and row["each seed (%)"] == "75.00, 85.00"
    assert row["deviation"] == f"{np.std([75, 85], ddof=1):.2f}"
    assert tables.accuracy_table(runs(records)).frame.iloc[1]["deviation"] == "single seed"


def test_the_payload_table_sets_measured_bytes_beside_the_arithmetic(records: list[Record]) -> None:
    frame = tables.payload_table(runs(records[:1]), {"a": {"mask": 499_750}}).frame
    assert list(frame["measured bytes"]) == ["499,750", "250", "500,000"]
    assert list(frame["worked out"]) == ["499,750", "–", "–"]


def test_text_is_escaped(records: list[Record]) -> None:
    records[0]["made"]["device"] = 'a <b> "c"'
    assert "<b>" not in figures.accuracy_curves(runs(records), rounds(records))._repr_html_()
