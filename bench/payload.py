"""Bytes of one upload of CNN4 on 28x28 grey images, FedMRN beside FedAvg, measured on messages that are read back.

    python bench/payload.py

Targets: ceil(d/8) mask bytes, 8 bytes of seed, 7,680 bytes in full precision, at most 64 bytes of container; the whole
at least 27 times below FedAvg's upload.
"""

import torch
from local_training import spec
from report import save

from fedlib.core.plan import count
from fedlib.core.uploads import Uploads
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.wire import container


def main() -> None:
    table = {}
    for label, method, hyper in (("fedavg", "fedavg", {}), ("fedmrn", "fedmrn", {"mask": "binary"})):
        job = build.job(spec(method, hyper, "cnn4"), torch.device("cpu"))
        own, task, state = job.method, job.task, rounds.initial(job)
        message = own.broadcast(state)
        upload = own.upload(own.begin(message, task.shard(0), Rng(0)), task.held(0), Rng(0))
        own.aggregate(state, Uploads([(0, upload)]))  # reads it back, or raises
        sizes = container.section_sizes(upload)
        table[label] = dict(zip(own.sections, sizes, strict=True))
        table[label] |= {"container": len(upload) - sum(sizes), "whole": len(upload), "downlink": len(message)}
        print(label, ", ".join(f"{part} {size:,}" for part, size in table[label].items()), "bytes")
    d = count(task.weights)
    ratio = table["fedavg"]["whole"] / table["fedmrn"]["whole"]
    met = table["fedmrn"]["mask"] == -(-d // 8) and table["fedmrn"]["container"] <= 64 and ratio >= 27
    print(f"d = {d:,}; FedAvg's upload is {ratio:.2f} times as large; targets {'met' if met else 'MISSED'}")
    save("payload", {"uploads": table, "ratio": round(ratio, 3), "weights": d})


if __name__ == "__main__":
    main()
