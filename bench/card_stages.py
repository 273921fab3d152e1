"""The stages of first_card.py; each gets the rows that it fills, the device and the folder for what it keeps.

python bench/card_stages.py STAGE cuda|cpu FOLDER
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import card_steps
import engine_tasks
import torch
from card_rows import Rows, settled, small, stand_in, timed
from jobs import job_of, message_of
from known_answers import QUICK, TINY
from torch import Tensor

from fedlib import rng
from fedlib.core import client
from fedlib.core.client import Job
from fedlib.core.uploads import Uploads
from fedlib.engines.automatic import Fastest
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError
from fedlib.rng import Rng
from fedlib.runs import experiments, record, rounds
from fedlib.runs.digest import code_of
from fedlib.runs.machine import processor
from fedlib.runs.spec import Spec

PACKAGES = (
    *("torch", "torchvision", "numpy", "triton", "pydantic", "ruamel.yaml", "safetensors", "cloudpickle", "xxhash"),
    *("scipy", "scikit-learn", "pandas", "tqdm", "constriction", "dp-accounting", "pytest", "pfl"),
)
# What travels as a seed, as in tests/test_rng.py: the first digits of SHA-256 of 100,003 draws.
KNOWN = {
    **{"words": "b1f8b869e7ca73d7", "uniform": "302f9febbd0f4407"},
    **{"signs": "e9b26a5baa68b6d4", "normal": "6e39eef09948364f"},
}
ENGINES: dict[str, Callable[[torch.device], InProcess]] = {"process": InProcess, "graphed": Graphed, "stacked": Stacked}


def chosen(paper: str, name: str, device: torch.device, **changes: Any) -> Spec:
    (spec,) = experiments.specs(paper, "paper", name)
    return small(spec, device, **changes)


def versions(rows: Rows, device: torch.device, out: Path) -> None:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    rows.add("versions", python=platform.python_version(), **found)
    rows.add("cpu", processor=processor(), cores=len(os.sched_getaffinity(0)))
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    rows.add(
        "flags",
        cuda=torch.version.cuda,
        cudnn=cudnn.version(),
        cudnn_tf32=cudnn.allow_tf32,
        matmul_tf32=matmul.allow_tf32,
        matmul_precision=torch.get_float32_matmul_precision(),
        cudnn_benchmark=cudnn.benchmark,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    for module in ("fedlib.engines.select", "fedlib.runs.grid", "fedlib.claims.results", "fedlib.own.federate"):
        with rows.attempt(f"import {module}"):
            importlib.import_module(module)
            rows.add(f"import {module}", works=True)
    if device.type == "cpu":
        rows.add("card", skipped="--device cpu")
        return
    card = torch.cuda.get_device_properties(device)
    rows.add(
        "card",
        card=card.name,
        capability=f"{card.major}.{card.minor}",
        processors=card.multi_processor_count,
        bytes=card.total_memory,
        free=torch.cuda.mem_get_info()[0],
        count=torch.cuda.device_count(),
    )
    with rows.attempt("driver"):
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        rows.add("driver", said=subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())


def steps(rows: Rows, device: torch.device, out: Path) -> None:
    """The largest client in batches of 32: plain steps, a capture, replays, and mostly a shorter last batch."""
    for name, setting in engine_tasks.SETTINGS.items():
        with rows.attempt(name), engine_tasks.small_world():
            changes = engine_tasks.UNEQUAL | {"batch": 32, "epochs": 1} | setting
            job = job_of(Spec.from_dict(TINY | changes | {"model": engine_tasks.fits(setting)}), device)
            graphed = Graphed(device)
            largest = max(range(10), key=job.task.count_samples)
            upload = graphed.client(job, message_of(job), 1, largest)
            if isinstance(upload, PayloadError):
                raise upload
            graphs = sum(len(step.graphs) for step in graphed.steps.values())
            if device.type == "cuda" and not graphs:
                raise RuntimeError("no step was captured")
            rows.add(name, graphs=graphs)


def tests(rows: Rows, device: torch.device, out: Path) -> None:
    """As tests/engines/test_gpu_steps.py has it: the engines against the reference, relative to what training moved."""
    card_steps.precision("ieee")
    all_found: dict[str, list[float]] = {"graphed": [], "stacked": []}
    # The model with convolutions first: on a machine that is slow, it alone is done in time.
    for model in ("mlp",) if device.type == "cpu" else ("slice", "biased", "mlp"):
        for name, setting in engine_tasks.SETTINGS.items():
            for kind, batch in (("graphed", 16), ("stacked", 76)):
                label = f"{kind}, {model}, {name}"
                with rows.attempt(label), engine_tasks.small_world(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    changes = engine_tasks.UNEQUAL | setting | {"batch": batch}
                    job = job_of(Spec.from_dict(TINY | changes | {"model": engine_tasks.fits(setting, model)}), device)
                    before, expected = engine_tasks.trained(job, InProcess(device), 1, engine_tasks.COHORT)
                    _, found = engine_tasks.trained(job, ENGINES[kind](device), 1, engine_tasks.COHORT)
                    apart = [engine_tasks.distance(*three) for three in zip(found, expected, before, strict=True)]
                    all_found[kind] += apart
                    passed = max(apart) < engine_tasks.TOLERANCE
                    rows.add(label, median=statistics.median(apart), worst=max(apart), passed=passed)
        for kind, apart in all_found.items():  # after each model, should the time not suffice for the next
            if apart:
                median, rough = statistics.median(apart), sum(d >= engine_tasks.ROUNDING for d in apart)
                rows.add(f"all, {kind}", median=median, worst=max(apart), clients=len(apart), above_rounding=rough)


def draws(rows: Rows, device: torch.device, out: Path) -> None:
    for name, expected in KNOWN.items():
        array = getattr(rng, name)(20240806, 7, 100_003)
        found = hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()[:16]
        rows.add(name, digest=found, as_stored=found == expected)
    with rows.attempt("kernel"):
        from fedlib import philox_kernel  # needs Triton, which may be absent

        begin = settled(device)
        philox_kernel.check(device, rng._on_cpu)
        rows.add("kernel", equals_numpy=True, seconds=round(settled(device) - begin, 3))
    here, there = Rng(7).stream(), Rng(7).stream(device)
    for count in (1, 15, 100_003, 389_920):
        same = torch.equal(here.uniform(count), there.uniform(count).cpu())
        row: dict[str, Any] = {
            "equal": same,
            "kernel": device.type == "cuda" and rng._on_gpu(device) is not rng._on_cpu,
        }
        for place, stream in (("cpu", here), ("device", there)):
            spent = [timed(device, lambda s=stream, n=count: s.uniform(n)) for _ in range(9)]  # type: ignore[misc]
            row[f"{place}_ms"] = round(1000 * statistics.median(spent), 3)
        rows.add(f"{count} draws", **row)


def cnn4(rows: Rows, device: torch.device, out: Path) -> None:
    """FedMRN's clients through each engine, then the bare step. First calls hold captures and the tries of cuDNN."""
    job = job_of(chosen("fedmrn", "main_fedmrn-binary_iid_seed0", device, epochs=1), device)
    message, cohort = message_of(job), list(range(2 if device.type == "cpu" else 4))
    images = sum(job.task.count_samples(number) for number in cohort)
    few = device.type == "cpu"
    layouts, precisions, tried = (
        (["channels_last"], ["ieee"], [False]) if few else ([*card_steps.LAYOUTS], ["ieee", "tf32"], [False, True])
    )
    for layout, name, tuned, kind in itertools.product(layouts, precisions, tried, ENGINES):
        label = f"{kind}, {layout}, {name}, cudnn.benchmark {'on' if tuned else 'off'}"
        with rows.attempt(label):
            card_steps.precision(name)
            torch.backends.cudnn.benchmark = tuned
            x, y = job.task.train
            task = dataclasses.replace(
                job.task, train=(x.contiguous(memory_format=card_steps.LAYOUTS[layout]), y)
            )  # the images alone: weights keep the layout that the broadcast gives them
            own = dataclasses.replace(job, method=job.method.bind(task))
            with ENGINES[kind](device) as engine:

                def turn(engine: InProcess = engine, own: Job = own) -> None:
                    list(engine.train(own, message, 1, cohort))

                first, *others = [timed(device, turn) for _ in range(2 if few else 4)]
            seconds = statistics.median(others)
            rows.add(
                label,
                images_per_s=round(images / seconds),
                ms_a_client=round(1000 * seconds / len(cohort), 1),
                first_s=round(first, 2),
            )
    card_steps.measure(rows, device)


