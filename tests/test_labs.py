"""The labs: self-checks that tell right from wrong, notebooks that hold what they should, a codec in the loop."""

import contextlib
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlib.__main__ import main
from fedlib.errors import FedlibError, RunError, SpecError
from fedlib.labs import checks, notebooks, plots, properties, questions, runs
from fedlib.labs.answers import NotYet, Value, digest_of, forms_of
from fedlib.methods import registry
from fedlib.rng import uniform
from fedlib.wire import bits

PAGES = notebooks.sources()
NAMES = [page.stem for page in PAGES]
Cell = Any


def value(kind: str, answer: Any, digits: int = 3) -> Value:
    return Value(kind, digest_of("a/b", forms_of(kind, answer, digits)[0]), "Look here.", digits)


# Values


@pytest.mark.parametrize(
    ("kind", "right", "also", "wrong", "other"),
    [
        ("int", 5, np.int32(5), 6, 5.0),
        ("int", 5, torch.tensor(5), -5, True),
        ("float", 2.72, 2.7231, 2.75, "2.72"),
        ("float", 0.0625, 0.06251, 0.07, math.nan),
        ("float", 30, 30.01, 31, np.ones(1)),
        ("array", np.array([2, 1]), [2, 1], np.array([1, 2]), np.array([2.0, 1.0])),
        ("array", np.array([2, 1]), torch.tensor([2, 1]), np.array([[2, 1]]), 2),
        ("array", np.array([True, False]), [True, False], np.array([1, 0]), None),
        ("bytes", b"ab", bytearray(b"ab"), b"ba", "ab"),
    ],
)
def test_a_value_is_right_wrong_or_of_another_kind(kind: str, right: Any, also: Any, wrong: Any, other: Any) -> None:
    asked = value(kind, right)
    asked.test("a/b", right)
    asked.test("a/b", also)
    with pytest.raises(NotYet, match=r"the value is not\. Look here\."):
        asked.test("a/b", wrong)
    with pytest.raises(NotYet, match=r"^Expected .*; this is "):
        asked.test("a/b", other)


@given(st.floats(1e-9, 1e9), st.integers(2, 6), st.floats(-1e-9, 1e-9))
def test_a_float_is_right_however_its_last_bits_are_rounded(number: float, digits: int, off: float) -> None:
    asked = value("float", number, digits)
    asked.test("a/b", number * (1 + off))
    with pytest.raises(NotYet):
        asked.test("a/b", number * (1 + 30 * 10.0**-digits))


def test_digests_are_what_they_were() -> None:
    assert digest_of("a/b", b"int 5") == "ea667b71498d3827c49caa88a1d851fc"
    assert digest_of("a/c", b"int 5") == "8f53ebc1b244bf0ef3191f471abd469e"
    assert forms_of("float", 0.0999) == [b"float 9.99e-2", b"float 9.98e-2", b"float 1.00e-1"]
    assert forms_of("array", [True])[0] == b"bool (1,) \x01"


# check


