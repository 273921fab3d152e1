"""The self-checks of the labs, and a prediction beside its outcome."""

from __future__ import annotations

from numbers import Real
from typing import Any

from fedlib.errors import SpecError, require_name
from fedlib.labs.answers import NotYet
from fedlib.labs.questions import QUESTIONS


def check(question: str, answer: Any) -> None:
    """Say "right", or raise NotYet with what kind of thing was expected and what to look at; never the answer.

    question: "lab/name", a key of QUESTIONS; SpecError for any other. answer: a value, a function, or a tuple of them.
    """
    require_name("question", question, QUESTIONS)
    parts = answer if isinstance(answer, tuple) else (answer,)
    if any(part is ... for part in parts):
        raise NotYet(f"{question}: not yet. This is still the stub; put your code in place of `...` in the cell above.")
    try:
        QUESTIONS[question].test(question, answer)
    except NotYet as wrong:
        raise NotYet(f"{question}: not yet. {wrong}") from wrong.__cause__
    print(f"{question}: right")


def compare(prediction: Any, outcome: float, unit: str = "") -> None:
    """Prediction and outcome side by side. The ellipsis stands for none; anything else must be a number."""
    number = isinstance(prediction, Real) and not isinstance(prediction, bool)
    if prediction is not ... and not number:
        raise SpecError(f"prediction: {prediction!r} must be a number, or ... for none")
    shown = f"{outcome:,.4g}" if isinstance(outcome, float) else f"{outcome:,}"
    said = f"The run gave {shown} {unit}".rstrip()
    if prediction is ...:
        print(f"You wrote down no prediction. {said}.")
    elif prediction == outcome:
        print(f"{said}, just as you said.")
    elif unit.startswith("%"):
        print(f"You said {prediction:,}. {said}: {outcome - prediction:+.3g} points from your number.")
    elif prediction * outcome > 0:
        factor = outcome / prediction
        print(f"You said {prediction:,}. {said}: {factor:.3g} times your number.")
    else:
        print(f"You said {prediction:,}. {said}.")
