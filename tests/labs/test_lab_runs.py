"""A codec that a lab's reader writes, in the loop of a run."""

from typing import Any

import numpy as np
import pytest
import torch
from lab_answers import FLOATS

from fedlib.errors import RunError, SpecError
from fedlib.labs import plots, runs
from fedlib.methods import registry
from fedlib.own.results import Run


def test_a_codec_is_a_method_while_it_is_tried_and_sends_its_bytes() -> None:
    with runs.trying(*FLOATS, "mine") as name:
        mine = runs.train(name, rounds=2)
        with (
            pytest.raises(SpecError, match="name: 'mine' is a method already"),
            runs.trying(*FLOATS, "mine"),
        ):
            pass
    assert "mine" not in registry.METHODS
    plain = runs.train("fedavg", rounds=2)
    assert mine.accuracy == pytest.approx(plain.accuracy, abs=0.02)  # the same sums, in another order
    assert mine.uploads == plain.uploads == 10
    assert 0 < mine.uplink_bytes - mine.uploads * 4 * 4736 < mine.uploads * 64
    assert [entry["paper_bits"] for entry in mine.rounds] == [5 * 32 * 4736] * 2


def test_what_a_codec_drops_comes_back_with_error_feedback() -> None:
    half = np.arange(4736) < 2368  # all that this codec ever sends

    def encode(u: Any, rng: np.random.Generator) -> bytes:
        lost.append(float(np.linalg.norm(u[~half])))
        u[~half] = 0  # its own copy
        return u.tobytes()

    for feedback in (False, True):
        lost: list[float] = []
        with runs.trying(encode, FLOATS[1]) as name:
            runs.train(name, rounds=4, clients=1, cohort=1, feedback=feedback)
        assert (lost[3] > 2 * lost[0]) == feedback  # kept by the client, and added to


@pytest.mark.parametrize(
    ("encode", "decode", "reason"),
    [
        (lambda u, rng: u, lambda data, d: None, "encode gave ndarray, expected bytes"),
        (lambda u, rng: b"", lambda data, d: np.zeros(d - 1), r"decode gave shape \(4735,\)"),
        (lambda u, rng: b"", lambda data, d: np.full(d, np.nan), "finite"),
        (lambda u, rng: bytes(8 * len(u)), lambda data, d: np.zeros(d), "the model allows at most"),
    ],
)
def test_a_codec_that_does_not_work_is_refused(encode: Any, decode: Any, reason: str) -> None:
    with runs.trying(encode, decode) as name, pytest.raises(RunError, match=reason):
        runs.train(name, rounds=1, epochs=1)
    assert "codec" not in registry.METHODS


def test_a_codec_draws_from_the_run_s_seed() -> None:
    drawn: list[float] = []

    def encode(u: Any, rng: np.random.Generator) -> bytes:
        drawn.append(rng.random())
        return u.tobytes()

    for seed in (0, 0, 1):
        with runs.trying(encode, FLOATS[1]) as name:
            runs.train(name, rounds=1, epochs=1, seed=seed)
    assert drawn[:5] == drawn[5:10] and len(set(drawn)) == 10


def test_an_exchange_and_an_update_are_of_the_same_client() -> None:
    broadcast, upload = runs.exchange("fedavg")
    assert len(upload) == 4 * 4736 + 44 and len(broadcast) == len(upload) + 4
    u = runs.update()
    assert u.shape == (4736,) and u.dtype == np.float32 and 0.1 < np.linalg.norm(u) < 10
    sent = np.frombuffer(upload, "<f4", count=4736, offset=40) - np.frombuffer(broadcast, "<f4", count=4736, offset=44)
    assert np.allclose(sent, u, atol=1e-4)  # the same steps, taken from another point


def test_the_plot_says_what_it_shows() -> None:
    results = {
        name: Run({"final": {"accuracy": 0.9, "uplink_bytes": size}}, torch.nn.Identity())
        for name, size in (("one", 1000), ("two", 2000))
    }
    drawn = plots.pareto(results, [True, False])
    assert "one 1 kB, 90.0 %; two 2 kB, 90.0 %. On the front: one." in drawn.body