def test_a_right_answer_is_called_right_and_a_wrong_one_not_yet(capsys: pytest.CaptureFixture[str]) -> None:
    checks.check("learn-a-mask/mask-bytes", np.int64(4736) // 8)
    assert capsys.readouterr().out == "learn-a-mask/mask-bytes: right\n"
    with pytest.raises(NotYet, match=r"^learn-a-mask/mask-bytes: not yet\. Expected a whole number") as wrong:
        checks.check("learn-a-mask/mask-bytes", 4736)
    assert "592" not in str(wrong.value)
    assert wrong.value._render_traceback_() == [f"NotYet: {wrong.value}"]
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("question", questions.QUESTIONS)
@pytest.mark.parametrize("answer", [..., None, (...,), (), "text", 3, 1.5, np.zeros(2), lambda *_: None, (print, len)])
def test_whatever_is_no_answer_is_not_yet(question: str, answer: Any) -> None:
    with pytest.raises(NotYet, match=re.escape(question)):
        checks.check(question, answer)


def test_an_unknown_question_is_named() -> None:
    with pytest.raises(SpecError, match="question: 'lab-9/x' is unknown"):
        checks.check("lab-9/x", 1)


def test_a_prediction_is_compared_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    for prediction, outcome in ((..., 5), (5, 5), (2, 5.0), (0, 5), (2, -0.5)):
        checks.compare(prediction, outcome, "bytes")
    checks.compare(90, 94.4, "% of the test images")
    assert capsys.readouterr().out.splitlines() == [
        "You wrote down no prediction. The run gave 5 bytes.",
        "The run gave 5 bytes, just as you said.",
        "You said 2. The run gave 5 bytes: 2.5 times your number.",
        "You said 0. The run gave 5 bytes.",
        "You said 2. The run gave -0.5 bytes.",
        "You said 90. The run gave 94.4 % of the test images: +4.4 points from your number.",
    ]


# Functions: what is right, and the usual ways to be wrong


def quantize(x: Any, s: int, rng: Any, how: str = "") -> Any:
    low, step = float(x.min()), float(np.ptp(x)) / (s + (how == "levels"))
    if step == 0 and how != "zero":
        return np.zeros(len(x), np.int64), low, 0.0
    place = (x - low) / (np.float32(step) if step else 1e-30)
    drawn = np.rint(place) if how == "nearest" else np.floor(place + rng.random(len(x)))
    return np.minimum(drawn, s).astype(np.float32 if how == "floats" else np.int64), low, step


def restore(levels: Any, low: float, step: float) -> Any:
    return low + step * levels.astype(np.float64)


def pack(levels: Any, width: int) -> bytes:
    return bits.pack(np.asarray(levels, np.uint8), width)


def read(data: bytes, d: int, magnitude: float) -> Any:
    return uniform(int.from_bytes(data[:8], "little"), 0, d) * np.float32(magnitude) * bits.unpack(data[8:], d)


def write(seed: int, mask: Any) -> bytes:
    return seed.to_bytes(8, "little") + bits.pack(mask)


def clip(u: Any, bound: float) -> Any:
    return u * min(1.0, bound / max(float(np.linalg.norm(u)), 1e-20))


def noisy_mean(us: Any, bound: float, z: float, rng: Any) -> Any:
    return (sum(clip(u, bound) for u in us) + z * bound * rng.standard_normal(len(us[0]))) / len(us)


def find(u: Any, n: Any, rng: Any) -> Any:
    return rng.random(len(u)) < u / n


def on_front(costs: Any, accuracies: Any) -> Any:
    points = list(zip(costs, accuracies, strict=True))
    return np.array([not any(c <= p and a >= q and (c, a) != (p, q) for c, a in points) for p, q in points])


def entropy(p: float) -> float:
    return sum(-q * math.log2(q) for q in (p, 1 - p) if q)


FLOATS: tuple[Any, Any] = (lambda u, rng: u.tobytes(), lambda data, d: np.frombuffer(data, np.float32))
RIGHT: dict[str, Any] = {
    "quantize-and-pack/quantizer": (quantize, restore),
    "quantize-and-pack/packing": (pack, bits.unpack),
    "learn-a-mask/mask": lambda s, c: (torch.logit(c) < s).float(),
    "learn-a-mask/straight-through": lambda t, m: m + t - t.detach(),
    "make-it-sparse/entropy": entropy,
    "update-inside-noise/chance": lambda u, n: np.minimum(np.maximum(u / n, 0), 1),
    "update-inside-noise/mask": find,
    "update-inside-noise/message": (write, read),
    "freeze-and-privacy/clip": clip,
    "freeze-and-privacy/noisy-mean": noisy_mean,
    "design-a-codec/front": on_front,
    "design-a-codec/codec": FLOATS,
}
kept: list[Any] = []


def remember(u: Any, rng: Any) -> bytes:
    kept.append(u)
    return b""


def unscaled(us: Any, bound: float, z: float, rng: Any) -> Any:
    """Noise that knows of no bound, added to the mean and not to the sum."""
    return noisy_mean(us, bound, 0, rng) + z * rng.standard_normal(len(us[0]))


WRONG: list[tuple[str, Any, str]] = [
    (
        "quantize-and-pack/quantizer",
        (lambda x, s, rng: quantize(x, s, rng, "nearest"), restore),
        "the mean of 200 draws",
    ),
    ("quantize-and-pack/quantizer", (lambda x, s, rng: quantize(x, s, rng, "levels"), restore), "With s = 1"),
    (
        "quantize-and-pack/quantizer",
        (lambda x, s, rng: quantize(x, s, rng, "floats"), restore),
        "levels should be an array of",
    ),
    ("quantize-and-pack/quantizer", (lambda x, s, rng: 1 / 0, restore), "raised ZeroDivisionError"),
    ("quantize-and-pack/packing", (lambda v, w: np.asarray(v, np.uint8).tobytes(), bits.unpack), "fill 1 bytes|fill"),
    ("quantize-and-pack/packing", (pack, lambda data, n, w: np.zeros(n, int)), "do not come back"),
    ("learn-a-mask/mask", lambda s, c: (c > torch.sigmoid(s)).float(), "the mask is another"),
    ("learn-a-mask/mask", lambda s, c: c < torch.sigmoid(s), "should return a tensor of floats"),
    ("learn-a-mask/straight-through", lambda t, m: m, "No gradient reaches theta"),
    ("learn-a-mask/straight-through", lambda t, m: t, "The value should be the mask's"),
    ("learn-a-mask/straight-through", lambda t, m: m + 2 * (t - t.detach()), "should be 1 for each entry"),
    ("make-it-sparse/entropy", lambda p: entropy(p) * math.log(2), "base 2"),
    ("make-it-sparse/entropy", lambda p: [entropy(p)], "should return one number"),
    ("make-it-sparse/entropy", lambda p: -p * math.log2(p) - (1 - p) * math.log2(1 - p), "raised ValueError"),
    ("update-inside-noise/chance", lambda u, n: u / n, "between 0 and 1"),
    ("update-inside-noise/mask", lambda u, n, rng: u / n > 0.5, "with probability u / noise"),
    ("update-inside-noise/mask", lambda u, n, rng: rng.random(len(u)) < abs(u / n), "within 0 and 1"),
    ("update-inside-noise/message", (lambda s, m: s.to_bytes(8, "big") + bits.pack(m), read), "lowest byte first"),
    ("update-inside-noise/message", (write, lambda data, d, a: read(data, d, 2 * a)), "read does not give"),
    ("freeze-and-privacy/clip", lambda u, bound: np.clip(u, -bound, bound), "as a whole"),
    ("freeze-and-privacy/clip", lambda u, bound: u * (bound / np.linalg.norm(u)), "raised|as a whole|not finite"),
    ("freeze-and-privacy/noisy-mean", lambda us, b, z, rng: noisy_mean(us, b, 3 * z, rng), "deviation of the noise"),
    ("freeze-and-privacy/noisy-mean", lambda us, b, z, rng: noisy_mean(us, 1e9, z / 1e9 * b, rng), "clipped updates"),
    ("freeze-and-privacy/noisy-mean", unscaled, "deviation of the noise"),
    ("design-a-codec/front", lambda c, a: np.array(a) >= 0.9, "others are on the front"),
    ("design-a-codec/codec", (remember, lambda data, d: kept[-1][:d]), "shape|not point"),
    ("design-a-codec/codec", (lambda u, rng: (-u).tobytes(), lambda b, d: np.frombuffer(b, "<f4")), "not point"),
    ("design-a-codec/codec", (lambda u, rng: u.astype(float).tobytes(), np.frombuffer), "takes at most"),
]


def test_every_question_for_a_function_has_a_right_one_and_a_wrong_one_here() -> None:
    asked = {name for name, question in questions.QUESTIONS.items() if isinstance(question, properties.Property)}
    assert RIGHT.keys() == asked == {question for question, _, _ in WRONG}


@pytest.mark.parametrize("question", RIGHT)
def test_right_functions(question: str) -> None:
    checks.check(question, RIGHT[question])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("quantize-and-pack/quantizer", (lambda x, s, rng: list(quantize(x, s, rng)), restore)),
        ("learn-a-mask/mask", lambda s, c: (torch.logit(c) < s).double()),
        ("make-it-sparse/entropy", lambda p: np.asarray(entropy(p))),
        ("make-it-sparse/entropy", lambda p: torch.tensor(entropy(p), dtype=torch.float64)),
    ],
)
def test_right_functions_that_return_other_types(question: str, answer: Any) -> None:
    checks.check(question, answer)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # of the wrong function itself
