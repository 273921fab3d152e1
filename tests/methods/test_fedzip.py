"""FedZip: its update by hand, its messages, prefix codes; and what compressing one direction alone can save.

Numbers are the properties of FedCompress's specification, section 8.2.
"""

from typing import Any

import numpy as np
import pytest
import torch
from fedcompress_toys import begun, distinct
from hypothesis import given
from hypothesis import strategies as st

from fedlib.core.plan import count
from fedlib.core.uploads import Uploads
from fedlib.methods.baselines.fedzip import FedZip, prefix_lengths
from fedlib.methods.messages import largest
from fedlib.wire import codebook, entropy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_by_hand() -> None:
    """Of ten changes the two largest stay; three clusters from evenly spaced centroids, by Lloyd's steps."""
    change = torch.tensor([0.1, -0.2, 5.0, 0.3, 0.0, -4.0, 0.2, 0.1, -0.1, 0.05])
    assert largest(change, 2).tolist() == [0, 0, 5, 0, 0, -4, 0, 0, 0, 0]
    assert FedZip().quantized(change).tolist() == [0, 0, 5, 0, 0, -4, 0, 0, 0, 0]
    skewed = torch.tensor([0.0] * 6 + [1.0, 1.2, 8.0, 10.0])
    # From 0, 5, 10 with all kept: {0 x 6, 1, 1.2}, {}, {8, 10}; the means 0.275, 5 (nobody's), 9.
    assert FedZip(keep=1.0).quantized(skewed).unique().tolist() == pytest.approx([0.275, 9])


def test_what_is_sent_is_what_the_server_adds() -> None:
    run = begun(method="fedzip", cohort=2)
    made = run.upload()
    change, _ = run.method.read(made)
    assert all(distinct(change[name]) <= 3 for name in run.task.weights)
    kept = sum(int((change[name] != 0).sum()) for name in run.task.weights)
    assert kept <= 0.21 * count(run.task.weights) + len(run.task.weights)
    model = run.method.aggregate(run.state, Uploads([(0, made)])).model
    for name in run.task.weights:
        assert torch.equal(model[name], run.state.model[name] + change[name])
    for name in run.task.vectors | run.task.statistics:
        assert torch.equal(model[name], change[name])
    assert run.method.sizes(made).others.keys() == {"fixed", "zip"}


@pytest.mark.parametrize(
    ("counts", "lengths"),
    [([8, 1, 1], [1, 2, 2]), ([5], [0]), ([1, 1], [1, 1]), ([1, 1, 2, 4], [3, 3, 2, 1]), ([3, 3, 3, 3], [2, 2, 2, 2])],
)
def test_prefix_lengths_by_hand(counts: list[int], lengths: list[int]) -> None:
    assert prefix_lengths(counts) == lengths


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40))
def test_12_prefix_codes_are_codes_within_a_bit_of_entropy(counts: list[int]) -> None:
    lengths = prefix_lengths(counts)
    assert sum(2.0**-length for length in lengths) == pytest.approx(1), "Kraft"
    bits = float(np.dot(lengths, counts))
    assert entropy.entropy_bits(np.array(counts)) <= bits + 1e-6
    assert bits < entropy.entropy_bits(np.array(counts)) + sum(counts)
    assert bits <= codebook.fixed_bits([len(counts)], [sum(counts)]) - 32 * len(counts)


def test_11_who_compresses_one_direction_stays_below_two() -> None:
    """CCR = (both directions of FedAvg) / (both of the method), by each meter, in whole rounds."""

    def traffic(method: str, settings: dict[str, Any]) -> dict[str, float]:
        _, line = begun(settings, method, cohort=3).round()
        zipped = line["other_bits"].get("zip", line["paper_bits"])
        up = {"ours": 8 * line["uplink_bytes"], "fixed": line["other_bits"]["fixed"], "zip": zipped}
        return {meter: up[meter] + 3 * line["notes"]["sent_bits"][meter] for meter in up}

    full = traffic("fedcompress", {"variant": "none"})
    for ways in (traffic("fedzip", {}), traffic("fedcompress", {"self_compression": False})):
        assert all(1 < full[meter] / ways[meter] < 2 for meter in full), ways
