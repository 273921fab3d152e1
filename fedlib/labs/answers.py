"""Is a value the right one? Held against a digest, so that the answer cannot be read off the source.

That keeps it from a glance, not from a search: whoever tries all integers finds the right one.
"""

from __future__ import annotations

import hashlib
import math
import operator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, SupportsFloat

import numpy as np

from fedlib.errors import FedlibError

EXPECTED = {
    "int": "a whole number of type int",
    "float": "a number, correct to {digits} digits",
    "array": "an array of integers or of truth values",
    "bytes": "bytes",
}


class NotYet(FedlibError):
    """An answer that is not right yet. Its message is one line, in a notebook too."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of a traceback
        return [f"NotYet: {self}"]


@dataclass(frozen=True)
class Value:
    """kind: a key of EXPECTED. digest: `digest_of` the right answer. look: what to look at. digits: of a float."""

    kind: str
    digest: str
    look: str
    digits: int = 3

    def test(self, question: str, answer: Any) -> None:
        """NotYet where the answer is of another kind, or has another digest."""
        forms = forms_of(self.kind, answer, self.digits)
        expected = EXPECTED[self.kind].format(digits=self.digits)
        if not forms:
            raise NotYet(f"Expected {expected}; this is {describe(answer)}. {self.look}")
        if self.digest not in [digest_of(question, form) for form in forms]:
            raise NotYet(f"Expected {expected}; the kind is right, the value is not. {self.look}")


def digest_of(question: str, form: bytes) -> str:
    """16 bytes in hex of an answer's canonical form; the question is the salt, so equal answers do not look equal."""
    return hashlib.blake2b(form, key=question.encode(), digest_size=16, person=b"fedlib labs").hexdigest()


def forms_of(kind: str, answer: Any, digits: int = 3) -> list[bytes]:
    """The canonical form of an answer first, then those of its neighbours; none where it is not of this kind.

    A float has two neighbours, one unit of its last digit away: machines may round the last digits differently. An
    array counts with its shape, and integers of every width alike.
    """
    if isinstance(answer, bool | np.bool_):
        return []
    if kind == "int":
        try:
            return [b"int %d" % operator.index(answer)]
        except TypeError:
            return []
    if kind == "float":
        return _floats(answer, digits)
    if kind == "array":
        values = np.asarray(answer)
        if values.ndim == 0 or values.dtype.kind not in "biu":
            return []
        plain = values.astype(np.uint8 if values.dtype.kind == "b" else "<i8")
        return [f"{'bool' if values.dtype.kind == 'b' else 'int'} {values.shape} ".encode() + plain.tobytes()]
    return [b"bytes " + bytes(answer)] if isinstance(answer, bytes | bytearray) else []


def _floats(answer: Any, digits: int) -> list[bytes]:
    if isinstance(answer, str) or np.ndim(answer) or not isinstance(answer, SupportsFloat):
        return []
    if not math.isfinite(number := float(answer)):
        return []
    middle = Decimal(f"{number:.{digits - 1}e}")
    unit = Decimal(1).scaleb((middle.adjusted() if middle else 0) - digits + 1)
    return [f"float {value:.{digits - 1}e}".encode() for value in (middle, middle - unit, middle + unit)]


def describe(answer: Any) -> str:
    """Type, and of an array dtype and shape."""
    if isinstance(answer, np.ndarray):
        return f"an array of {answer.dtype}, shape {answer.shape}"
    if isinstance(answer, float) and not math.isfinite(answer):
        return f"the float {answer}"
    return f"of type {type(answer).__name__}"
