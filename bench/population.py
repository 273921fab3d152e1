"""Does a round cost more when more clients exist? A cohort of ten out of 100 and out of 100,000, time and peak memory.

    python bench/population.py

Each size runs in processes of its own, in turns, because peak memory is a process's. Target: within 10 % of each other.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

REPEATS, ROUNDS, SIZES = 3, 12, (100, 100_000)


def one(clients: int) -> dict[str, float]:
    from fedlib.engines import select
    from fedlib.runs import build, rounds
    from fedlib.runs.spec import Spec

    labels = dict(
        paper="bench", profile="smoke", name="population", group="population", label="fedmrn", split="resampled"
    )
    settings = dict(cohort=10, rounds=ROUNDS, epochs=1, batch=16, lr=0.1, evaluate_every=ROUNDS, seed=0)
    spec = Spec(
        **labels, **settings, clients=clients, data="digits", model="mlp", method="fedmrn", hyper={},
        partition={"kind": "resampled", "seed": 0, "size": 256},
    )  # fmt: skip
    seconds = []
    with select.open_engine("process", "cpu") as engine:
        job = build.job(spec, engine.device)
        state = rounds.initial(job)
        for number in range(1, ROUNDS + 1):
            begin = time.process_time()
            state, _ = rounds.one_round(spec, job, engine, state, number, {})
            seconds.append(time.process_time() - begin)
    return {
        "ms_per_round": 1000 * statistics.median(seconds[1:-1]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    clients = parser.parse_args().clients
    if clients:
        print(json.dumps(one(clients)))
        return
    from report import save

    measured: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    for _ in range(REPEATS):
        for size in SIZES:
            command = [sys.executable, __file__, "--clients", str(size)]
            measured[size].append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
    best = {size: {key: min(run[key] for run in runs) for key in runs[0]} for size, runs in measured.items()}
    for size, row in best.items():
        print(f"{size:7,} clients, 10 a round: {row['ms_per_round']:7.1f} ms a round, peak {row['peak_mb']:.0f} MB")
    small, large = best[SIZES[0]], best[SIZES[1]]
    ratios = {key: round(large[key] / small[key], 3) for key in small}
    print(
        f"ratios, 100,000 to 100 clients: time {ratios['ms_per_round']}, memory {ratios['peak_mb']}; target 0.9 to 1.1"
    )
    save("population", {"clients": {f"{size}": row for size, row in best.items()}, "ratios": ratios})


if __name__ == "__main__":
    main()
