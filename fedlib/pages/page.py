"""What every page begins with: the results of its paper, trained where they are missing, by group of runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from myst_nb import glue

from fedlib.claims import results, score
from fedlib.claims.conditions import count_local_steps
from fedlib.claims.scorecard import list_profiles
from fedlib.data import sources
from fedlib.engines import select
from fedlib.errors import DataError, Diverged
from fedlib.pages.exhibit import Exhibit
from fedlib.runs import grid
from fedlib.runs.experiments import read_experiments, specs

ABSENT = Markdown("Not part of this profile.")
NOT_RUN = "(not run)"  # in a sentence, in place of a number


@dataclass(frozen=True)
class Page:
    """The tables behind a page, as `fedlib.claims.results` describes them."""

    paper: str
    profile: str  # the one that is shown
    planned: pd.DataFrame  # a row a run, also of those without a record
    rounds: pd.DataFrame

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The runs with a record, fresh or stale; the table of records marks the stale ones."""
        return self.planned[self.planned["state"] != results.NOT_RUN]

    @cached_property
    def experiments(self) -> dict[str, Any]:
        return read_experiments(self.paper)

    @cached_property
    def scores(self) -> list[score.Score]:
        return score.scores(self.paper, self.profile)

    @cached_property
    def scales(self) -> list[str]:
        """The profiles at which the paper has been run, the largest first."""
        return list_profiles(self.paper, otherwise=self.profile)

    @cached_property
    def largest(self) -> Page:
        """This page at the largest profile with fresh records; itself where no larger one has any."""
        for profile in takewhile(lambda profile: profile != self.profile, self.scales):
            planned, rounds = results.read(self.paper, profile)
            if len(rounds):
                return Page(self.paper, profile, planned, rounds)
        return self

    @cached_property
    def payload(self) -> dict[str, dict[str, int]]:
        """Sizes of the parts of an upload, worked out by hand for the networks of profile lab."""
        return dict(score.read_published(self.paper)["payload"])

    def select(self, *groups: str, hyper: Mapping[str, Any] | None = None, **fields: Any) -> pd.DataFrame:
        """The runs of these groups, group by group (none: all), whose columns have these values, as `results.where`."""
        runs = pd.concat([results.where(self.runs, group=group) for group in groups]) if groups else self.runs
        return results.where(runs, hyper, **fields)

    def stand_in(self, group: str) -> pd.DataFrame:
        """The runs of a group, or of group main, so that a small profile without it tries the same figures."""
        runs = self.select(group)
        return runs if len(runs) else self.select("main")

    def show(self, draw: Callable[..., Exhibit], runs: pd.DataFrame, *rest: Any, **more: Any) -> Exhibit | Markdown:
        """The figure or table that `draw` makes of these runs, or the note that the profile has none of them."""
        return draw(runs, *rest, **more) if len(runs) else ABSENT

    def show_full_scale(self, what: str, draw: Callable[..., Exhibit]) -> Exhibit | Markdown | None:
        """`draw(runs, rounds)` of the fresh records of profile paper; nothing on a page that shows it anyway."""
        runs, rounds = results.read(self.paper, "paper")
        runs = results.where(runs, state=results.FRESH)
        if not len(runs):
            return Markdown(f"{what}, **has not been run**: it stands ready for a machine with a GPU.")
        return draw(runs, rounds) if self.profile != "paper" else None

    def count_steps(self) -> dict[str, str]:
        """Local steps of a mean client in a round, for each group of runs that some profile has."""
        groups = {group for profile in self.experiments["profiles"].values() for group in profile}
        steps = self.planned.assign(steps=count_local_steps(self.planned)).groupby("group")["steps"].mean()
        return {f"steps-{group}": tell(steps.get(group, np.nan), ".0f") for group in groups}

    def count_cost(self) -> dict[str, Any]:
        """Minutes of training of all records, added up over processes, and the devices."""
        minutes = round(float(self.runs["seconds"].sum()) / 60, 1)
        return {"minutes": minutes, "device": ", ".join(self.runs["device"].unique())}


log = logging.getLogger("fedlib")


def open_page(paper: str, profile: str, train: bool = True) -> Page:
    """The page of a paper at a profile, whose missing runs are trained first; a run that searches settings may diverge.

    Profile paper is trained on request only (`python -m fedlib run`); without any record of it, lab is shown. Runs
    whose data set is not there are left out with a note, but for those of group main: DataError; so is a page that
    trains nothing and finds no record.
    """
    logging.basicConfig(format="%(message)s")
    planned, rounds = results.read(paper, profile)
    if profile == "paper" and not len(rounds):
        display(Markdown("Profile `paper`, the scale of the papers, has not been run: this page shows profile `lab`."))
        return open_page(paper, "lab", train)
    if not train and not len(rounds):
        remedy = f"python -m fedlib run {paper} --profile {profile}"
        raise DataError(f"there are no records of {paper} at profile {profile}; make them by: {remedy}")
    missing = planned[planned["state"] != results.FRESH]
    if train and profile != "paper" and len(missing):
        log.setLevel(logging.ERROR)  # in a search runs may diverge: their uploads are refused, and nobody need be told
        try:
            _train(paper, profile, missing)
        finally:
            log.setLevel(logging.NOTSET)
        planned, rounds = results.read(paper, profile)
    return Page(paper, profile, planned, rounds)


def _fetch(name: str) -> None:
    """A data set that is not here; of one that is, a page has nothing to say."""
    try:
        sources.verify(name)
    except DataError:
        sources.get(name)


def _train(paper: str, profile: str, missing: pd.DataFrame) -> None:
    absent = set()
    for name in missing["data"].unique():
        try:
            _fetch(name)
        except DataError as error:
            if "main" in set(results.where(missing, data=name)["group"]):
                raise
            absent.add(name)
            display(Markdown(f"The data set `{name}` is not here, so what needs it was not run. {error}"))
    names = set(missing.loc[~missing["data"].isin(absent), "name"])
    with select.open_engine("auto") as engine:
        for spec in specs(paper, profile):
            made = grid.attempt(spec, engine) if spec.name in names else None
            if isinstance(made, Exception) and not (spec.may_diverge and isinstance(made, Diverged)):
                raise made


def keep(numbers: Mapping[str, Any], prefix: str = "") -> None:
    """Numbers for the page's sentences, each under its name."""
    for name, value in numbers.items():
        glue(prefix + name, value)


def tell(value: Any, form: str = ".1f") -> str:
    """A number for a sentence; where it is NaN, nothing was run."""
    return NOT_RUN if np.isnan(value) else f"{value:{form}}"


def mean(runs: pd.DataFrame, column: str = "accuracy", form: str = ".1f") -> str:
    """The mean of a column for a sentence."""
    return tell(runs[column].mean(), form) if column in runs else NOT_RUN


def means(
    runs: pd.DataFrame, labels: Iterable[str], name: str = "{}", column: str = "accuracy", form: str = ".1f"
) -> dict[str, str]:
    """The mean of a column for each label, under a name that is made of the label."""
    return {name.format(label): mean(results.where(runs, label=label), column, form) for label in labels}


def span(values: pd.Series, form: str = ".0f") -> str:
    """Minimum to maximum for a sentence."""
    return f"{min(values):{form}} to {max(values):{form}}" if len(values) else NOT_RUN
