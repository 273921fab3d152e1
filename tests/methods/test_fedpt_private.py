"""Private training in whole rounds: the bound at the client and at the server, the noise, its tree, what is said of it.

Numbers are the properties of FedPT's specification (shared/papers/fedpt.md, section 8). Mechanisms and accounting alone
are in test_fedpt_mechanisms.py.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedpt_runs import CPU, ENGINE, TRAINED, Run, Settings, point

from fedlib.core.plan import Tensors, count
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.errors import RunError, SpecError
from fedlib.methods.fedpt import accounting, mechanisms
from fedlib.methods.messages import pack_seed
from fedlib.rng import Rng
from fedlib.runs import checkpoint, record, rounds
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
MakeSpec = Callable[..., Spec]
PRIVATE: Settings = {"weighting": "clients", "mechanism": "dp_fedavg", "clip_norm": 0.1, "delta": 0.01}
TREE: Settings = PRIVATE | {"mechanism": "dp_ftrl"}
NOISY = PRIVATE | {"noise_multiplier": 0.5}
SAMPLING = {"dp_fedavg": "poisson", "dp_ftrl": "spaced"}
each_mechanism = pytest.mark.parametrize("mechanism", SAMPLING)


def begin(more: Settings, policy: str = "emnist/dense1", **fields: Any) -> Run:
    sampling = {"sampling": SAMPLING[more["mechanism"]]} if "mechanism" in more else {}
    return Run.of(policy, more, **sampling | fields)


def change(run: Run, norm: float, seed: int = 3) -> Tensors:
    shapes, generator = run.method.trained, torch.Generator().manual_seed(seed)
    flat = torch.randn(count(shapes), generator=generator, dtype=torch.float64)
    return mechanisms.unflatten((flat * (norm / flat.norm())).float(), shapes)


def serve(run: Run, *updates: Tensors) -> Any:
    return run.serve(*(run.upload(update) for update in updates))


@pytest.mark.parametrize("bound", [1e-3, 0.05, 1e3])
def test_09_a_client_sends_no_more_than_the_bound(bound: float) -> None:
    """The norm is that of all tensors together; what is within the bound is sent as it is."""
    run, plain = begin(PRIVATE | {"clip_norm": bound}), begin({"weighting": "clients"})
    sent = []
    for each in (run, plain):
        ((_, reply),) = ENGINE.train(each.job, each.message, 1, [2])
        sent.append(each.read(reply))
    (clipped, samples), (whole, others) = sent
    norm = float(mechanisms.flatten(whole).double().norm())
    assert 0.05 < norm < 1e3 and samples == 1 < others, "how many samples a client has is not told"
    if bound > norm:
        assert all(torch.equal(clipped[name], whole[name]) for name in whole)
    else:
        assert float(mechanisms.flatten(clipped).double().norm()) == pytest.approx(bound, rel=1e-6)
        for name, tensor in whole.items():
            torch.testing.assert_close(clipped[name], tensor * (bound / norm), rtol=1e-5, atol=0)


def test_a_longer_update_than_agreed_is_refused() -> None:
    run = begin(PRIVATE)
    state, uploads = serve(run, change(run, 0.1), change(run, 0.1002), change(run, 0.05), change(run, 5.0))
    assert uploads.accepted == [0, 2] and [client for client, _ in uploads.refused] == [1, 3]
    assert "longer than the agreed bound 0.1" in uploads.refused[0][1]
    assert run.method.notes(state) == {"clipped": 0.5}, "the one at the bound"
    assert run.method.notes(serve(run, change(run, 0.0999))[0]) == {"clipped": 0.0}


@pytest.mark.parametrize("settings", [NOISY, TREE | {"noise_multiplier": 0.5}])
def test_10_one_client_moves_the_model_by_no_more_than_the_sensitivity(settings: Settings) -> None:
    """Under the same noise: at most C / M where a client is left out, 2 C / M where it is replaced by its opposite."""
    run = begin(settings)
    a, b = change(run, 0.1), change(run, 0.1, seed=4)
    opposite = {name: -tensor for name, tensor in a.items()}
    with_it, without, replaced = (point(serve(run, *each)[0]) for each in ((a, b), (b,), (opposite, b)))
    unit = 0.1 / run.spec.cohort
    assert float((with_it - without).norm()) == pytest.approx(unit, rel=1e-4)
    assert float((with_it - replaced).norm()) == pytest.approx(2 * unit, rel=1e-4)


def test_11_noise_of_a_round() -> None:
    """That of `private_mean`, whose deviation is nm C / M in every entry, in rounds to which nobody came."""
    run = begin(NOISY | {"server_lr": 0.7}, cohort=5)
    rng, first = Rng(run.state.own.noise), run.state
    for number in range(3):
        expected = point(run.state) + 0.7 * mechanisms.gaussian(rng.child("round", number), TRAINED, 0.5 * 0.1) / 5
        run.state, uploads = serve(run)
        assert not uploads.accepted and run.method.notes(run.state) == {"clipped": 0.0}
        torch.testing.assert_close(point(run.state), expected, rtol=0, atol=1e-7)
    # 12: none of it on what is frozen
    before, after = (run.models(state) for state in (first, run.state))
    assert [n for n in before if torch.equal(before[n], after[n])] == ["dense1.weight", "dense1.bias"]


def test_13_noise_of_the_tree() -> None:
    run = begin(TREE | {"noise_multiplier": 0.5, "server_lr": 0.7}, cohort=5)
    start = point(run.state)
    rng = Rng(run.state.own.noise).child("tree")
    for number in range(1, 6):
        run.state, _ = serve(run)
        expected = start - 0.7 * mechanisms.tree_noise(rng, number, TRAINED, 0.01)
        torch.testing.assert_close(point(run.state), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@each_mechanism
def test_14_without_noise_and_clipping_it_is_the_plain_method(mechanism: str, momentum: float) -> None:
    """Heavy-ball SGD on the server, all clients in each round."""
    common = {"weighting": "clients", "server_lr": 0.7, "momentum": momentum}
    sampling = {"dp_fedavg": "fixed", "dp_ftrl": "spaced"}[mechanism]
    private = begin(common | {"mechanism": mechanism, "clip_norm": 1e6, "delta": 0.01}, cohort=10, sampling=sampling)
    plain = begin(common, cohort=10)
    points, expected = ([point(state) for state in run.states(6)] for run in (private, plain))
    assert all(float((one - other).abs().max()) < 2e-5 for one, other in zip(points, expected, strict=True))
    assert max(float((after - before).abs().max()) for before, after in itertools.pairwise(expected)) > 0.01


def test_no_message_holds_the_seed_of_the_noise() -> None:
    run = begin(NOISY)
    own = run.state.own
    other = dataclasses.replace(run.state, own=dataclasses.replace(own, noise=own.noise ^ 1))
    assert pack_seed(own.noise) not in run.message and run.message == rounds.broadcast(run.method, other, 1)
    moved = [point(run.method.aggregate(state, Uploads([]))) for state in (run.state, other)]
    assert not torch.equal(*moved)


OTHER_RUNS: list[tuple[Settings, Settings]] = [
    ({"noise_multiplier": 1.0}, {}),
    ({"clip_norm": 0.2}, {}),
    ({"server_lr": 0.5}, {}),
    ({}, {"lr": 0.2}),
    ({}, {"cohort": 5}),
    ({}, {"seed": 1}),
    ({}, {"clients": 20}),
    ({}, {"partition": {"kind": "iid", "seed": 7}}),
    ({}, {"held_out": 0.1}),
]


@pytest.mark.parametrize("settings, fields", OTHER_RUNS)
@each_mechanism
def test_runs_that_differ_do_not_share_their_noise(mechanism: str, settings: Settings, fields: Settings) -> None:
    """Or one could be taken from the other, and the updates would show."""
    steps = []
    for run in (begin(NOISY | {"mechanism": mechanism}), begin(NOISY | {"mechanism": mechanism} | settings, **fields)):
        steps.append(point(serve(run)[0]) - point(run.state))
    assert abs(float(np.corrcoef(torch.stack(steps).numpy())[0, 1])) < 5 / math.sqrt(TRAINED)


def test_nor_do_two_policies() -> None:
    steps = []
    for policy in ("emnist/dense1", "none"):
        run = begin(NOISY, policy)
        name = "conv2.weight"
        steps.append((serve(run)[0].model[name] - run.state.model[name]).flatten().double())
    flat = [point(begin(NOISY, p).state)[:208] for p in ("emnist/dense1", "none")]
    assert torch.equal(*flat), "the first entries of both are the same tensor"
    assert abs(float(np.corrcoef(torch.stack(steps).numpy())[0, 1])) < 5 / math.sqrt(3200)


@each_mechanism
def test_a_record_says_what_was_spent(tmp_path: Path, mechanism: str) -> None:
    settings = NOISY | {"mechanism": mechanism, "noise_multiplier": 2.0, "clip_norm": 0.3}
    run = begin(settings, rounds=5, cohort=3)
    found = rounds.load_or_run(run.spec, ENGINE, root=tmp_path)
    said = dict(found["final"]["privacy"])
    turns: Settings = {"clients": 10, "cohort": 3}
    if mechanism == "dp_ftrl":  # rounds 1 and 4: two leaves, two pairs, and both in the first four
        turns = {"weight": 2 + 2 + 4}
    budget: Settings = {"noise_multiplier": 2.0, "rounds": 5, "delta": 0.01}
    expected = accounting.epsilon(mechanism, SAMPLING[mechanism], **budget, **turns)
    assert said.pop("epsilon") == pytest.approx(expected, rel=1e-5) and 0.1 < expected < 20
    assert said.pop("neighbours") in ("ADD_OR_REMOVE_ONE", "REPLACE_SPECIAL")
    assert said == {"mechanism": mechanism, "sampling": SAMPLING[mechanism], "clip_norm": 0.3} | {
        name: budget[name] for name in ("noise_multiplier", "delta")
    }
    assert all(0 <= entry["notes"]["clipped"] <= 1 for entry in found["rounds"])
    assert record.stable(found) == record.stable(rounds.run(run.spec, ENGINE, root=tmp_path / "again"))


def test_a_record_without_noise_has_no_epsilon(tmp_path: Path) -> None:
    assert rounds.run(begin(PRIVATE, rounds=1).spec, ENGINE, root=tmp_path)["final"]["privacy"]["epsilon"] is None


def test_noise_needs_the_accountant_before_the_first_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(RunError, match=r"fedlib\[privacy\]"):
        begin(NOISY, rounds=1)
    assert rounds.run(begin(PRIVATE, rounds=1).spec, ENGINE, root=tmp_path)


def test_a_poisson_round_without_clients_is_one_of_noise(tmp_path: Path) -> None:
    run = begin(NOISY, clients=6, cohort=1, rounds=12)
    found = rounds.run(run.spec, ENGINE, root=tmp_path)
    sizes = [len(entry["clients"]) for entry in found["rounds"]]
    assert 0 in sizes and max(sizes) > 1 and len(sizes) == 12
    empty = found["rounds"][sizes.index(0)]
    assert empty["uplink_bytes"] == empty["downlink_bytes"] == 0 and empty["notes"] == {"clipped": 0.0}


@each_mechanism
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, mechanism: str) -> None:
    """The noise of later rounds needs what the server keeps."""

    class Dies(InProcess):
        def train(self, job: Any, message: Any, round: int, *rest: Any) -> Any:
            if round == 5:
                raise KeyboardInterrupt
            return super().train(job, message, round, *rest)

    run = begin(NOISY | {"mechanism": mechanism, "momentum": 0.9}, rounds=7)
    with pytest.raises(KeyboardInterrupt):
        rounds.run(run.spec, Dies(CPU), root=tmp_path, save_every=0)
    assert checkpoint.Checkpoint(run.spec, tmp_path).load(run.method) is not None
    whole = rounds.run(run.spec, ENGINE, root=tmp_path / "whole")
    assert record.stable(rounds.run(run.spec, ENGINE, root=tmp_path)) == record.stable(whole)


@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_engines_agree(kind: type[Any]) -> None:
    run = begin(PRIVATE | {"clip_norm": 0.02})
    one, other = (dict(engine.train(run.job, run.message, 1, [8, 0])) for engine in (ENGINE, kind(CPU)))
    for client in one:
        a, b = (mechanisms.flatten(run.read(reply[client])[0]) for reply in (one, other))
        assert float((a - b).norm()) < 1e-3 * float(a.norm()) and (kind is Stacked or torch.equal(a, b))


BAD = [
    ({"mechanism": "dp_sgd"}, "hyper.mechanism: 'dp_sgd'"),
    *[({"clip_norm": value}, "hyper.clip_norm") for value in (0, -1, math.nan, math.inf, "x", None)],
    *[({"noise_multiplier": value}, "hyper.noise_multiplier") for value in (-0.1, math.nan, math.inf, "x", None)],
    *[
        ({"delta": value}, f"hyper.delta: {value}, but an epsilon means nothing without its delta")
        for value in (0, None)
    ],
    *[({"delta": value}, "hyper.delta") for value in (-0.1, 1.5, math.nan, "x")],
    ({"delta": 0.1}, r"hyper.delta: 0.1 must be below 1 / clients, which is 0.1"),
    ({"weighting": "samples"}, "hyper.weighting: 'samples' lets a client weigh more than others; take clients"),
    ({"mechanism": "dp_ftrl", "optimizer": "adam"}, "dp_ftrl is an optimizer itself, not 'adam'; take sgd"),
    ({"mechanism": "none", "delta": 0}, "hyper.clip_norm: 0.1 needs a mechanism"),
    ({"mechanism": "none", "clip_norm": 0}, "hyper.noise_multiplier: 0.5 needs a mechanism"),
]


@pytest.mark.parametrize("more, words", BAD)
def test_bad_settings(tiny: MakeSpec, more: Settings, words: str) -> None:
    fits = {"method": "fedpt", "model": "emnist-narrow", "sampling": "poisson"}
    assert tiny(**fits, hyper=NOISY)
    with pytest.raises(SpecError, match=words):
        tiny(**fits, hyper=NOISY | more)


@pytest.mark.parametrize(
    "mechanism, sampling, allowed",
    [
        ("dp_fedavg", "spaced", "'poisson' .*, 'fixed'"),
        ("dp_ftrl", "poisson", "'spaced'"),
        ("dp_ftrl", "fixed", "'spaced'"),
    ],
)
def test_a_sampler_that_the_accounting_does_not_fit_is_refused(
    tiny: MakeSpec, mechanism: str, sampling: str, allowed: str
) -> None:
    words = f"sampling: '{sampling}' is not what the accounting of {mechanism} assumes; sample by {allowed}"
    with pytest.raises(SpecError, match=words):
        tiny(method="fedpt", model="emnist-narrow", sampling=sampling, hyper=NOISY | {"mechanism": mechanism})