@pytest.mark.parametrize(("question", "answer", "text"), WRONG)
def test_wrong_functions(question: str, answer: Any, text: str) -> None:
    with pytest.raises(NotYet, match=text):
        checks.check(question, answer)


# Runs


def test_a_codec_is_a_method_while_it_is_tried_and_sends_its_bytes() -> None:
    with runs.trying(*FLOATS, "mine") as name:
        mine = runs.train(runs.spec(name, rounds=2))
        with (
            pytest.raises(SpecError, match="name: 'mine' is a method already"),
            runs.trying(*FLOATS, "mine"),
        ):
            pass
    assert "mine" not in registry.METHODS
    plain = runs.train(runs.spec("fedavg", rounds=2))
    assert mine.accuracy == pytest.approx(plain.accuracy, abs=0.02)  # the same sums, in another order
    assert mine.uploads == plain.uploads == 10
    assert 0 < mine.uplink_bytes - mine.uploads * 4 * 4736 < mine.uploads * 64
    assert [entry["paper_bits"] for entry in mine.rounds] == [5 * 32 * 4736] * 2


def test_what_a_codec_drops_comes_back_with_error_feedback() -> None:
    half = np.arange(4736) < 2368  # all that this codec ever sends

    def encode(u: Any, rng: np.random.Generator) -> bytes:
        lost.append(float(np.linalg.norm(u[~half])))
        u[~half] = 0  # its own copy
        return u.tobytes()

    for feedback in (False, True):
        lost: list[float] = []
        with runs.trying(encode, FLOATS[1]) as name:
            runs.train(runs.spec(name, rounds=4, clients=1, cohort=1, feedback=feedback))
        assert (lost[3] > 2 * lost[0]) == feedback  # kept by the client, and added to


