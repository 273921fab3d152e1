"""Tables of the pages, each made of the tables of `fedlib.claims.results`; a cell is most often a mean over seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from fedlib.claims.results import DEFAULT, FRESH, NOT_RUN, each, join_rounds, list_columns, where
from fedlib.pages.exhibit import Exhibit, spread, table
from fedlib.wire import container

Cells = dict[str, Callable[[pd.DataFrame], Any]]  # what a column shows of the runs of a row


def summarize(
    runs: pd.DataFrame,
    by: Mapping[str, str],
    cells: Cells,
    caption: str,
    name: str,
    numbers: pd.DataFrame | None = None,
) -> Exhibit:
    """A row for all runs that agree in the columns `by`, in order of appearance: their values, then the cells.

    by: the table's heads by the columns of `runs`. numbers: the CSV, where it says more than the cells.
    """
    rows = []
    for _, own in each(runs, *by):
        row = {head: own[column].iloc[0] for column, head in by.items()}
        rows.append(row | {head: cell(own) for head, cell in cells.items()})
    return table(pd.DataFrame(rows), caption, name, runs, numbers)


def average(column: str, form: str = ",.0f") -> Callable[[pd.DataFrame], str]:
    """A cell: the mean of a column; a dash where it has no value."""
    return lambda own: f"{own[column].mean():{form}}" if own[column].notna().any() else "–"


def deviate(column: str, form: str = ".1f") -> Callable[[pd.DataFrame], str]:
    """A cell: mean and sample deviation of a column."""
    return lambda own: spread(own[column], form)


def tell_each(runs: pd.DataFrame, column: str, tell: Callable[[pd.DataFrame], str]) -> Cells:
    """A column a value of `column`: what is told of those of a row's runs that have it; a dash where none has."""

    def cell(own: pd.DataFrame, value: Any) -> str:
        there = where(own, **{column: value})
        return tell(there) if len(there) else "–"

    return {value: functools.partial(cell, value=value) for value in runs[column].unique()}


def accuracy_table(runs: pd.DataFrame) -> Exhibit:
    """Final test accuracy per method, partition and rate: mean, sample deviation, and each seed's value."""
    cells: Cells = {
        "mean (%)": average("accuracy", ".2f"),
        "deviation": lambda own: f"{own['accuracy'].std():.2f}" if len(own) > 1 else "single seed",
        "each seed (%)": lambda own: ", ".join(f"{value:.2f}" for value in own.sort_values("seed")["accuracy"]),
    }
    runs = runs.assign(rate=[f"{lr:g}" for lr in runs["lr"]])
    by = {"label": "method", "split": "partition", "rate": "lr"}
    return summarize(runs, by, cells, "Test accuracy after the last round.", "accuracy")


def payload_table(runs: pd.DataFrame, expected: Mapping[str, Mapping[str, int]] | None = None) -> Exhibit:
    """Measured bytes of one mean upload, part by part, beside what the specification works out where it does."""
    rows = []
    for label, own in each(runs, "label"):
        first = own.iloc[0]
        for column in sorted(list_columns(own, "part."), key=lambda column: column == "part.container"):
            part = column.removeprefix("part.")
            worked = (expected or {}).get(label, {}).get(part)
            row = {"method": label, "part": part, "measured bytes": f"{first[column] / first['uploads']:,.0f}"}
            rows.append(row | {"worked out": "–" if worked is None else f"{worked:,}"})
        row = {"method": label, "part": "whole upload", "measured bytes": f"{first['upload_bytes']:,.0f}"}
        rows.append(row | {"worked out": "–"})
    caption = "Bytes of one upload, measured on the messages that were sent."
    return table(pd.DataFrame(rows), caption, "payload", runs)


def method_table(runs: pd.DataFrame, name: str, columns: str = "split") -> Exhibit:
    """A row a method, a column a partition (or another field): accuracy; measured upload."""
    several = runs["lr"].nunique() > 1 and columns != "lr"
    tuned = "each method at the learning rate in brackets" if several else "all at the same learning rate"
    heads = [value if columns == "split" else f"{columns}: {value}" for value in runs[columns]]
    chosen = runs.assign(column=heads, definition=runs["paper_bits"] / runs["uploads"] / runs["weights"])
    chosen = chosen.assign(measured=8 * chosen["upload_bytes"] / chosen["weights"])

    def tell(own: pd.DataFrame) -> str:
        rate = f" (lr {own['lr'].iloc[0]:g})" if several else ""
        return f"{spread(own['accuracy'])}{rate}"

    cells = tell_each(chosen, "column", tell) | {"bytes an upload": average("upload_bytes")}
    cells |= {"bits a weight": average("measured", ".2f"), "by definition": average("definition", ".2f")}
    caption = (
        f"Test accuracy (%) after the last round, mean and sample deviation over seeds, {tuned}; bytes and bits of a "
        "mean upload, over all columns and with all its parts, as measured, and the bits a weight that the method's "
        "definition counts."
    )
    order = chosen.set_index("label", drop=False).loc[chosen["label"].unique()]
    numbers = order[["label", "column", "seed", "lr", "accuracy"]].rename(columns={"label": "method"})
    return summarize(chosen, {"label": "method"}, cells, caption, name, numbers)


