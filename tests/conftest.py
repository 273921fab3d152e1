"""What several test files share: a run on scikit-learn's digits that takes a fraction of a second."""

from collections.abc import Callable
from typing import Any

import pytest

from fedlib.spec import Spec

TINY: dict[str, Any] = dict(
    paper="tiny",
    profile="smoke",
    name="main_fedavg_iid_seed0",
    group="main",
    label="fedavg",
    split="iid",
    method="fedavg",
    hyper={},
    data="digits",
    model="mlp",
    partition={"kind": "iid", "seed": 1},
    clients=10,
    cohort=4,
    rounds=3,
    epochs=1,
    batch=32,
    lr=0.1,
    evaluate_every=2,
    seed=0,
)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Spec]:
    """A small spec with the given fields changed."""
    return lambda **changes: Spec.from_dict(TINY | changes)