def host(rows: Rows, device: torch.device, out: Path) -> None:
    """Wall milliseconds a client, with one client's training in between for comparison."""
    fedpm = "main_fedpm_iid_seed0"
    three = {
        "fedavg cnn2": chosen("fedmrn", "main_fedavg_iid_seed0", device, data="cifar10-jpeg", model="cnn2", epochs=1),
        "fedmrn cnn4": chosen("fedmrn", "main_fedmrn-binary_iid_seed0", device, epochs=1),
        "fedpm conv4": chosen("fedsparse", fedpm, device, data="fashion-mnist", model="conv4", epochs=1),
    }
    for name, spec in three.items():
        with rows.attempt(name):
            job, engine = job_of(spec, device), Graphed(device)
            state, method = rounds.initial(job), job.method
            message = rounds.broadcast(method, state, 1)
            spent: dict[str, list[float]] = {"begin": [], "train": [], "finish": []}
            uploads: list[tuple[int, Any]] = []
            for number in range(3 if device.type == "cpu" else 10):
                times = [settled(device)]
                member = client.begin(job, message, 1, number, None)
                times.append(settled(device))
                for place, phase in enumerate(method.phases()):
                    client.enter(member, place, phase)
                    engine.fit(method, phase, [member])
                times.append(settled(device))
                uploads.append((number, client.finish(method, member, 1)))
                times.append(settled(device))
                for part, (start, end) in zip(spent, itertools.pairwise(times), strict=True):
                    spent[part].append(end - start)
            received = Uploads(iter(uploads), None, job.task.count_samples, round=1)
            begin = settled(device)
            method.aggregate(state, received)
            server = settled(device) - begin
            row = {f"{part}_ms": round(1000 * statistics.median(all_[1:]), 2) for part, all_ in spent.items()}
            rows.add(name, **row, server_ms=round(1000 * server / len(uploads), 2), images=job.task.count_samples(0))


