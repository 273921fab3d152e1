"""The benchmarks that time a client's whole round: what they call still sends something."""

import clustered_training
import compare

from fedlib.core.client import Reply
from fedlib.runs import experiments


def test_a_client_of_the_comparison_answers() -> None:
    (run,) = experiments.specs("compare", "lab", "main_fedavg_dirichlet-0.3_seed0")
    call, samples = compare.client(run)
    assert samples > 0 and isinstance(call(), bytes | Reply)


def test_a_client_with_clusters_answers() -> None:
    row = clustered_training.client("pooled4", "digits", (1, 8, 8), 40, 20)
    assert row["samples"] == 40 and row["ms"] > 0
