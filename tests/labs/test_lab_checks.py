"""The labs' self-checks tell right from wrong, in words that do not give the answer away."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab_answers import RIGHT, entropy, noisy_mean, pack, quantize, read, restore, write

from fedlib.errors import SpecError
from fedlib.labs import checks, properties, questions
from fedlib.labs.answers import NotYet, Value, digest_of, forms_of
from fedlib.wire import bits


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


@pytest.mark.parametrize("prediction", ["50", True, None, [3], 1j])
def test_a_prediction_in_words_is_no_number(prediction: Any) -> None:
    with pytest.raises(SpecError, match=r"^prediction: .* must be a number, or \.\.\. for none"):
        checks.compare(prediction, 3.0, "bytes")


# Functions: what is right, and the usual ways to be wrong

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