def keep(rows: Rows, device: torch.device, out: Path) -> None:
    """One of the paper's runs to its end; if it is cut off, its checkpoint under `record` goes on."""
    card_steps.precision("ieee")
    spec, root = chosen("fedmrn", "main_fedmrn-binary_iid_seed0", device), out / "record"
    with rows.attempt("run"), Graphed(device) as engine:
        code_of(spec)  # if this fails, then before the run
        made = rounds.run(spec, engine, root=root)
        made_up = sum(1 for name in rows.found if name.startswith("data"))
        final = {name: made["final"][name] for name in ("accuracy", "loss", "uplink_bytes")}
        file = record.save(made, root)
        rows.add(
            "run", **final, **made["made"], rounds=len(made["rounds"]), file=str(file), made_up_data=made_up, tf32=False
        )


def vector(model: dict[str, Tensor]) -> Tensor:
    return torch.cat([model[name].flatten().double() for name in sorted(model)])


def five(rows: Rows, device: torch.device, out: Path) -> None:
    """The same run by each engine: how far its model is from the reference's, by round."""
    card_steps.precision("ieee")
    spec = chosen("fedmrn", "main_fedmrn-binary_iid_seed0", device, epochs=1)
    job, count = job_of(spec, device), 2 if device.type == "cpu" else 5
    start = vector(rounds.initial(job).model)
    reference: list[Tensor] = []
    for kind, make in ENGINES.items():
        with rows.attempt(kind), make(device) as engine:
            state, apart, judged = rounds.initial(job), list[float](), list[Any]()
            begin = settled(device)
            for number in range(1, count + 1):
                state, entry = rounds.one_round(spec, job, engine, state, number, {})
                judged.append([entry["accuracy"], entry["loss"], entry["uplink_bytes"]])
                if kind == "process":
                    reference.append(vector(state.model))
                else:
                    moved = float((reference[number - 1] - start).norm())
                    apart.append(float((vector(state.model) - reference[number - 1]).norm()) / moved)
            rows.add(kind, apart=apart, judged=judged, seconds=round(settled(device) - begin, 2))


