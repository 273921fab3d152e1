"""The contender `bare`: the benchmark's work as a plain torch loop, the least that a simulator can do.

    python bench/pfl/bare_work.py --processes 2 --rounds 5 --channels-last

Each process trains its share of the cohort and sums the trained weights in memory that the processes share.
"""

import time

import torch
import torch.multiprocessing as mp
import work


def train_share(rank: int, chosen, data, weights, sums, barrier) -> list[float]:
    """Train every `processes`-th client of each round's cohort; returns when training began and each round ended.

    `weights` is the global model, a list of tensors, and `sums[rank]` this process's sum over clients of the trained
    weights times the number of images. Process 0 turns the sums into the next `weights`.
    """
    torch.set_num_threads(1)
    model = work.initial_model(chosen.channels_last)
    parameters = list(model.parameters())
    ends = [time.perf_counter()]
    for cohort in work.cohorts(chosen.rounds):
        barrier.wait()
        for total in sums[rank]:
            total.zero_()
        for client in cohort[rank :: chosen.processes]:
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
            images, labels = data[client]
            for x, y in zip(images.split(work.BATCH), labels.split(work.BATCH), strict=True):
                loss = torch.nn.functional.cross_entropy(model(x), y)
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(gradient, alpha=work.LEARNING_RATE)
            with torch.no_grad():
                for total, parameter in zip(sums[rank], parameters, strict=True):
                    total.add_(parameter, alpha=len(images))
        barrier.wait()
        if rank == 0:
            for weight, *totals in zip(weights, *sums, strict=True):
                weight.copy_(sum(totals) / (work.COHORT * work.IMAGES))
        ends.append(time.perf_counter())
    return ends


def main() -> None:
    chosen = work.options(__doc__)
    data = work.clients(chosen.channels_last)
    model = work.initial_model(chosen.channels_last)
    weights = [parameter.detach().share_memory_() for parameter in model.parameters()]
    sums = [[torch.zeros_like(weight).share_memory_() for weight in weights] for _ in range(chosen.processes)]
    losses = [work.loss_of(model, data)]

    fork = mp.get_context("fork")  # the children see `data` without a copy
    barrier = fork.Barrier(chosen.processes)
    arguments = (chosen, data, weights, sums, barrier)
    others = [fork.Process(target=train_share, args=(rank, *arguments)) for rank in range(1, chosen.processes)]
    for process in others:
        process.start()
    ends = train_share(0, *arguments)
    for process in others:
        process.join()

    losses.append(work.loss_of(model, data))
    work.report("bare", chosen, ends, losses, {})


if __name__ == "__main__":
    main()