def group_table(planned: pd.DataFrame, caption: str) -> Exhibit:
    """A row a group of runs: what differs between groups, and how many runs there are."""
    fields = ("data", "model", "clients", "cohort", "rounds", "epochs", "batch", "lr", "split")
    rows = [
        {"group": group, "runs": len(own)} | {name: ", ".join(map(str, own[name].unique())) for name in fields}
        for group, own in each(planned, "group")
    ]
    return table(pd.DataFrame(rows), caption, "groups")


def gather_notes(runs: pd.DataFrame, rounds: pd.DataFrame, notes: Mapping[str, str]) -> pd.DataFrame:
    """A row a round of each run and note, as `join_rounds` has it, the note's name as `of` and its value as `value`.

    notes: names by the columns of `rounds`.
    """
    frame = join_rounds(runs, rounds)
    there = [frame.assign(of=name, value=frame[column]) for column, name in notes.items() if column in frame]
    return pd.concat(there, ignore_index=True).dropna(subset="value")


def name_setting(runs: pd.DataFrame, setting: str, default: Any) -> pd.Series:
    """The values of a setting of the method, with a name for the default."""
    column = f"hyper.{setting}"
    if column not in runs:
        return pd.Series(default, index=runs.index)
    return runs[column].where(runs[column] != DEFAULT, default)


def setup_table(experiments: dict[str, Any], profile: str, theirs: str = "authors' scripts") -> Exhibit:
    """Every setting: the authors' value, the value of this profile, unit and source; then the methods' own settings.

    theirs: what profile `paper` stands for.
    """
    rows = []
    for name, setting in experiments["settings"].items():
        value, paper = setting.get(profile, "–"), setting.get("paper", "not stated")
        row = {"setting": name, theirs: paper, "here": value}
        rows.append(row | {"unit": setting["unit"], "source": setting["source"]})
    for label, method in experiments["methods"].items():
        if "paper" not in method:  # a check of this project's own, which the authors' scripts do not have
            continue
        settings = {name: method[name] for name in ("lr",) if name in method} | method["hyper"]
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
        paper = method["paper"]
        rows.append({"setting": label, theirs: paper, "here": text, "unit": "", "source": method["source"]})
    return table(pd.DataFrame(rows), f"Set-up: {theirs} beside profile {profile}.", "setup")


def record_table(runs: pd.DataFrame, caption: str) -> Exhibit:
    """Every planned run with its record: state, day, seconds, device, versions, commit."""
    frame = runs.reindex(columns=["run", "state", "time", "seconds", "device", "torch", "commit", "code"])
    stale = ~frame["state"].isin([FRESH, NOT_RUN])
    frame["state"] = frame["state"].where(~stale, "STALE: " + frame["state"])
    for name, letters in (("time", 10), ("commit", 8), ("code", 8)):
        frame[name] = frame[name].astype("str").str[:letters].where(frame[name].notna())
    return table(frame.where(frame.notna(), "–").rename(columns={"time": "made"}), caption, "records")


def message_table(message: bytes, parts: Sequence[str], caption: str) -> Exhibit:
    """Every field of a message in the order of its bytes: where it starts, its length, its bytes, what they say."""
    sizes = container.section_sizes(message)
    fields = [("magic word", 3), ("format version", 1), ("length of the kind", 1), ("kind", message[4])]
    fields += [("fingerprint", 8), ("training samples", 4), ("round", 4), ("client", 4), ("number of sections", 1)]
    fields += [(f"length of section {index}", 4) for index in range(len(sizes))]
    fields += [*zip(parts, sizes, strict=True), ("checksum (XXH3)", 4)]
    rows, start = [], 0
    for field, size in fields:
        held, says = message[start : start + size], "–"
        if field in ("magic word", "kind"):
            says = held.rstrip(b"\0").decode()
        elif field == "training samples" or field.split()[0] in ("format", "length", "number"):
            says = f"{int.from_bytes(held, 'little'):,}"
        digits = held[: 8 if size == 8 else 6].hex(" ") + (" …" if size > 8 else "")
        rows.append({"field": field, "from byte": f"{start:,}", "bytes": f"{size:,}", "in hex": digits, "says": says})
        start += size
    if start != len(message):
        raise ValueError(f"message of {len(message)} bytes, of which {start} are explained")
    return table(pd.DataFrame(rows), caption, "message")
