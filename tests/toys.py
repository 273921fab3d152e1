"""A task around a network that a test makes for itself: no data, and no partition worth the name."""

import numpy as np
import torch
from torch import nn

from fedlib.core.plan import Plan
from fedlib.core.task import Task
from fedlib.data.partition import Partition


def make_task(network: nn.Module, plan: Plan) -> Task:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
    parameters = {name: p.shape for name, p in network.named_parameters()}
    none = (torch.zeros(0), torch.zeros(0))
    return Task(
        network=network,
        weights={name: shape for name, shape in parameters.items() if len(shape) > 1},
        vectors={name: shape for name, shape in parameters.items() if len(shape) == 1},
        statistics={name: b.shape for name, b in network.named_buffers()},
        plan=plan,
        train=none,
        test=none,
        partition=Partition.of([np.arange(0)]),
        device=torch.device("cpu"),
    )
