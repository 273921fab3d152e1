"""A look inside clients while a run goes on: what travels is measured by the record, this is what does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from fedlib.core.client import Job, Member, train, walk
from fedlib.core.method import AnyMethod, Phase, ServerState
from fedlib.core.plan import Tensors
from fedlib.core.uploads import Uploads
from fedlib.engines.in_process import InProcess
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.runs.rounds import broadcast, draw_cohort, initial, one_round
from fedlib.runs.spec import Spec

CPU = torch.device("cpu")


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
    job = build.job(spec, CPU)
    state = initial(job)
    for number in range(1, spec.rounds + 1):
        trained: dict[int, Member] = {}

        def fit(method: AnyMethod, phase: Phase, members: Sequence[Member]) -> None:
            train(method, phase, members)
            trained.update({member.client: member for member in members})  # noqa: B023 (called within this round)

        message, cohort = broadcast(job.method, state, number), draw_cohort(spec, job.task, number)
        counts, ones, uploads = np.zeros(len(edges) - 1), [], []
        for who in cohort:
            ((_, upload),) = walk(job, message, number, [who], None, fit)
            assert isinstance(upload, bytes)
            local = trained.pop(who).local
            u, n = local.trainable["u"].detach(), local.frozen["n"]
            counts += np.histogram((u / n).clamp(float(edges[0]), float(edges[-1])).numpy(), edges)[0]
            ones.append(float((job.method.sent(upload, local) / n > 0.5).float().mean()))
            uploads.append((who, upload))
        state = job.method.aggregate(state, Uploads(uploads))
        yield number, counts, float(np.mean(ones))


def gradient_noise(spec: Spec, every: int, batches: int = 40) -> pd.DataFrame:
    """Run a FedDQ spec, and measure the noise of a mini-batch's gradient at the model of every so many rounds.

    sigma: the root of E ||g - mean g||^2 over `batches` batches, all parameters together. guide: 1.5 eta sigma
    sqrt(tau / d), the resolution whose quantization noise is as large as that of sampling; eta is lr / (1 - momentum).
    """
    job, engine, rows = build.job(spec, CPU), InProcess(CPU), []
    state = initial(job)
    size = sum(shape.numel() for shape in job.task.parameters.values())
    steps = job.task.plan.steps(len(job.task.shard(0)[1]))
    for number in range(1, spec.rounds + 1):
        if number == 1 or number % every == 0:
            sigma = _noise(spec, job, state, number, batches)
            guide = 1.5 * spec.lr / (1 - spec.momentum) * sigma * (steps / size) ** 0.5
            rows.append({"round": number, "sigma": sigma, "guide": guide})
        state, _ = one_round(spec, job, engine, state, number, {})
    return pd.DataFrame(rows)


def _noise(spec: Spec, job: Job, state: ServerState[object], number: int, batches: int) -> float:
    task = job.task
    model = {name: state.model[name].detach().requires_grad_() for name in task.parameters}
    generator, gradients = Rng(spec.seed).child("noise", number).torch(), []
    for _ in range(batches):
        index = torch.randint(len(task.train[1]), (spec.batch,), generator=generator)
        loss = task.loss(model, (task.train[0][index], task.train[1][index]))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.values()))]))
    return float(torch.stack(gradients).var(dim=0).sum().sqrt())


def follow_client(job: Job, client: int = 0) -> tuple[list[tuple[str, Tensors]], bytes]:
    """Tensors of a FedCompress client in round 1 by moment (as received, after ordinary epochs, after clustered ones),
    and its upload."""
    seen: list[tuple[str, Tensors]] = []

    def see(moment: str, member: Member) -> None:
        seen.append((moment, {name: tensor.detach().clone() for name, tensor in member.local.trainable.items()}))

    def fit(method: AnyMethod, phase: Phase, members: Sequence[Member]) -> None:
        if not seen:
            see("as received", members[0])
        train(method, phase, members)
        see("after ordinary epochs" if len(seen) == 1 else "after clustered epochs", members[0])

    ((_, upload),) = walk(job, broadcast(job.method, initial(job), 1), 1, [client], None, fit)
    assert isinstance(upload, bytes)
    return seen, upload
