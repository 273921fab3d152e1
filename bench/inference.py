"""Inference of clustered networks beside plain ones, in float32 and in int8: time, bytes of a file, time to load it.

    python bench/inference.py     prints the tables and writes bench/results/inference.json

No target. A summary of FedCompress' paper has it that clustering makes inference on edge devices faster, as REPORTED
says. Measured are CPU seconds of one thread, all variants in turns, with random weights:

    dense         the network in float32
    folded        each BatchNorm multiplied into the convolution before it, which quantization does anyhow
    int8 linear   dynamic quantization, which torch has for linear layers only: here just the last of all layers
    int8          static quantization, convolutions too, by torch.ao.quantization, which torch has announced to drop
    clustered     these four again, of a network whose kernels have 16 values each; they are kernels like any others
    looked up     clustered kernels kept as codebook and one-byte indexes, put together in every call
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time

import torch
from report import save
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx
from torch.func import functional_call

from fedlib.methods.fedcompress import clustering
from fedlib.methods.messages import pack_tensors, unpack_tensors
from fedlib.models.registry import build
from fedlib.rng import Rng
from fedlib.wire import codebook, container

CLUSTERS, TURNS, BATCHES = 16, 15, (1, 64)
REPORTED = {"float32": 1.15, "quantized": 1.24}  # at most
CASES = (("resnet20", (1, 28, 28)), ("resnet20", (3, 32, 32)), ("mobilenet-quarter", (1, 98, 40)))


class LookedUp(nn.Module):
    """A network whose clustered kernels are made anew in every call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.parts = network, {}
        for name in kernels(network):
            book, index = codebook.split(network.get_parameter(name).numpy())
            self.parts[name] = torch.from_numpy(book), torch.from_numpy(index), network.get_parameter(name).shape

    def forward(self, x: Tensor) -> Tensor:
        made = {n: book.index_select(0, index.int()).view(shape) for n, (book, index, shape) in self.parts.items()}
        return functional_call(self.network, made, (x,))


def kernels(network: nn.Module) -> list[str]:
    """Those that FedCompress clusters."""
    return [f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]


def built(model: str, shape: tuple[int, int, int]) -> nn.Module:
    """BatchNorm without a scale gets one of 1: torch's quantization knows no other."""
    network = build(model, shape[0], shape[1], 10, Rng(0))
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d) and layer.weight is None:
            plain = nn.BatchNorm2d(layer.num_features, layer.eps)
            plain.load_state_dict(layer.state_dict() | {"weight": torch.ones(layer.num_features)})
            network.set_submodule(name, plain)
    return network.eval().requires_grad_(False)


def variants(model: str, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
    dense, clustered = built(model, shape), built(model, shape)
    for name in kernels(clustered):
        kernel = clustered.get_parameter(name)
        kernel.copy_(clustering.clustered(kernel, torch.from_numpy(clustering.seeds(kernel, CLUSTERS, Rng(9)))))
    found: dict[str, nn.Module] = {"dense": dense, "clustered": clustered, "looked up": LookedUp(clustered)}
    examples, mapping = torch.randn(64, *shape), get_default_qconfig_mapping("x86")
    for prefix, network in (("", dense), ("clustered, ", clustered)):
        network.to(memory_format=torch.channels_last)
        with warnings.catch_warnings():  # that these functions and types will go
            warnings.simplefilter("ignore")
            found[f"{prefix}folded"] = fuse_fx(network)
            found[f"{prefix}int8 linear"] = quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
            prepared = prepare_fx(network, mapping, (examples,))
            prepared(examples)  # finds the range of what enters each layer
            found[f"{prefix}int8"] = convert_fx(prepared)
    return found


def turns(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Median CPU ms of each call, and the median over turns of its ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            call()  # warms what the other variants have left cold
            begin = process_time()
            call()
            seconds[name].append(process_time() - begin)
    first, found = next(iter(seconds.values())), {}
    for name, own in seconds.items():
        ratio = median(mine / other for mine, other in zip(own, first, strict=True))
        found[name] = {"ms": round(1000 * median(own), 3), "ratio": round(ratio, 3)}
    return found


def files(found: dict[str, nn.Module], folder: Path) -> dict[str, dict[str, float]]:
    """Bytes of files, torch's and one coded as messages are, and ms from each to a network with its numbers."""
    tensors = {name: t for name, t in found["clustered"].state_dict().items() if t.dtype == torch.float32}
    coded = {name: tensors[name].shape for name in kernels(found["clustered"])}
    others = {name: tensor.shape for name, tensor in tensors.items() if name not in coded}
    sections = [*codebook.encode([tensors[name].numpy() for name in coded]), pack_tensors(tensors, others)]
    (folder / "coded").write_bytes(container.pack("bench", bytes(8), 0, sections))
    sizes, limits = [shape.numel() for shape in coded.values()], [len(memoryview(part)) for part in sections]
    calls: dict[str, Callable[[], object]] = {}
    for name in ("dense", "int8"):
        torch.save(found[name].state_dict(), folder / name)
        calls[name] = functools.partial(lambda name: found[name].load_state_dict(torch.load(folder / name)), name)

    def decode() -> None:
        read = container.unpack((folder / "coded").read_bytes(), "bench", bytes(8), limits).sections
        arrays = codebook.decode(read[0], read[1], sizes)
        made = {n: torch.from_numpy(array).view(coded[n]) for n, array in zip(coded, arrays, strict=True)}
        found["clustered"].load_state_dict(made | unpack_tensors(read[2], others))

    calls["coded"] = decode
    return {name: {"bytes": (folder / name).stat().st_size} | row for name, row in turns(calls).items()}


def main() -> None:
    torch.set_num_threads(1)
    rows, kept = [], []
    for model, shape in CASES:
        found, labels = variants(model, shape), {"network": model, "shape": shape}
        for batch in BATCHES:
            x = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                times = turns({name: functools.partial(network, x) for name, network in found.items()})
            rows.append(labels | {"batch": batch, "variants": times})
            print(rows[-1], flush=True)
        with TemporaryDirectory() as folder:
            kept.append(labels | {"files": files(found, Path(folder))})
        print(kept[-1], flush=True)
    save("inference", {"clusters": CLUSTERS, "turns": TURNS, "reported": REPORTED, "times": rows, "files": kept})


if __name__ == "__main__":
    main()
