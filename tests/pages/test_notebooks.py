"""What a notebook pastes into its sentences, its cells have kept; and what is worked out by hand is of a run."""

import re
from typing import Any

import jupytext
import pytest
from common import ROOT

from fedlib.claims import score
from fedlib.methods import registry
from fedlib.pages import page
from fedlib.runs.experiments import specs

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_every_number_of_a_sentence_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells that keep numbers run after the two that open the page."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(page, "glue", kept.__setitem__)
    monkeypatch.setattr(page, "_train", lambda *_: None)  # stale records have the same names
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.md")
    namespace: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and ("open_page" in cell.source or "remove-cell" in cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    pasted = set(re.findall(r"\{glue:text\}`([^`]+)`", text))
    assert pasted and pasted <= kept.keys()


@pytest.mark.parametrize("paper", score.scored())
def test_payloads_are_worked_out_for_runs_and_their_parts(paper: str) -> None:
    methods = {spec.label: registry.METHODS[spec.method] for spec in specs(paper, "lab")}
    for label, parts in score.read_published(paper)["payload"].items():
        assert parts.keys() <= {*methods[label].sections, "container"}, label
