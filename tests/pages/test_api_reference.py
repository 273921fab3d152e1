"""The pages on fedlib's own functions name every public one."""

import importlib
import inspect
import re

import pytest
from common import ROOT

from fedlib.pages import api_reference

PAGES = sorted((ROOT / "book" / "reference").glob("api-*.md"))
SHOWN = [name for page in PAGES for name in re.findall(r'reference\.module\("([\w.]+)"\)', page.read_text())]


@pytest.mark.parametrize("name", SHOWN)
def test_every_public_name_is_there(name: str) -> None:
    """Python's own view of the module against the one that is read from its source."""
    module = importlib.import_module(name)
    public = {key: inspect.unwrap(value) for key, value in vars(module).items() if callable(value) and key[0] != "_"}
    own = {
        key: value
        for key, value in public.items()
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == name
    }
    text = api_reference.module(name).data
    shown = set(re.findall(rf'<dt id="{re.escape(name)}\.(\w+)">', text))
    assert shown == own.keys()
    for key, value in own.items():
        for field in getattr(value, "__dataclass_fields__", {}).keys() & vars(value).get("__annotations__", {}).keys():
            assert re.search(rf"<li><code>{field}: ", text), f"{key}.{field}"


def test_every_method_message_and_network_has_its_place() -> None:
    folders = ("methods", "wire", "data", "models")
    files = [path for folder in folders for path in (ROOT / "fedlib" / folder).rglob("[!_]*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    assert names <= set(SHOWN), "give each a heading and a cell in a page of book/reference"
    assert len(SHOWN) == len(set(SHOWN))


def test_each_module_stands_under_its_name() -> None:
    for page in PAGES:
        text = page.read_text()
        assert re.findall(r"^## (fedlib.*)$", text, re.MULTILINE) == re.findall(r'module\("([\w.]+)"\)', text)


def test_signature_docstring_and_comments_are_shown() -> None:
    text = api_reference.module("fedlib.runs.experiments").data
    assert "papers(root: Path | None=None) -&gt; list[str]" in text
    assert "_grid" not in text
    text = api_reference.module("fedlib.runs.spec").data
    assert "<code>cohort: Count</code>: clients a round, drawn by <code>sampling</code>" in text
    assert "or &quot;poisson&quot;" in text or 'or "poisson"' in text  # a comment on a line of its own
    assert "One run, completely" in text