@pytest.mark.parametrize(
    ("encode", "decode", "reason"),
    [
        (lambda u, rng: u, lambda data, d: None, "encode gave ndarray, expected bytes"),
        (lambda u, rng: b"", lambda data, d: np.zeros(d - 1), r"decode gave shape \(4735,\)"),
        (lambda u, rng: b"", lambda data, d: np.full(d, np.nan), "finite"),
        (lambda u, rng: bytes(8 * len(u)), lambda data, d: np.zeros(d), "the model allows at most"),
    ],
)
def test_a_codec_that_does_not_work_is_refused(encode: Any, decode: Any, reason: str) -> None:
    with runs.trying(encode, decode) as name, pytest.raises(RunError, match=reason):
        runs.train(runs.spec(name, rounds=1, epochs=1))
    assert "codec" not in registry.METHODS


def test_a_codec_draws_from_the_run_s_seed() -> None:
    drawn: list[float] = []

    def encode(u: Any, rng: np.random.Generator) -> bytes:
        drawn.append(rng.random())
        return u.tobytes()

    for seed in (0, 0, 1):
        with runs.trying(encode, FLOATS[1]) as name:
            runs.train(runs.spec(name, rounds=1, epochs=1, seed=seed))
    assert drawn[:5] == drawn[5:10] and len(set(drawn)) == 10


def test_an_exchange_and_an_update_are_of_the_same_client() -> None:
    broadcast, upload = runs.exchange(runs.spec("fedavg"))
    assert len(upload) == 4 * 4736 + 36 and len(broadcast) == len(upload) + 4
    u = runs.update()
    assert u.shape == (4736,) and u.dtype == np.float32 and 0.1 < np.linalg.norm(u) < 10
    sent = np.frombuffer(upload, "<f4", count=4736, offset=32) - np.frombuffer(broadcast, "<f4", count=4736, offset=36)
    assert np.allclose(sent, u, atol=1e-4)  # the same steps, taken from another point


def test_the_plot_says_what_it_shows() -> None:
    results = {name: runs.Result(0.9, size, 0, 1, []) for name, size in (("one", 1000), ("two", 2000))}
    drawn = plots.pareto(results, [True, False])
    assert "one 1 kB, 90.0 %; two 2 kB, 90.0 %. On the front: one." in drawn.body


# Notebooks


def cells(*sources: tuple[str, str, list[str]]) -> Any:
    made = nbformat.v4.new_notebook()
    for kind, source, tags in sources:
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        made.cells.append(new(source, metadata={"tags": tags} if tags else {}))
    return made


def test_a_solution_becomes_a_stub_that_names_what_others_read() -> None:
    solution = "import math\nsecret = 3\na: int = secret\ndef f(x):\n    inner = x\n    return inner\nb, unread = 1, 2"
    notebook = cells(
        ("code", "import os", ["hide-input"]),
        ("code", solution, ["solution", "hide-input"]),
        ("code", "print(f(a), b)", []),
    )
    made = notebooks.student(notebook)
    assert made.cells[1].source == "# Your code\na = ...\nf = ...\nb = ..."
    assert [cell.metadata for cell in made.cells] == [{}, {}, {}]
    assert notebooks.teacher(notebook).cells[1].source == f"# Solution\n{solution}"
    assert notebook.cells[1].source == solution  # the argument is left as it was
    with pytest.raises(FedlibError, match="defines no name"):
        notebooks.student(cells(("code", "print(1)", ["solution"])))


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        ("(label)=\n# Title", "# Title"),
        ("see {ref}`Counting <counting-bytes>`, {ref}`counting-bytes`", "see *Counting*, *counting bytes*"),
        ("{ref}`two\nlines <label>`", "*two\nlines*"),
        ("{math}`x = 1` {cite:p}`mcmahan2017`", "$x = 1$ [mcmahan2017]"),
        ("$$\nx\n$$ (name)\nmore", "$$\nx\n$$\nmore"),
        (
            "```{admonition} Why\n:class: tip\n\nBecause.\n\nYes.\n```\nmore",
            "> **Why**\n>\n> Because.\n>\n> Yes.\nmore",
        ),
        (":::{note}\nOne.\n:::", "> **Note**\n>\n> One."),
    ],
)
def test_myst_becomes_what_plain_jupyter_shows(myst: str, plain: str) -> None:
    assert notebooks.readable(myst) == plain


