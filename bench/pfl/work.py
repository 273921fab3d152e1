"""The work that every contender does, and the form in which each reports it.

It is the speed benchmark of Apple's pfl (https://github.com/apple/pfl-research, CIFAR10): a round is 50 of 1,000
clients with 50 images each, one epoch of SGD at batch 10. Dropout is left out, and the images are made up, of CIFAR10's
shape. The cohorts and the initial weights are fixed, so that all contenders must end at the same loss.
"""

import argparse
import itertools
import json
import os
import platform
import statistics

import torch
from torch import nn

CLIENTS, COHORT, IMAGES, BATCH, CLASSES = 1000, 50, 50, 10, 10
LEARNING_RATE = 0.1  # of the clients; the server takes the mean of their weights
PARAMETERS = 1_626_442
WARM_UP = 1  # rounds left out of the timing


class CNN(nn.Sequential):
    """The benchmark's network; maps images (n, 3, 32, 32) to scores (n, 10)."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12544, 128),
            nn.ReLU(),
            nn.Linear(128, CLASSES),
        )


def options(description: str) -> argparse.Namespace:
    """The command line that all contenders share; limits torch to one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--processes", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--rounds", type=int, default=5, help=f"rounds timed, after {WARM_UP} for warming up")
    parser.add_argument("--channels-last", action="store_true", help="images and weights in that memory layout")
    torch.set_num_threads(1)
    return parser.parse_args()


def layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def initial_model(channels_last: bool) -> CNN:
    torch.manual_seed(0)
    return CNN().to(memory_format=layout(channels_last))


def clients(channels_last: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (50, 3, 32, 32) and labels (50,) of each client: a picture per class under unit noise."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (CLIENTS * IMAGES,), generator=draw)
    pictures = torch.randn(CLASSES, 3, 32, 32, generator=draw)
    images = torch.randn(CLIENTS * IMAGES, 3, 32, 32, generator=draw)
    for start in range(0, len(images), IMAGES):
        images[start : start + IMAGES] += 0.3 * pictures[labels[start : start + IMAGES]]
    images = images.contiguous(memory_format=layout(channels_last))
    return list(zip(images.split(IMAGES), labels.split(IMAGES), strict=True))


def cohorts(rounds: int) -> list[list[int]]:
    """The clients of each round, warm-up rounds first."""
    draw = torch.Generator().manual_seed(2)
    return [torch.randperm(CLIENTS, generator=draw)[:COHORT].tolist() for _ in range(WARM_UP + rounds)]


@torch.no_grad()
def loss_of(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss over the first twenty clients: the check that a contender trained, and trained as the others did."""
    losses = [nn.functional.cross_entropy(model(images), labels) for images, labels in data[:20]]
    return torch.stack(losses).mean().item()


def report(name: str, chosen: argparse.Namespace, ends: list[float], losses: list[float], versions: dict) -> None:
    """Print the contender's result as one line of JSON.

    `ends` are the times at which training began and each round ended, in seconds; `losses` those before and after.
    """
    seconds = [end - start for start, end in itertools.pairwise(ends)][WARM_UP:]
    result = {
        "channels_last": chosen.channels_last,
        "contender": name,
        "loss_after": losses[1],
        "loss_before": losses[0],
        "processes": chosen.processes,
        "seconds_of_rounds": seconds,
        "seconds_per_round": statistics.median(seconds),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
    }
    print(json.dumps(result, sort_keys=True), flush=True)


def one_thread_environment() -> dict[str, str]:
    """This process's environment, with one thread for each process to come and no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
