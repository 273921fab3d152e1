"""FedPT's server: its optimizers, its mean, and that without a frozen part all is federated averaging.

The oracles are FedAvg, a server spelt out, torch's own Adam, and formulas in float64.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from fedpt_runs import CPU, ENGINE, HEAVY, LOCAL, SERVER, TRAINED, UNEQUAL, Run, Settings, State, equal, same
from torch import Tensor, nn

from fedlib.core.method import ServerState
from fedlib.core.plan import Tensors
from fedlib.errors import PayloadError
from fedlib.methods.fedavg import FedAvg
from fedlib.methods.fedpt.method import FedPT
from fedlib.rng import Rng
from fedlib.runs import build, rounds

pytestmark = pytest.mark.usefixtures("one_thread")
each_local = pytest.mark.parametrize("local", LOCAL)
each_server = pytest.mark.parametrize("server", SERVER)
ADAPTIVE = [{"optimizer": o, "server_lr": 0.05, "correction": c} for o in ("adam", "yogi") for c in (True, False)]
OTHERS: list[Settings] = [{}, {"beta1": 0.9, "beta2": 0.9, "epsilon": 0.1}, {"beta1": 0.5, "beta2": 0.0}]


def changes(run: Run, count: int, scale: float = 0.1) -> list[Tensors]:
    generator, shapes = torch.Generator().manual_seed(3), run.method.trained
    return [{n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(count)]


def served(run: Run, *pairs: tuple[Tensors, int]) -> State:
    return run.serve(*(run.upload(*pair) for pair in pairs))[0]


def fedavg_of(run: Run) -> tuple[Any, Any]:
    """Spec and job of FedAvg in place of FedPT."""
    spec = dataclasses.replace(run.spec, method="fedavg", hyper={})
    return spec, build.job(spec, CPU)


@each_local
def test_07_policy_none_is_fedavg(local: str) -> None:
    """To the rounding of w + mean(change) against mean(w): FedAvg sends models, not changes, as float32."""
    run = Run.of("none", **UNEQUAL, **LOCAL[local])
    (spec, job), state = fedavg_of(run), run.state
    for number in (1, 2, 3):
        new = run.one_round(state, number)
        expected, _ = rounds.one_round(spec, job, ENGINE, ServerState(state.model, None), number, {})
        for name, before in state.model.items():
            moved = float((new.model[name] - before).abs().max())
            bound = 2.0**-22 * (float(before.abs().max()) + 8 * moved)
            assert float((new.model[name] - expected.model[name]).abs().max()) <= bound < moved / 1000
        state = new


@each_server
@each_local
def test_07_policy_none_is_plain_fedopt_bit_for_bit(server: str, local: str) -> None:
    """Three rounds in a row: the clients are FedAvg's, of whose models the change is taken; the server is spelt out."""
    run = Run.of("none", SERVER[server], **UNEQUAL, **LOCAL[local])
    (spec, job), method, w = fedavg_of(run), run.method, dict(run.state.model)
    m, v = ({name: torch.zeros_like(w[name]) for name in w} for _ in range(2))
    for t in (1, 2, 3):
        run.state = run.one_round(run.state, t)
        cohort = rounds.draw_cohort(spec, job.task, t)
        total, weight = {name: torch.zeros_like(w[name], dtype=torch.float64) for name in w}, 0
        message = job.method.broadcast(ServerState(w, None))
        for _, reply in ENGINE.train(job, message, t, cohort):
            model, samples = FedAvg().bind(job.task).read(reply)  # type: ignore[arg-type]
            weight += samples
            for name in w:
                total[name] += samples * (model[name] - w[name]).double()
        for name in w:
            d = (total[name] / weight).float()
            if method.optimizer == "sgd":
                m[name] = method.momentum * m[name] + d if method.momentum else d
                w[name] = w[name] + method.server_lr * m[name]
                continue
            m[name] = method.beta1 * m[name] + (1 - method.beta1) * d
            grown = d * d
            if method.optimizer == "adam":
                v[name] = method.beta2 * v[name] + (1 - method.beta2) * grown
            else:
                v[name] = v[name] - (1 - method.beta2) * torch.sign(v[name] - grown) * grown
            unbiased = (1 - method.beta2**t) ** 0.5 / (1 - method.beta1**t) if method.correction else 1
            w[name] = w[name] + method.server_lr * unbiased * m[name] / (v[name].sqrt() + method.epsilon)
        assert equal(run.state.model, w)


