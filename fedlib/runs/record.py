"""What was measured: one JSON file a run, kept in Git, and the rule that says when it still counts.

A record is fresh when its spec, the hash of its data set and the digest of the code that made it are those of today.
The digest covers the modules that can change a number, without comments, docstrings and blank lines.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlib.data import sets
from fedlib.data.sources import home
from fedlib.errors import DataError
from fedlib.methods import model_codec, registry
from fedlib.models.registry import MODELS
from fedlib.runs.spec import Spec

Record = dict[str, Any]
PACKAGE = Path(__file__).resolve().parents[1]
FORMAT = 1
# These only carry numbers that others make: engines agree by test, specs and data sets are compared for themselves.
CARRIERS = {"fedlib", "fedlib.errors", "fedlib.engines", "fedlib.engines.select", "fedlib.engines.in_process"}
CARRIERS |= {f"fedlib.runs.{name}" for name in ("record", "checkpoint", "machine", "spec", "experiments", "progress")}
CARRIERS |= {"fedlib.data", "fedlib.data.sets", "fedlib.data.sources", "fedlib.data.text"}
CARRIERS |= {"fedlib.methods", "fedlib.methods.registry", "fedlib.models", "fedlib.models.registry"}


def path(spec: Spec, root: Path | None = None) -> Path:
    return (root or home()) / "records" / spec.paper / spec.profile / f"{spec.name}.json"


def write(target: Path, content: bytes) -> None:
    """All or nothing: whatever happens, `target` holds its old bytes or all of the new ones."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def save(record: Record, root: Path | None = None) -> Path:
    target = path(Spec.from_dict(record["spec"]), root)
    write(target, text(record).encode())
    return target


def text(record: Record) -> str:
    """JSON with one line a round, so that a change reads well in Git."""
    rounds = ",\n".join("  " + json.dumps(entry) for entry in record["rounds"])
    rest = json.dumps({k: v for k, v in record.items() if k != "rounds"}, indent=1)
    return rest[: rest.rindex("\n}")] + ',\n "rounds": [\n' + rounds + "\n ]\n}\n"


def stable(record: Record) -> Record:
    """The part that two runs of one spec on a CPU share byte for byte: all but times and the machine."""
    rounds = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record["rounds"]]
    return {k: v for k, v in record.items() if k != "made"} | {"rounds": rounds}


def load(spec: Spec, root: Path | None = None) -> Record | None:
    """The record of a run, stale or fresh; None where there is none."""
    target = path(spec, root)
    if not target.exists():
        return None
    try:
        found = json.loads(target.read_text(encoding="utf-8"))
        return dict(found)
    except (ValueError, TypeError) as error:
        raise DataError(f"record {target} cannot be read ({error}); restore it from Git, or remove it") from error


def stale(record: Record, spec: Spec) -> str:
    """Why a record no longer counts for this spec: empty when it is fresh."""
    reasons = []
    if record.get("format") != FORMAT:
        reasons.append(f"format {record.get('format')} instead of {FORMAT}")
    # A record older than a field of Spec was made with that field's default.
    then = {f.name: f.default for f in dataclasses.fields(Spec) if f.default is not dataclasses.MISSING}
    then |= record.get("spec", {})
    if then != spec.as_dict():
        changed = [k for k, v in spec.as_dict().items() if then.get(k) != v]
        reasons.append(f"spec differs in {', '.join(changed) or 'fields since removed'}")
    if record.get("data") != sets.digest(spec.data):
        reasons.append("data set differs")
    if record.get("code") != code_of(spec):
        reasons.append("code has changed")
    return "; ".join(reasons)


def code_of(spec: Spec) -> str:
    return code_digest(spec.method, spec.model, (spec.downlink or {}).get("method", ""))


@functools.lru_cache
def code_digest(method: str, model: str, downlink: str = "") -> str:
    """Hash of the source of every module that shapes the numbers of a run."""
    used = {registry.METHODS[method].__name__}
    if downlink:
        used |= {registry.METHODS[downlink].__name__, model_codec.Downlink.__module__}
    roots = {"fedlib.runs.rounds", "fedlib.core.client", *used, MODELS[model].__module__}
    digest = hashlib.sha256()
    for name in sorted(_closure(roots)):
        digest.update(f"{name}\n{_essence(_source(name).read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def essence(source: str) -> str:
    """Python source without comments, docstrings and blank lines, cut by position: the same text on every Python."""
    text = source.replace("\r\n", "\n")
    lines = [line.encode() for line in text.split("\n")]  # positions in a syntax tree count bytes
    inside: set[int] = set()  # rows of strings over several lines, where a blank line counts
    cuts = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            start = len(token.line[:column].encode())
            cuts.append((row, start, row, start + len(token.string.encode())))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            if ast.get_docstring(node, clean=False) is not None:
                d = node.body[0]
                cuts.append((d.lineno, d.col_offset, d.end_lineno or d.lineno, d.end_col_offset or 0))
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            inside.update(range(node.lineno, node.end_lineno or node.lineno))
    for first, start, last, end in sorted(cuts, reverse=True):
        inside.difference_update(range(first, last + 1))
        tail = lines[last - 1][end:]
        for row in range(first + 1, last + 1):
            lines[row - 1] = b""
        lines[first - 1] = lines[first - 1][:start] + tail
    kept = (
        line if row in inside else line.rstrip() for row, line in enumerate(lines, 1) if row in inside or line.strip()
    )
    return b"\n".join(kept).decode()


_essence = functools.lru_cache(essence)  # of the same files for every method


def _closure(roots: set[str]) -> set[str]:
    """Modules of fedlib that the roots import, directly or not; carriers are left out, and not looked into."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name in CARRIERS:
            continue
        found.add(name)
        for module, names in _imports(_source(name).read_text(encoding="utf-8")):
            inner = [f"{module}.{name}" for name in names]
            waiting += [module, *(module for module in inner if _source(module).exists())]
    return found


@functools.lru_cache
def _imports(source: str) -> list[tuple[str, list[str]]]:
    """What a module imports from fedlib: (module, names)."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [(n.module, [alias.name for alias in n.names]) for n in nodes if n.module and n.module.startswith("fedlib")]


def _source(module: str) -> Path:
    file = PACKAGE.parent.joinpath(*module.split("."))
    return file / "__init__.py" if file.is_dir() else file.with_suffix(".py")


def fresh(specs: list[Spec], root: Path | None = None) -> Iterator[tuple[Spec, Record | None, str]]:
    """For each run: its record if any, and why it does not count (empty when it does)."""
    for spec in specs:
        record = load(spec, root)
        yield spec, record, stale(record, spec) if record else "not run"
