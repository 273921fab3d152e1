"""The contender `pfl`: the benchmark's work through Apple's simulator, called as its own benchmarks call it.

    .cache/pfl-venv/bin/python bench/pfl/pfl_work.py --processes 2 --rounds 5

Runs in pfl's own environment (`run.py` makes it) and starts itself again under torchrun, pfl's way to several
processes. Users are evaluated in the warm-up round alone, where pfl cannot leave it out. No weighting by images: all
clients have as many.
"""

import itertools
import os
import sys
import time
from importlib.metadata import version

import torch
import work
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class Clock(TrainingProcessCallback):
    """Notes when training begins and when each round ends."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *, model):
        self.ends.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.ends.append(time.perf_counter())
        return False, Metrics()


class PflCNN(work.CNN):
    """The network with the two methods by which pfl trains and evaluates."""

    def loss(self, images, labels):
        return torch.nn.functional.cross_entropy(self(images), labels)

    @torch.no_grad()
    def metrics(self, images, labels):
        return {"loss": Weighted(self.loss(images, labels).item() * len(images), len(images))}


def restart_under_torchrun(processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    os.execve(sys.executable, launcher + sys.argv, work.one_thread_environment())


def main() -> None:
    chosen = work.options(__doc__)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        restart_under_torchrun(chosen.processes)
    data = work.clients(chosen.channels_last)
    cohorts = work.cohorts(chosen.rounds)
    network = PflCNN().to(memory_format=work.layout(chosen.channels_last))
    network.load_state_dict(work.initial_model(chosen.channels_last).state_dict())
    losses = [work.loss_of(network, data)]

    users = [Dataset(images_and_labels, user_id=str(client)) for client, images_and_labels in enumerate(data)]
    sampler = itertools.chain.from_iterable(cohorts)
    federated = FederatedDataset(users.__getitem__, lambda: next(sampler))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=len(cohorts),
            evaluation_frequency=len(cohorts),
            train_cohort_size=work.COHORT,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=federated, val_data=federated),
        model=PyTorchModel(
            network,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.LEARNING_RATE, local_batch_size=work.BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    assert pytorch_ops.distributed.world_size == chosen.processes
    losses.append(work.loss_of(network, data))
    if pytorch_ops.distributed.global_rank == 0:
        work.report("pfl", chosen, clock.ends, losses, {"pfl": version("pfl")})


if __name__ == "__main__":
    main()
