"""Records as two tidy tables: `runs` has a row a run, `rounds` a row a round. Measures, figures and tables read these.

Columns of `runs`:

- `run`: paper/profile/name, the key of both tables. `state`: FRESH, NOT_RUN, or why the record no longer counts.
- All fields of the spec under their own names (`paper`, `profile`, `group`, `label`, `split`, `seed`, `lr`, `rounds`
  ...); a setting of the method as `hyper.<setting>`, and DEFAULT where the run leaves it at that.
- After the last round: `accuracy` (% of the test images), `loss`. `mean_accuracy`: over all evaluated rounds (%);
  `late_accuracy`: over those of the last quarter of the rounds.
- Of all rounds and clients: `uploads` and `downloads` (numbers of messages; refused uploads are no uploads),
  `uplink_bytes` and `downlink_bytes` (measured), `uplink_megabytes` and `megabytes` (both ways), `paper_bits`
  (uploaded, by the paper's own definition), `part.<name>` (measured bytes of one part of all uploads).
- Of a mean upload: `upload_bytes` (measured); bits per parameter, `measured_bits` and by the paper's definition `bits`.
- `parameters` of the network, and of these `weights` and `others` (not compressed).
- `privacy.<name>`: what the record says of the mechanism and of what was spent.
- `device`, `seconds`, `time`, `torch`, `commit` and `code`: who made the record, and the digest of the code.
- `first.<column>` and `last.<column>`: the columns of `rounds` in the first and in the last round.

Columns of `rounds`:

- `run` and `round`; `accuracy` (%) and `loss`, missing where the model was not evaluated.
- Of all clients of the round: `clients` (their numbers), `uploads`, `uplink_bytes`, `downlink_bytes`, `paper_bits`,
  `other_bits.<definition>`. Bits per parameter of its mean upload: `measured_bits` and `bits`.
- Of the run so far: `uplink_megabytes`, `downlink_megabytes`, `megabytes` (both ways), `spent_bits` (by definition).
- `notes.<name>`: what the method notes of a round; a name with several values has a column each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fedlib.runs import record
from fedlib.runs.experiments import specs
from fedlib.runs.record import Record

LATE = "late_accuracy"  # the column by which claims and searches judge
FRESH, NOT_RUN, DEFAULT = "fresh", "not run", "default"
MEGABYTE = 1e6
AS_GIVEN = ("hyper.", "privacy.")  # columns whose values keep the type that they have in the record


def read(paper: str, profile: str, pattern: str = "*", root: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`runs` with a row for every planned run, also for those without a record, and `rounds` of those with one."""
    rows, found = [], []
    for spec, r, reason in record.fresh(specs(paper, profile, pattern, root=root), root):
        rows.append((_run(r) if r else _planned(spec.as_dict())) | {"state": reason or FRESH})
        found += [r] if r else []
    return _frame(rows), rounds(found)


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """The row of each record, taken to be fresh."""
    return _frame(_run(r) for r in records)


def rounds(records: Iterable[Record]) -> pd.DataFrame:
    """The rows of each record's rounds."""
    return _frame(row for r in records for row in _rounds(r))


def where(runs: pd.DataFrame, hyper: Mapping[str, Any] | None = None, **fields: Any) -> pd.DataFrame:
    """The runs whose columns have these values, in their order; a list stands for any of its values.

    hyper: values of the method's settings. A column that is not there has no value.
    """
    for name, value in (fields | {f"hyper.{key}": value for key, value in (hyper or {}).items()}).items():
        values = value if isinstance(value, list | tuple | set) else [value]
        runs = runs[runs[name].isin(list(values))] if name in runs else runs.iloc[:0]
    return runs


