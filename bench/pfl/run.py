"""Compare fedlib, a bare torch loop and Apple's pfl on the work of pfl's own benchmark (see work.py).

    python bench/pfl/run.py --repeats 5 --rounds 5

The contenders run in turns, so that whatever else the machine does falls on all alike. Prints each one's ratio to the
fastest form of pfl and writes bench/results/pfl.json. On its first call it makes pfl's environment.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import work

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".cache" / "pfl-venv"
RESULT = HERE.parent / "results" / "pfl.json"
LOSS_TOLERANCE = 0.05  # of the fall; float32's rounding, which training magnifies, moved it by 0.01 in four rounds


def pfl_python() -> str:
    """The interpreter of pfl's environment, which is made first unless it holds what requirements.txt says."""
    requirements, installed = HERE / "requirements.txt", ENVIRONMENT / "requirements.txt"
    python = ENVIRONMENT / "bin" / "python"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        base = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
        if base is None:
            raise SystemExit("pfl's environment needs python3.11 on PATH")
        print("making pfl's environment in .cache/pfl-venv: a few minutes", flush=True)
        subprocess.run([base, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
        shutil.copy(requirements, installed)
    return str(python)


def contenders(processes: list[int]) -> dict[str, list[str]]:
    """Name and command of each contender."""
    commands = {}
    for count in processes:
        end = ["--processes", str(count)]
        commands[f"bare, {count} x 1 thread"] = [sys.executable, str(HERE / "bare_work.py"), *end, "--channels-last"]
        commands[f"pfl, {count} x 1 thread"] = [pfl_python(), str(HERE / "pfl_work.py"), *end]
        commands[f"pfl channels_last, {count} x 1 thread"] = [*commands[f"pfl, {count} x 1 thread"], "--channels-last"]
        if (HERE / "fedlib_work.py").exists():
            commands[f"fedlib, {count} x 1 thread"] = [sys.executable, str(HERE / "fedlib_work.py"), *end]
        else:
            print(f"skipped: fedlib, {count} x 1 thread (no fedlib_work.py)")
    return commands


def measure(command: list[str], rounds: int) -> dict:
    """One run of a contender: the line of JSON that it prints."""
    run = subprocess.run(
        [*command, "--rounds", str(rounds)],
        env=work.one_thread_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def cpu_model() -> str:
    """The processor's name, which Linux alone tells in this file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Median seconds per round of each contender, and the median and range of its ratios to the fastest pfl.

    A ratio sets two runs of the same turn against each other; the fastest pfl has the smallest median over turns.
    """
    seconds = {name: [run["seconds_per_round"] for run in repeats] for name, repeats in runs.items()}
    best = min((name for name in runs if name.startswith("pfl")), key=lambda name: statistics.median(seconds[name]))
    table = {}
    for name, values in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(values, seconds[best], strict=True)]
        table[name] = {
            "loss_after": [run["loss_after"] for run in runs[name]],
            "loss_before": [run["loss_before"] for run in runs[name]],
            "ratio_to_best_pfl": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "seconds_per_round": values,
            "seconds_per_round_median": statistics.median(values),
            "versions": runs[name][0]["versions"],
        }
    return table


def check_same_work(runs: dict[str, list[dict]]) -> None:
    """Bare and pfl train on the same batches from the same weights: if their losses differ, so did their work.

    fedlib is not checked: it draws its own cohorts and initial weights, which move the fall several times over.
    """
    checked = [run for name, repeats in runs.items() if not name.startswith("fedlib") for run in repeats]
    falls = [run["loss_before"] - run["loss_after"] for run in checked]
    if max(falls) - min(falls) > LOSS_TOLERANCE * min(falls):
        raise SystemExit(f"the losses of bare and pfl fell by different amounts: {falls}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns; each contender runs once in each")
    parser.add_argument("--rounds", type=int, default=5, help="rounds timed in each run")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to try")
    chosen = parser.parse_args()

    model = work.initial_model(channels_last=False)
    if sum(parameter.numel() for parameter in model.parameters()) != work.PARAMETERS:
        raise SystemExit("the network is not the benchmark's")
    commands = contenders(chosen.processes)
    runs = {name: [] for name in commands}
    for turn in range(chosen.repeats):
        for name, command in commands.items():
            runs[name].append(measure(command, chosen.rounds))
            print(f"turn {turn + 1}  {name:32} {runs[name][-1]['seconds_per_round']:7.3f} s a round", flush=True)
    table = summary(runs)
    check_same_work(runs)

    print(f"\n{'contender':32} {'s a round':>9} {'ratio to best pfl':>18} {'range':>13}")
    for name, row in sorted(table.items(), key=lambda item: item[1]["ratio_to_best_pfl"]):
        low, high = row["ratio_range"]
        ratio = row["ratio_to_best_pfl"]
        print(f"{name:32} {row['seconds_per_round_median']:9.3f} {ratio:18.2f} {low:6.2f}-{high:.2f}")
    result = {
        "contenders": table,
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "repeats": chosen.repeats,
        "rounds": chosen.rounds,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(f"\nwrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
