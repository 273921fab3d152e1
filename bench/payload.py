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
from fedlib.engines import in_process
from fedlib.methods import registry
from fedlib.rng import Rng
from fedlib.wire import container


def main() -> None:
    table = {}
    for label, method, hyper in (("fedavg", "fedavg", {}), ("fedmrn", "fedmrn", {"mask": "binary"})):
        task = in_process.task_of(spec(method, hyper, "cnn4").key(), torch.device("cpu"))
        module, settings = registry.METHODS[method], registry.hyper(method, hyper)
        message = module.broadcast(task.initial(), settings, task)
        upload = module.finish(*module.start(message, settings, task, Rng(0)), 600, settings, task, Rng(0))
        module.server(task.initial(), Uploads([(0, upload)]), settings, task)  # reads it back, or raises
        sizes = container.section_sizes(upload)
        table[label] = dict(zip(module.SECTIONS, sizes, strict=True))
        table[label] |= {"container": len(upload) - sum(sizes), "whole": len(upload), "downlink": len(message)}
        print(label, ", ".join(f"{part} {size:,}" for part, size in table[label].items()), "bytes")
    d = count(task.weights)
    ratio = table["fedavg"]["whole"] / table["fedmrn"]["whole"]
    met = table["fedmrn"]["mask"] == -(-d // 8) and table["fedmrn"]["container"] <= 64 and ratio >= 27
    print(f"d = {d:,}; FedAvg's upload is {ratio:.2f} times as large; targets {'met' if met else 'MISSED'}")
    save("payload", {"uploads": table, "ratio": round(ratio, 3), "weights": d})


if __name__ == "__main__":
    main()