def each(runs: pd.DataFrame, *columns: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The runs by the values of these columns, in order of appearance: a value, or a tuple of several, and its runs."""
    for key, own in runs.groupby(list(columns), sort=False, dropna=False):
        yield (key[0] if len(columns) == 1 else key), own


def list_columns(frame: pd.DataFrame, prefix: str) -> list[str]:
    """The columns whose names begin so and that have a value."""
    return [str(name) for name in frame if str(name).startswith(prefix) and frame[name].notna().any()]


def join_rounds(runs: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """A row a round of these runs, in their order, with the run's columns beside the round's own."""
    more = [name for name in runs if name not in rounds and not str(name).startswith(("first.", "last."))]
    return runs[["run", *more]].merge(rounds, on="run")


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), dtype=object)
    columns = {}
    for name, column in frame.items():
        if str(name).startswith("hyper."):
            columns[name] = column.where(column.notna(), DEFAULT)
        else:
            columns[name] = column if str(name).startswith(AS_GIVEN) else column.infer_objects()
    return pd.DataFrame(columns)


def _planned(spec: dict[str, Any]) -> dict[str, Any]:
    settings = {f"hyper.{key}": value for key, value in spec["hyper"].items()}
    key = "/".join(str(spec.get(name)) for name in ("paper", "profile", "name"))
    return {"run": key, "state": NOT_RUN} | {k: v for k, v in spec.items() if k != "hyper"} | settings


def _run(r: Record) -> dict[str, Any]:
    final, made, rows = r["final"], r["made"], list(_rounds(r))
    parameters, uploads = _parameters(r), final["uploads"]
    accepted = final["uplink_bytes"] - final["uplink_parts"].get("refused", 0)
    evaluated = [row["accuracy"] for row in rows if not math.isnan(row["accuracy"])]
    row = _planned(record.spec_of(r)) | {k: v for k, v in final.items() if k not in ("uplink_parts", "privacy")}
    row |= {"state": FRESH, "loss": _number(final.get("loss"))}
    row |= {"accuracy": 100 * final["accuracy"], "mean_accuracy": _mean(evaluated)}
    late = [entry["accuracy"] for entry in rows if entry["round"] > 0.75 * len(rows)]
    row |= {"late_accuracy": _mean([accuracy for accuracy in late if not math.isnan(accuracy)])}
    row |= {"downloads": sum(len(entry["clients"]) + len(entry.get("refused", ())) for entry in r["rounds"])}
    row |= {name: rows[-1][name] for name in ("uplink_megabytes", "megabytes")}
    row |= {"parameters": parameters, "weights": r["parameters"]["weights"], "others": r["parameters"].get("others", 0)}
    row |= {"upload_bytes": accepted / uploads, "measured_bits": 8 * accepted / uploads / parameters}
    row |= {"bits": final.get("paper_bits", math.nan) / uploads / parameters}
    row |= {f"part.{name}": size for name, size in final["uplink_parts"].items()}
    row |= {f"privacy.{name}": value for name, value in final.get("privacy", {}).items()}
    row |= {name: made.get(name) for name in ("device", "seconds", "time", "commit")}
    row |= {"torch": made.get("versions", {}).get("torch"), "code": r.get("code")}
    row |= {f"first.{name}": value for name, value in rows[0].items()}
    return row | {f"last.{name}": value for name, value in rows[-1].items()}


def _rounds(r: Record) -> Iterator[dict[str, Any]]:
    run, parameters = _planned(r["spec"])["run"], _parameters(r)
    up, down, spent = 0, 0, 0.0
    for entry in r["rounds"]:
        uploads = len(entry["clients"])
        up, down, spent = up + entry["uplink_bytes"], down + entry["downlink_bytes"], spent + entry["paper_bits"]
        row = {name: entry[name] for name in ("round", "clients", "uplink_bytes", "downlink_bytes", "paper_bits")}
        row |= {"run": run, "uploads": uploads, "loss": _number(entry.get("loss"))}
        row |= {"accuracy": 100 * _number(entry["accuracy"]), "spent_bits": spent}
        row |= {"bits": entry["paper_bits"] / max(1, uploads) / parameters}
        row |= {"measured_bits": 8 * entry["uplink_bytes"] / max(1, uploads) / parameters}
        row |= {"uplink_megabytes": up / MEGABYTE, "downlink_megabytes": down / MEGABYTE}
        row |= {"megabytes": (up + down) / MEGABYTE}
        yield row | {k: v for name in ("other_bits", "notes") for k, v in _flat(name, entry.get(name, {}))}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    else:
        yield name, value


def _parameters(r: Record) -> int:
    return int(sum(r["parameters"].values()))


def _number(value: float | str | None) -> float:
    """nan where nothing was evaluated; a loss that is not finite stands there as text."""
    return math.nan if value is None else float(value)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
