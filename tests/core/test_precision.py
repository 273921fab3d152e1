"""A round in bfloat16 ends about where one in float32 does, whatever the method; what cannot be had is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import CPU, MakeSpec
from torch import Tensor

from fedlib import federate
from fedlib.errors import RunError, SpecError
from fedlib.methods import registry
from fedlib.runs import build, fitting

QUICK = {"distil_epochs": 1, "images": 64, "distil_batch": 32, "clustered_epochs": 1, "least": 8, "most": 8}
OWN: dict[str, dict[str, Any]] = {
    "fedcompress": {"settings": QUICK, "held_out": 0.1, "optimizer": "adam", "lr": 0.005},
    "fedpm": {"optimizer": "adam"},
    "fedpt": {"settings": {"policy": "emnist/conv"}},
}
needs_bfloat16 = pytest.mark.skipif(not build.has_bfloat16(), reason="this processor has no bfloat16")


def change(method: str, precision: str) -> Tensor:
    """What a round changes of the model: less what it is after one whose steps have no length."""
    more: dict[str, Any] = {"lr": 0.1, "optimizer": "sgd"} | OWN.get(method, {})
    states = []
    for lr in (1e-12, more.pop("lr")):
        run = federate(
            "emnist-hidden32", "digits", method=method, lr=lr, clients=4, cohort=2, rounds=1, batch_size=16, seed=3,
            engine="process", precision=precision, **more,
        )  # fmt: skip
        states.append(torch.cat([tensor.flatten() for tensor in run.model.state_dict().values()]))
    return states[1] - states[0]


@needs_bfloat16
@pytest.mark.parametrize("method", registry.METHODS)
def test_a_round_ends_about_where_one_in_float32_does(method: str) -> None:
    """Random draws are the same, so what differs is rounding, and what masks and signs make of it."""
    exact, rounded = (change(method, precision) for precision in ("float32", "bfloat16"))
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded), "the setting does something"
    assert torch.cosine_similarity(exact, rounded, 0) > 0.8
    assert 0.9 < rounded.norm() / exact.norm() < 1.1


@needs_bfloat16
def test_weights_gradients_and_losses_stay_float32(tiny: MakeSpec) -> None:
    task = build.task(tiny(precision="bfloat16"), CPU)
    model = {name: tensor.requires_grad_() for name, tensor in task.initial().items()}
    batch = task.train[0][:8], task.train[1][:8]
    loss = task.loss(model, batch)
    gradients = torch.autograd.grad(loss, list(model.values()))
    assert {tensor.dtype for tensor in (loss, task.logits(model, batch[0]), *gradients)} == {torch.float32}


def test_what_is_not_built_in_is_refused_before_anything_runs(tiny: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for call in (lambda spec: fitting.check([spec]), lambda spec: build.job(spec, CPU)):
        with pytest.raises(RunError, match="precision: 'bfloat16' is not built into this cpu; use 'float32'"):
            call(tiny(precision="bfloat16"))
        call(tiny())
    with pytest.raises(SpecError, match="precision: 'float16' is unknown; allowed: bfloat16, float32"):
        tiny(precision="float16")
