"""A look inside clients while a run goes on: what travels is measured by the record, this is what does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from fedlib.core.client import train
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Uploads
from fedlib.engines.in_process import InProcess, task_of
from fedlib.methods import fedmrn, registry
from fedlib.rng import Rng
from fedlib.runs.rounds import draw_cohort, one_round
from fedlib.runs.spec import Spec


def inside(specs: Sequence[Spec], edges: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run FedMRN specs and look: shares of u / n between `edges` in the first and last round; share of ones by round.

    The ratios are those at the end of local training, all weights of all clients; values outside fall into the end
    bins. Ones (+1 where signed) are counted in the masks as uploaded, mean over clients.
    """
    ratios, ones = [], []
    for spec in specs:
        for number, counts, share in _rounds(spec, edges):
            ones.append({"method": spec.label, "round": number, "share of ones": share})
            if number in (1, spec.rounds):
                column = {"u / n": (edges[:-1] + edges[1:]) / 2, "share of entries": counts / counts.sum()}
                ratios.append(pd.DataFrame({"method": spec.label, "round": number} | column))
    return pd.concat(ratios, ignore_index=True), pd.DataFrame(ones)


def _rounds(spec: Spec, edges: np.ndarray) -> Iterator[tuple[int, np.ndarray, float]]:
    task, hyper = task_of(spec.key(), torch.device("cpu")), registry.hyper(spec.method, spec.hyper)
    state = registry.initial(spec, task)
    for number in range(1, spec.rounds + 1):
        message = fedmrn.broadcast(state, hyper, task)
        uploads, counts, ones = [], np.zeros(len(edges) - 1), []
        for client in draw_cohort(spec, task, number):
            rng, shard = Rng(spec.seed).child("client", number, client), task.shard(client)
            trainable, frozen = fedmrn.start(message, hyper, task, rng)
            train(fedmrn, trainable, frozen, shard, hyper, task, rng)
            upload = fedmrn.finish(trainable, frozen, len(shard[0]), hyper, task, rng)
            ratio = (trainable["u"].detach() / frozen["n"]).clamp(float(edges[0]), float(edges[-1])).numpy()
            counts += np.histogram(ratio, edges)[0]
            update = fedmrn.sent(upload, frozen, hyper, task)
            ones.append(float((update / frozen["n"] > 0.5).float().mean()))
            uploads.append((client, upload))
        state = fedmrn.server(state, Uploads(uploads), hyper, task)
        yield number, counts, float(np.mean(ones))


def gradient_noise(spec: Spec, every: int, batches: int = 40) -> pd.DataFrame:
    """Run a FedDQ spec, and measure the noise of a mini-batch's gradient at the model of every so many rounds.

    sigma: the root of E ||g - mean g||^2 over `batches` batches, all parameters together. guide: 1.5 eta sigma
    sqrt(tau / d), the resolution whose quantization noise is as large as that of sampling; eta is lr / (1 - momentum).
    """
    task = task_of(spec.key(), torch.device("cpu"))
    state, engine, rows = registry.initial(spec, task), InProcess(torch.device("cpu")), []
    for number in range(1, spec.rounds + 1):
        if number == 1 or number % every == 0:
            sigma = _noise(spec, task, state, number, batches)
            size, steps = (
                sum(shape.numel() for shape in task.parameters.values()),
                task.plan.steps(len(task.shard(0)[1])),
            )
            guide = 1.5 * spec.lr / (1 - spec.momentum) * sigma * (steps / size) ** 0.5
            rows.append({"round": number, "sigma": sigma, "guide": guide})
        state, _ = one_round(spec, task, engine, state, number, {})
    return pd.DataFrame(rows)


def _noise(spec: Spec, task: Task, state: State, number: int, batches: int) -> float:
    model = {name: state[name].detach().requires_grad_() for name in task.parameters}
    generator, gradients = Rng(spec.seed).child("noise", number).torch(), []
    for _ in range(batches):
        index = torch.randint(len(task.train[1]), (spec.batch,), generator=generator)
        loss = task.loss(model, (task.train[0][index], task.train[1][index]))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.values()))]))
    return float(torch.stack(gradients).var(dim=0).sum().sqrt())