def float64_server(method: FedPT, w: Tensor, means: list[Tensor]) -> Tensor:
    """torch's Adam, whose epsilon stands beside the corrected root; Keras' and Reddi et al.'s formulas from v = 0."""
    b1, b2, m, v = method.beta1, method.beta2, torch.zeros_like(w), torch.zeros_like(w)
    own = nn.Parameter(w.clone())
    torchs = torch.optim.Adam([own], lr=method.server_lr, betas=(b1, b2))
    for t, d in enumerate(means, 1):
        own.grad, torchs.param_groups[0]["eps"] = -d, method.epsilon / math.sqrt(1 - b2**t)
        torchs.step()
        m = method.momentum * m + d if method.optimizer == "sgd" else b1 * m + (1 - b1) * d
        v = b2 * v + (1 - b2) * d**2 if method.optimizer == "adam" else v - (1 - b2) * (v - d**2).sign() * d**2
        rate = method.server_lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if method.correction else 1)
        w = w + (method.server_lr * m if method.optimizer == "sgd" else rate * m / (v.sqrt() + method.epsilon))
    return own.detach() if method.optimizer == "adam" and method.correction else w


@pytest.mark.parametrize("more", [{"server_lr": 0.7}, HEAVY, *[a | o for a in ADAPTIVE for o in OTHERS]])
def test_07_server_optimizers_in_float64(more: Settings) -> None:
    """Five rounds of three clients with unequal weights; changes grow and shrink."""
    run, weights, means = Run.of(hyper=more), [1, 5, 100], []
    before = run.state.model
    for scale in (0.1, 0.2, 0.03, 0.06, 0.02):
        pairs = list(zip(changes(run, 3, scale), weights, strict=True))
        means.append({name: sum(k * c[name].double() for c, k in pairs) / 106 for name in before})
        run.state = served(run, *pairs)
    for name, start in before.items():
        expected = float64_server(run.method, start.double(), [mean[name] for mean in means])  # type: ignore[misc]
        np.testing.assert_allclose(run.state.model[name], expected, rtol=2e-6, atol=2e-6)
        assert float((expected - start).abs().max()) > 0.01


def test_adam_defaults_to_keras() -> None:
    method = FedPT(optimizer="adam")
    assert (method.beta1, method.beta2, method.correction) == (0.9, 0.999, True)


@each_server
def test_08_aggregation_is_linear(server: str) -> None:
    run, plain = Run.of(hyper=SERVER[server]), Run.of(hyper={**SERVER[server], "weighting": "clients"})
    a, b, c = changes(run, 3)
    one, mixed = served(run, (a, 1)), served(run, (a, 3), (b, 50), (c, 7))
    assert same(served(run, (a, 3), (a, 50), (a, 7)), one) and not same(one, mixed), "equal clients are one"
    assert same(served(run, (a, 3 * 64), (b, 50 * 64), (c, 7 * 64)), mixed)
    mean = {name: ((a[name].double() + b[name].double() + c[name].double()) / 3).float() for name in a}
    expected = plain.method.server_step(plain.state, mean)
    assert same(served(plain, (a, 3), (b, 50), (c, 7)), expected) and not same(expected, mixed)


def test_an_update_that_is_not_finite_is_refused_and_the_round_goes_on() -> None:
    run, (change,) = Run.of(), changes(Run.of(), 1)
    local = run.begin()
    local.trainable = {name: tensor / 0 for name, tensor in local.trainable.items()}
    with pytest.raises(PayloadError, match="only finite") as error:
        run.method.upload(local, run.task.held(0), Rng(0))
    nan = run.packed("up", 7, run.mark, np.full(TRAINED, np.nan, "<f4").tobytes())
    state, uploads = run.serve(error.value, run.upload(change), nan)
    assert same(state, served(run, (change, 1)))
    assert uploads.accepted == [1] and [client for client, _ in uploads.refused] == [0, 2]
