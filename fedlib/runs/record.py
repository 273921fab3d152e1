"""What was measured: one JSON file a run, kept in Git, and the rule that says when it still counts.

A record is fresh when its spec, the hash of its data set and the digest of the code that made it are those of today,
nothing in it was changed since, and no upload was lost between machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedlib.data import sets
from fedlib.data.sources import home
from fedlib.engines.flower.frames import LOST
from fedlib.errors import DataError
from fedlib.models.given import UNKNOWN
from fedlib.runs import integrity
from fedlib.runs.digest import code_of
from fedlib.runs.spec import Spec

if sys.platform != "win32":
    import fcntl

Record = dict[str, Any]
FORMAT = 1
UNFINISHED = ".unfinished"  # ends the name of a file that is being written


def path(spec: Spec, root: Path | None = None) -> Path:
    return (root or home()) / "records" / spec.paper / spec.profile / f"{spec.name}.json"


def write(target: Path, content: bytes) -> None:
    """All or nothing: whatever happens, `target` holds its old bytes or all new ones. DataError: the old ones."""
    name = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED)
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):  # without locks (some disks, Windows) nothing is swept either
                lock(file, wait=True)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o644)
            if sys.platform != "win32":  # while the lock is held
                os.replace(name, target)
        if sys.platform == "win32":  # where an open file keeps its name
            os.replace(name, target)
    except BaseException as error:
        if name:
            with contextlib.suppress(OSError):
                Path(name).unlink()
        if isinstance(error, OSError):
            why = error.strerror or type(error).__name__
            raise DataError(
                f"{target}: cannot be written ({why}); what stood there is kept; free the disk, or the folder"
            ) from error
        raise


def lock(file: IO[bytes], wait: bool) -> None:
    """Until it is closed. OSError: another process holds it, or there are no locks here."""
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        raise OSError("no locks on Windows")


def sweep(folder: Path) -> None:
    """Remove below a folder what writes left behind that were killed.

    One that lives holds a lock, so that neither a slow disk nor a clock that jumps makes its file look left behind; but
    for its first moment, which the minute is for.
    """
    for left in folder.rglob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            lock(file, wait=False)
            if abs(time.time() - left.stat().st_mtime) > 60:
                left.unlink()


def save(record: Record, root: Path | None = None) -> Path:
    target = path(Spec.from_dict(record["spec"]), root)
    write(target, text(record).encode())
    return target


def text(record: Record) -> str:
    """JSON with one line a round, so that a change reads well in Git; with a digest of all else."""
    rounds = ",\n".join("  " + json.dumps(entry, allow_nan=False) for entry in record["rounds"])
    whole = record | {"digest": integrity.digest(record)}
    rest = json.dumps({k: v for k, v in whole.items() if k != "rounds"}, indent=1, allow_nan=False)
    return rest[: rest.rindex("\n}")] + ',\n "rounds": [\n' + rounds + "\n ]\n}\n"


def stable(record: Record) -> Record:
    """The part that two runs of one spec on a CPU share byte for byte: all but times and the machine."""
    rounds = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record["rounds"]]
    return {k: v for k, v in record.items() if k != "made"} | {"rounds": rounds}


def load(spec: Spec, root: Path | None = None) -> Record | None:
    """The record of a run, stale or fresh; None where there is none. Raises as `read` does."""
    target = path(spec, root)
    return read(target) if target.exists() else None


def read(file: Path) -> Record:
    """A record without its digest. What is wrong with one that was changed since stands under "fault".

    DataError: the file is no record.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("spec"), dict):
            raise ValueError("it is no mapping with a spec")
    except (OSError, ValueError) as error:
        raise DataError(f"record {file} cannot be read ({error}); restore it from Git, or remove it") from error
    if fault := integrity.fault(found):
        found["fault"] = fault
    found.pop("digest", None)
    return found


def spec_of(record: Record) -> dict[str, Any]:
    """The spec of a record; one older than a field of Spec was made with that field's default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Spec) if f.default is not dataclasses.MISSING}
    return defaults | record.get("spec", {})


def stale(record: Record, spec: Spec) -> str:
    """Why a record no longer counts for this spec: empty when it is fresh."""
    if "fault" in record:
        return str(record["fault"])
    reasons = []
    if record.get("format") != FORMAT:
        reasons.append(f"format {record.get('format')} instead of {FORMAT}")
    then = spec_of(record)
    if then != spec.as_dict():
        changed = [k for k, v in spec.as_dict().items() if then.get(k) != v]
        reasons.append(f"spec differs in {', '.join(changed) or 'fields since removed'}")
    if record.get("data") != sets.digest(spec.data):
        reasons.append("data set differs")
    code = code_of(spec)
    if record.get("code") != code:
        reasons.append("code has changed")
    elif code.endswith(UNKNOWN):
        reasons.append("whether code has changed cannot be known: the source of a part of it is not there")
    return "; ".join([*reasons, *lost(record)])


def lost(record: Record) -> list[str]:
    """What the spec does not determine: that clients were missing in rounds because their machines failed."""
    found = [
        f"round {entry['round']}, client {client}: {why.removeprefix(LOST)}"
        for entry in record.get("rounds", [])
        for client, why in entry.get("refused", [])
        if why.startswith(LOST)
    ]
    return [f"{len(found)} uploads were lost on their way, the first in {found[0]}"] if found else []


def fresh(specs: list[Spec], root: Path | None = None) -> Iterator[tuple[Spec, Record | None, str]]:
    """For each run: its record if any, and why it does not count (empty when it does)."""
    for spec in specs:
        record = load(spec, root)
        yield spec, record, stale(record, spec) if record else "not run"
