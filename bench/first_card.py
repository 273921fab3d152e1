"""The first nine minutes on a machine with a GPU: what works there, how exact it is, and where the time goes.

    python bench/first_card.py --out FOLDER [--device cpu] [--stages versions draws ...]

Each stage is a process of its own, ended at its limit. What it has found so far stands in FOLDER/<stage>.json, what it
said in FOLDER/<stage>.log, so that a machine that goes away loses nothing; FOLDER/summary.json has one line a stage.
On a CPU sizes are small, and the whole takes two minutes: to see that the script works. The status is 0 if all stages
ran to their end; what failed within one is a row that begins with "error".
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Seconds at most, in the order in which what they find matters.
STAGES: dict[str, float] = {
    "versions": 20,  # is there all that a run needs? whether to go on
    "steps": 30,  # a captured step of each method: what to mend first
    "tests": 90,  # the tests for a GPU: a median under 1e-5 is rounding, 1e-3 is TensorFloat-32 or a race
    "draws": 20,  # one generator everywhere?
    "cnn4": 100,  # engines, layouts, precisions; is there room for several graphs side by side?
    "host": 40,  # milliseconds of the CPU by part: how much is not training at all
    "record": 70,  # the first record made on a GPU
    "rounds": 30,  # an engine that differs in round 1 is at fault
    "pfl": 60,  # beside another simulator
    "shapes": 50,  # which of the other papers' runs fit
    "contest": 25,  # does choosing an engine by trying pay?
}


def child(name: str, device: str, out: Path) -> dict[str, Any]:
    """Run one stage to its end or its limit, and say how it went."""
    paths = [str(ROOT / folder) for folder in (".", "bench", "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "bench" / "card_stages.py"), name, device, str(out)]
    begin = time.perf_counter()
    with (out / f"{name}.log").open("wb") as log:
        # A session of its own, so that what the stage has started ends with it.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=STAGES[name])
            ended = "ran" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"ended at its limit of {STAGES[name]} s"
        finally:  # also where the whole is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = round(time.perf_counter() - begin, 1)
    result = out / f"{name}.json"
    rows = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    errors = [key for key, row in rows.items() if "error" in row]
    skipped = {key: row["skipped"] for key, row in rows.items() if "skipped" in row}
    return {"stage": name, "ended": ended, "seconds": seconds, "rows": len(rows), "errors": errors, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="only these")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, Any]] = []
    for name in STAGES:
        if name not in chosen.stages:
            continue
        (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier call
        table.append(child(name, chosen.device, out))
        summary = {"device": chosen.device, "stages": table}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"{name:9} {table[-1]['ended']}, {table[-1]['seconds']} s", flush=True)
    print(f"\n{'stage':9} {'s':>6} {'rows':>5} {'errors':>6}  how it ended; what it left out")
    for row in table:
        left_out = "".join(f"; {key}: {why}" for key, why in row["skipped"].items())
        print(f"{row['stage']:9} {row['seconds']:6} {row['rows']:5} {len(row['errors']):6}  {row['ended']}{left_out}")
    print(f"kept in {out}")
    return 0 if all(row["ended"] == "ran" for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