@pytest.mark.parametrize("myst", ["{glue:text}`x`", "```{figure} x.png\n```"])
def test_myst_without_a_plain_form_is_refused(myst: str) -> None:
    with pytest.raises(FedlibError, match="has no plain form"):
        notebooks.readable(myst)


def code(notebook: Any) -> list[Cell]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_seven_labs_and_each_question_is_asked_once() -> None:
    assert [name[0] for name in NAMES] == list("1234567")
    text = "".join(page.read_text() for page in PAGES)
    assert re.findall(r'checks\.check\("([^"]+)"', text) == list(questions.QUESTIONS)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_solution_leaks_into_a_student_s_notebook(page: Path) -> None:
    source, made = jupytext.read(page), notebooks.student(jupytext.read(page))
    lines = {line.strip() for cell in made.cells for line in cell.source.splitlines()}
    solutions = [cell for cell in code(source) if notebooks.solves(cell)]
    assert solutions
    for cell in solutions:
        assert not lines & {line.strip() for line in cell.source.splitlines() if line.strip()}
    assert len(code(made)) == len(code(source))
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(made))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_check_follows_each_solution_and_a_prediction_is_asked_for(page: Path) -> None:
    found = code(jupytext.read(page))
    for cell, after in itertools.pairwise(found):
        if notebooks.solves(cell):
            assert after.source.startswith("checks.check(") and not after.metadata.get("tags")
    assert any(re.search(r"^\w.* = \.\.\.(, \.\.\.)?  # ", cell.source, re.MULTILINE) for cell in found)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_both_notebooks_are_made_the_same_every_time_and_are_valid(page: Path) -> None:
    made = notebooks.made(page)
    assert made == notebooks.made(page)
    assert made.keys() == {"student", "teacher"}
    for data in made.values():
        nbformat.validate(nbformat.reads(data.decode(), as_version=4))
        assert not re.search(rb"\{(ref|admonition|note|math)\}|^\(|\)=\\n", data)


def executed(page: Path, kind: Callable[[Any], Any], folder: Path) -> Any:
    """A notebook after a kernel has run it, up to the first error."""
    notebook = kind(jupytext.read(page))
    with contextlib.suppress(nbclient.exceptions.CellExecutionError):
        nbclient.NotebookClient(
            notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_teacher_s_notebook_runs_to_its_end(page: Path, tmp_path: Path) -> None:
    made = executed(page, notebooks.teacher, tmp_path)
    outputs = [output for cell in code(made) for output in cell.outputs]
    assert [output.evalue for output in outputs if output.output_type == "error"] == []
    assert all(cell.execution_count for cell in code(made))
    assert "Computing in this lab" in outputs[-1].text
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert list(tmp_path.iterdir()) == []  # neither records nor checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_student_s_notebook_stops_at_its_first_check(page: Path, tmp_path: Path) -> None:
    made = executed(page, notebooks.student, tmp_path)
    first = next(index for index, cell in enumerate(code(made)) if cell.source.startswith("checks.check("))
    errors = [
        (index, output)
        for index, cell in enumerate(code(made))
        for output in cell.outputs
        if output.output_type == "error"
    ]
    ((index, error),) = errors
    assert index == first
    assert error.ename == "NotYet" and "still the stub" in error.evalue
    assert error.traceback == [f"NotYet: {error.evalue}"] and "\n" not in error.evalue


# Files


def test_the_command_writes_both_kinds_and_keeps_what_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "course"
    assert main(["labs", "--folder", str(folder)]) == 0
    files = sorted(folder.rglob("*.ipynb"))
    assert [path.relative_to(folder).as_posix() for path in files] == [
        f"{kind}/{name}.ipynb" for kind in ("student", "teacher") for name in NAMES
    ]
    assert len(capsys.readouterr().out.splitlines()) == 14
    before = {path: path.read_bytes() for path in files}

    files[0].write_text("my work")
    files[1].unlink()
    assert main(["labs", "--folder", str(folder)]) == 2
    said = capsys.readouterr().err
    assert files[0].name in said and "--replace" in said and "Traceback" not in said
    assert files[0].read_text() == "my work" and not files[1].exists()

    assert main(["labs", "--folder", str(folder), "--replace"]) == 0
    assert {path: path.read_bytes() for path in files} == before


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["labs", "--folder", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
