"""Malformed messages, of all methods and both directions: each is refused with PayloadError, or is a valid one.

A valid one, as a flipped bit of a mask makes it, gives finite tensors of the same shapes. Lies that only one method can
meet are told in that method's own tests.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import peak_bytes, range_coded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from known_answers import TINY
from malformed import (
    CHANNELS,
    EVERY,
    Channel,
    altered,
    altered_heads,
    altered_sections,
    channels,
    cut_or_grown,
    not_finite,
    other_lengths,
)
from small_task import CPU
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from fedlib.methods.registry import METHODS
from fedlib.runs import build
from fedlib.runs.spec import Spec

pytestmark = [pytest.mark.usefixtures("one_thread"), range_coded]
every_channel = pytest.mark.parametrize(
    ("name", "direction"), CHANNELS, ids=[" ".join(channel) for channel in CHANNELS]
)


def test_every_method_is_here() -> None:
    assert {case.get("method", "fedavg") for case in EVERY.values()} == METHODS.keys()


@every_channel
def test_malformed_messages_are_refused(name: str, direction: str) -> None:
    channel = channels(name)[direction]
    assert channel.reads(channel.message) and channel.packed(channel.sections) == channel.message
    for lies in (cut_or_grown, altered, altered_heads, other_lengths):
        read = [what for what, message in lies(channel) if channel.reads(message)]
        assert not read, lies.__name__
    for index in channel.floats:
        assert not [what for what, message in not_finite(channel, index) if channel.reads(message)]


@every_channel
def test_messages_of_others_are_refused(name: str, direction: str) -> None:
    """Of other methods, settings or models, or the other direction; and under their names."""
    channel = channels(name)[direction]
    for theirs in (channels(other)[way] for other, way in CHANNELS):
        if theirs.label != channel.label:
            assert not channel.reads(theirs.message), theirs.label
            for label in (theirs.label, (theirs.label[0], channel.label[1]), (channel.label[0], theirs.label[1])):
                assert label == channel.label or not channel.reads(channel.packed(channel.sections, label)), label


@pytest.mark.parametrize("name", EVERY)
def test_every_setting_and_every_shape_is_in_the_fingerprint(name: str) -> None:
    method = build.job(Spec.from_dict(TINY | EVERY[name]), CPU).method
    task, shapes = method.task, method.task.weights
    seen = {method.fingerprint()}
    for setting in method.settings:
        other = method.bind(task)
        object.__setattr__(other, setting, "another")
        seen.add(other.fingerprint())
    for key, shape in shapes.items():
        for changed in ({key: torch.Size([shape[0] + 1, *shape[1:]])}, {key: torch.Size([shape.numel()])}):
            seen.add(method.bind(dataclasses.replace(task, weights=shapes | changed)).fingerprint())
    assert len(seen) == 1 + len(method.settings) + 2 * len(shapes)


@every_channel
def test_altered_sections_are_refused_or_read_rightly(name: str, direction: str) -> None:
    channel = channels(name)[direction]
    for _, message in altered_sections(channel):
        channel.reads(message)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(CHANNELS), st.lists(st.binary(max_size=24), min_size=1, max_size=4))
# No levels, and all entries at the first; 4,736 times one level, or zero, in a range without words.
@example(("fedpm regularized", "down"), [bytes(8), b"", b"\0"])
@example(("fedpm regularized", "down"), [bytes(8), bytes(4), b"\1\x80\x25"])
@example(("fedpm", "up"), [bytes(4), b"\1\x80\x25\0"])
def test_sections_of_any_bytes_are_refused_or_read_rightly(which: tuple[str, str], sections: list[bytes]) -> None:
    channel = channels(which[0])[which[1]]
    channel.reads(channel.packed(sections))
    for index, content in enumerate(sections[: len(channel.sections)]):
        channel.reads(channel.changed(index, content))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(CHANNELS), st.data())
def test_several_alterations_are_refused_or_leave_the_server_in_order(
    which: tuple[str, str], data: st.DataObject
) -> None:
    channel = channels(which[0])[which[1]]
    sections = [bytearray(part) for part in channel.sections]
    filled = [part for part in sections if part]
    for _ in range(data.draw(st.integers(1, 4)) if filled else 0):
        part = filled[data.draw(st.integers(0, len(filled) - 1))]
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    message = channel.packed([bytes(part) for part in sections])
    if channel.reads(message) and channel.serve:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in channel.serve(message).values())


# Memory


class Allocated(TorchFunctionMode):
    """Bytes of all tensors that torch's functions give inside."""

    total = 0

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.total += tensor.untyped_storage().nbytes()
        return result


def memory(channel: Channel, message: bytes) -> int:
    """Bytes that reading it takes at most: by Python and numpy at their peak, by torch in all."""
    with Allocated() as allocated:
        peak = peak_bytes(lambda: channel.reads(message))
    return peak + allocated.total


@every_channel
def test_no_message_takes_more_memory_than_a_few_models(name: str, direction: str) -> None:
    """Than reading an honest one takes, and four models."""
    channel = channels(name)[direction]
    limit = memory(channel, channel.message) + 4 * channel.model + 2**16
    for lies in (cut_or_grown, altered_heads, other_lengths):
        for number, (what, message) in enumerate(lies(channel)):
            if not number % 4:
                assert memory(channel, message) <= limit, (lies.__name__, what)
