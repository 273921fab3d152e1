"""The mean over clients, and the rules that may stand in its place."""

from typing import Any

import numpy as np
import pytest
import torch
from jobs import message_of
from known_answers import CASES, TINY
from small_task import CPU

from fedlib.core.averaging import RULES, RobustMean, RunningMean
from fedlib.core.client import Reply
from fedlib.core.uploads import Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import SpecError
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec

SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([4])}


def drawn(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def value(mean: Any, rows: list[dict[str, torch.Tensor]], weights: list[int]) -> dict[str, torch.Tensor]:
    for row, weight in zip(rows, weights, strict=True):
        mean.add(row, weight)
    found: dict[str, torch.Tensor] = mean.value()
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10, 21])
@pytest.mark.parametrize("rule", ["median", "trimmed"])
def test_ranks_are_those_of_numpy_whatever_the_samples(count: int, rule: str) -> None:
    rows = drawn(count)
    center = {"a": torch.full((2, 3), 5.0)}
    found = value(RobustMean(rule, SHAPES, center), rows, list(range(1, count + 1)))
    for name in SHAPES:
        stacked = np.sort(np.stack([row[name].double().numpy() for row in rows]), axis=0)
        out = min(max(1, count // 10), (count - 1) // 2)
        expected = np.median(stacked, axis=0) if rule == "median" else stacked[out : count - out].mean(0)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=2e-6)


def test_clipping_by_hand() -> None:
    """Changes from the center of norms 1, 2 and 100: the last becomes 2 long; weights 1, 1 and 2."""
    shapes, center = {"w": torch.Size([2])}, {"w": torch.tensor([10.0, 0.0])}
    rows = [{"w": torch.tensor(row)} for row in ([11.0, 0.0], [10.0, 2.0], [10.0, -100.0])]
    found = value(RobustMean("clipped", shapes, center), rows, [1, 1, 2])["w"]
    assert found.tolist() == pytest.approx([10 + 1 / 4, (2 - 2 * 2) / 4])


def test_where_all_agree_in_length_clipping_is_the_mean() -> None:
    rows = drawn(6)
    for row in rows:
        norm = sum(float(tensor.square().sum()) for tensor in row.values()) ** 0.5
        row.update({name: tensor / norm for name, tensor in row.items()})
    weights = [3, 1, 4, 1, 5, 9]
    found, mean = (value(kind, rows, weights) for kind in (RobustMean("clipped", SHAPES, {}), RunningMean(SHAPES)))
    for name in SHAPES:
        torch.testing.assert_close(found[name], mean[name], rtol=1e-5, atol=1e-7)


AVERAGING = ("fedavg", "drive", "fedcompress", "feddq", "fedmrn", "fedpt", "fedsparsify", "fedzip", "terngrad", "topk")


@pytest.mark.parametrize("name", AVERAGING)
def test_one_client_cannot_move_the_model_far(name: str) -> None:
    """Five clients; the upload of one is that of a client whose model is a thousand times as large, and turned."""
    case = {key: value for key, value in CASES[name].items() if key not in ("feedback", "persistent")}
    spec = Spec.from_dict(TINY | case)
    job, engine = build.job(spec, CPU), InProcess(CPU)
    state = rounds.initial(job)
    message = message_of(job)
    uploads: list[tuple[int, Any]] = []
    for client in range(5):
        upload = engine.client(job, message, 1, client)
        uploads.append((client, upload.upload if isinstance(upload, Reply) else upload))
    local = job.method.begin(message, job.task.shard(4), Rng(0))
    for tensor in local.trainable.values():
        tensor.data.mul_(-1000).add_(1)
    hostile = job.method.upload(local, job.task.held(4), Rng(1))

    def moved(robust: str, last: Any) -> float:
        new = job.method.aggregate(state, Uploads([*uploads[:4], (4, last)], robust=robust))
        differences = [(new.model[key] - state.model[key]).double() for key in new.model]
        return float(sum(d.square().sum() for d in differences)) ** 0.5

    honest, fooled = moved("none", uploads[4][1]), moved("none", hostile)
    for rule in RULES:
        robust = moved(rule, hostile)
        if fooled > 10 * honest:  # masks, and models pruned anew, bound what one client can do by themselves
            assert robust < 3 * honest, rule
        assert robust < 1.1 * fooled, rule


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_cannot_go_with_the_method_is_refused(rule: str) -> None:
    private = CASES["fedpt in private"]
    for case in ({"method": "signvote"}, {"method": "fedpm"}, private):
        with pytest.raises(SpecError, match="whose server takes no mean; use none"):
            Spec.from_dict(TINY | case | {"robust": rule})
    assert Spec.from_dict(TINY | {"robust": rule}).robust == rule
