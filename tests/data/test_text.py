"""Texts by role: windows worked by hand, files that are no such text, and the real file where it is present."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_set import root_with, sha256

from fedlib.data import partition, sets, text
from fedlib.data.sources import load
from fedlib.data.text import NO_LABEL
from fedlib.engines.in_process import InProcess
from fedlib.errors import DataError
from fedlib.runs.rounds import run
from fedlib.runs.spec import Spec

FILE = "shakespeare/tinyshakespeare.txt"
# Every line with its newline is a window of 80 characters; two more characters make 20 windows with a label everywhere.
LINES = [letter * 79 for letter in "ABCDEFGHIJKLMNOPQRST"]
PLAY = "\n\n".join(
    [
        "ANNA:\n" + "a" * 60,
        "KING LEAR:\n" + "\n".join(LINES[:7]),
        "Ghost:",
        "\nSecond Lord:\nHi",  # after two blank lines
        "ANNA:\n" + "b" * 60,
        "KING LEAR:\n" + "\n".join(LINES[7:]),
        "KING LEAR:\nX\n",
    ]
)


def number(characters: str) -> list[int]:
    """By hand: newline, space, ten marks and the 3 are 0 to 12, then come A at 13 and a at 39."""
    places = {"\n": 0} | {chr(ord("A") + i): 13 + i for i in range(26)} | {chr(ord("a") + i): 39 + i for i in range(26)}
    return [places[character] for character in characters]


def stored(root: Path, content: str = PLAY) -> sets.Entry:
    """The file below `root`, and the entry that expects it."""
    path = root / "data-extra" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode())
    return replace(sets.find("shakespeare"), files=((FILE, sha256(path.read_bytes())),))


def test_windows_by_hand(tmp_path: Path) -> None:
    data = load(stored(tmp_path), tmp_path)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.train_x.shape == (21, 1, 80, 1) and data.train_y.shape == (21, 80)
    assert data.test_x.shape == (2, 1, 80, 1) and data.test_y.shape == (2, 80)
    x, y = data.train_x.flatten(1).long().tolist(), data.train_y.tolist()

    # Anna: 60 a, a newline between her speeches, 60 b: 120 places, so two windows and a tenth of a window to test
    assert x[0] == number("a" * 60 + "\n" + "b" * 19) and y[0] == number("a" * 59 + "\n" + "b" * 20)
    assert x[1] == number("b" * 40) + [0] * 40 and y[1] == number("b" * 40) + [NO_LABEL] * 40
    # Lear: a line each, then the first letter of the next; the last two of 20 windows are for testing
    for i in range(18):
        assert x[2 + i] == number(LINES[i] + "\n")
        assert y[2 + i] == number(LINES[i][1:] + "\n" + LINES[i + 1][0])
    assert data.test_x.flatten(1).tolist() == [number(LINES[i] + "\n") for i in (18, 19)]
    assert data.test_y.tolist() == [number(LINES[i][1:] + "\n" + after) for i, after in ((18, "T"), (19, "X"))]
    # the lord has one place; the ghost, who says nothing, is no role
    assert x[20] == number("H") + [0] * 79 and y[20] == number("i") + [NO_LABEL] * 79
    assert data.owners is not None and data.owners.dtype == np.int64
    assert data.owners.tolist() == [0] * 2 + [1] * 18 + [2]
    assert [*text.roles(tmp_path / "data-extra" / FILE)] == ["ANNA", "KING LEAR", "Second Lord"]

    dealt = partition.make(data.train_y.numpy(), clients=2, kind="natural", seed=0, owners=data.owners)
    assert [dealt.indices(k).tolist() for k in (0, 1)] == [[0, 1], [*range(2, 20)]]


def test_every_character_has_a_printable_name_of_its_own() -> None:
    names = sets.find("shakespeare").classes
    assert len(set(names)) == len(names) == 65 and all(name.isprintable() and name.strip() for name in names)
    assert names[:4] == ("newline", "space", "!", "$") and names[13] == "A" and names[39] == "a" and names[64] == "z"


@given(st.text(st.sampled_from(text.CHARACTERS), min_size=1, max_size=400))
def test_windows_hold_every_place_once(words: str) -> None:
    x, y = text.windows(words)
    assert x.shape == y.shape == (-(-(len(words) - 1) // 80), 80)
    labelled = y.ravel() != NO_LABEL
    assert labelled[: len(words) - 1].all() and not labelled[len(words) - 1 :].any()
    assert "".join(text.CHARACTERS[i] for i in x.ravel()[labelled]) == words[:-1]
    assert "".join(text.CHARACTERS[i] for i in y.ravel()[labelled]) == words[1:]
    assert not x.ravel()[~labelled].any()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "a speech begins with '', expected a name and a colon"),
        ("First Lord\nNo colon.\n", "a speech begins with 'First Lord'"),
        ("ANNA:\nHi\n\nand on without a name\n", "a speech begins with 'and on without a name'"),
        ("ANNA:\nCaf\u00e9\n", "has the character '\u00e9', which is none of the 65"),
        ("ANNA:\r\nHi\r\n", r"has the character '\\r'"),
    ],
)
def test_a_file_that_is_no_such_text(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        load(stored(tmp_path, content), tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "data-extra" / FILE) in message and "python -m fedlib data get shakespeare" in message


def test_a_language_model_trains_by_role(
    tmp_path: Path, tiny: Callable[..., Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    content = "".join(f"{name}:\n" + "To be, or not to be\n" * 60 + "\n" for name in ("ANNA", "HAMLET", "OPHELIA"))
    monkeypatch.setitem(sets.ENTRIES, "play", replace(stored(tmp_path, content), name="play"))
    spec = tiny(
        **dict(data="play", model="transformer", method="fedpt", hyper={"policy": "so/ffn"}, evaluate_every=1),
        **dict(partition={"kind": "natural", "seed": 0}, clients=2, cohort=2, rounds=3, epochs=2, batch=4, lr=0.1),
    )
    found = run(spec, InProcess(torch.device("cpu")), root=tmp_path)
    losses = [entry["loss"] for entry in found["rounds"]]
    assert losses[-1] < losses[0] < np.log(65)  # from the first round on better than a guess


# --- the real file, where it is ---


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return root_with("shakespeare", "tinyshakespeare.txt", tmp_path_factory)


def line_by_line(lines: list[str]) -> dict[str, str]:
    """What each role says, by another way than `text.roles`: a blank line announces a name."""
    said: dict[str, list[str]] = defaultdict(list)
    name, named = "", False
    for line in lines:
        if not line:
            named = False
        elif not named:
            name, named = line, True
            assert name[-1] == ":"
        else:
            said[name].append(line)
    return {name: "\n".join(said[name]) for name in said}


def test_real_roles_give_back_their_words(home: Path) -> None:
    """Training windows, then test windows of a role make up its text: no place is lost, and none is in both sets."""
    content = (home / "data-extra" / FILE).read_text()
    assert len(content) == 1_115_394 and "".join(sorted(set(content))) == text.CHARACTERS
    said = line_by_line(content.split("\n"))
    assert len(said) == 299
    data = load("shakespeare", home)
    assert data.owners is not None and np.unique(data.owners).tolist() == [*range(299)]
    assert len(data.train_x) == len(data.owners) == 11_799 and len(data.test_x) == 1_191
    tested, labels = 0, 0
    for role, words in enumerate(said.values()):
        mine = torch.from_numpy(data.owners == role)
        places = len(words) - 1
        share = -(-places // 80) // 10
        later = slice(tested, tested + share)
        x = torch.cat([data.train_x[mine], data.test_x[later]]).flatten().int().tolist()
        y = torch.cat([data.train_y[mine], data.test_y[later]]).flatten().tolist()
        assert len(y) == 80 * -(-places // 80)
        assert "".join(text.CHARACTERS[i] for i in x[:places]) == words[:-1] and not any(x[places:])
        assert "".join(text.CHARACTERS[i] for i in y[:places]) == words[1:] and {*y[places:]} <= {NO_LABEL}
        tested, labels = tested + share, labels + places
    assert tested == len(data.test_x) and labels == 1_027_254
    sizes = np.bincount(data.owners)
    assert [*said][sizes.argmax()] == "GLOUCESTER:" and sizes.max() == 424 and np.median(sizes) == 11
    spaces = (data.test_y == text.CHARACTERS.index(" ")).sum() / (data.test_y != NO_LABEL).sum()
    assert 0.16 < float(spaces) < 0.17, "what guessing a space everywhere gets right"