def pfl(rows: Rows, device: torch.device, out: Path) -> None:
    """The work of bench/pfl through fedlib's engines. pfl itself: as far as it is there."""
    few = device.type == "cpu"
    data = "cifar10-jpeg"
    if not few:
        sys.path.append(str(Path(__file__).parent / "pfl"))
        importlib.import_module("fedlib_work")  # brings its images
        data = "pfl-work"
    clients, cohort = (20, 2) if few else (1000, 50)
    values = {"data": data, "model": "cnn2", "clients": clients, "cohort": cohort, "batch": 10, "lr": 0.1}
    spec = Spec.from_dict(TINY | values | {"rounds": 99, "evaluate_every": 99})
    job = job_of(spec, device)
    for kind, make in ENGINES.items():
        with rows.attempt(f"fedlib {kind}"), make(device) as engine:
            state, seconds = rounds.initial(job), list[float]()
            for number in range(1, 3 if few else 6):
                begin = settled(device)
                state, _ = rounds.one_round(spec, job, engine, state, number, {})
                seconds.append(round(settled(device) - begin, 4))
            rows.add(f"fedlib {kind}", seconds_a_round=statistics.median(seconds[1:]), all=seconds, cohort=cohort)
    if importlib.util.find_spec("pfl") is None:
        rows.add("pfl", skipped="pfl is not installed")
    elif device.type == "cuda":
        rows.add("pfl", skipped="bench/pfl/pfl_work.py hides the GPU from pfl")
    else:
        rows.add("pfl", skipped="measured by bench/pfl/run.py")


def shapes(rows: Rows, device: torch.device, out: Path) -> None:
    """Two rounds of a run of each other paper, at its sizes."""
    quick = {"hyper": QUICK} if device.type == "cpu" else {}
    asked: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("feddq", "main_feddq_iid_seed0", {}),
        ("fedpt", "main_s234_quota-1_seed0", {"partition": {"kind": "iid", "seed": 0}} if quick else {}),
        ("fedcompress", "main_fedcompress_iid_seed0", quick),
        ("fedsparse", "main_lam-1_iid_seed0", {}),
    )
    for paper, name, changes in asked:
        with rows.attempt(paper), Graphed(device) as engine:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            spec = chosen(paper, name, device, **changes)
            job, seconds = job_of(spec, device), list[float]()
            state = rounds.initial(job)
            for number in (1, 2):
                begin = settled(device)
                state, entry = rounds.one_round(spec, job, engine, state, number, {}, {})
                seconds.append(round(settled(device) - begin, 2))
            held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            rows.add(paper, seconds=seconds, of=spec.rounds, bytes=held, uplink_bytes=entry["uplink_bytes"])


def contest(rows: Rows, device: torch.device, out: Path) -> None:
    """Which engine is kept where clients differ in size, and what each round of trying took."""
    spec = chosen("fedmrn", "main_fedmrn-binary_dirichlet-0.3_seed0", device, epochs=1, evaluate_every=100)
    job = job_of(spec, device)
    state = rounds.initial(job)
    with Fastest([make(device) for make in ENGINES.values()]) as engine:
        for number in range(1, 9):
            begin = settled(device)
            state, entry = rounds.one_round(spec, job, engine, state, number, {})
            seconds = settled(device) - begin
            graphs = sum(len(step.graphs) for e in engine.rivals if isinstance(e, Graphed) for step in e.steps.values())
            images = sum(job.task.count_samples(number) for number in entry["clients"])
            rows.add(f"round {number}", by=engine.name, seconds=round(seconds, 3), images=images, graphs=graphs)


STAGES: dict[str, Callable[[Rows, torch.device, Path], None]] = {
    **{"versions": versions, "steps": steps, "tests": tests, "draws": draws, "cnn4": cnn4, "host": host},
    **{"record": keep, "rounds": five, "pfl": pfl, "shapes": shapes, "contest": contest},
}


def main() -> None:
    name, where, folder = sys.argv[1:]
    device, out = torch.device(where), Path(folder)
    rows = Rows(out / f"{name}.json")
    if device.type == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        rows.add("device", error="torch finds no CUDA device")
        sys.exit(1)
    if name not in ("versions", "draws"):
        stand_in(rows, few=device.type == "cpu")
    STAGES[name](rows, device, out)


if __name__ == "__main__":
    main()
