"""Float32 tensors: bytes worked by hand, round trips, reading in place, and numbers that are not finite."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlib.errors import PayloadError
from fedlib.wire import container, floats

FINGERPRINT = bytes(range(8))


def test_floats_known_bytes() -> None:
    # IEEE 754: 1 = 3f800000, -2 = c0000000, 0.5 = 3f000000, smallest subnormal = 00000001.
    arrays = [np.array([[1.0], [-2.0]], np.float32), np.array(0.5, np.float32), np.array([2.0**-149], np.float32)]
    data = bytes.fromhex("0000803f 000000c0 0000003f 01000000")
    assert floats.encode(arrays).dtype == np.uint8
    assert floats.encode(arrays).tobytes() == data
    decoded = floats.decode(data, [(2, 1), (), (1,)])
    assert [array.tolist() for array in decoded] == [array.tolist() for array in arrays]


@given(
    st.lists(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
        ),
        max_size=4,
    )
)
def test_floats_round_trip(arrays: list[np.ndarray]) -> None:
    data = floats.encode([array.T for array in arrays])  # a transposed array is not contiguous
    decoded = floats.decode(data.tobytes(), [array.T.shape for array in arrays])
    for array, back in zip(arrays, decoded, strict=True):
        assert back.dtype == np.float32
        assert back.shape == array.T.shape
        assert back.tobytes() == array.T.tobytes()


def test_floats_are_read_in_place_and_cannot_be_changed() -> None:
    values = np.arange(6, dtype=np.float32)
    data = bytearray(container.pack("fedavg.up", FINGERPRINT, 1, [floats.encode([values])]))
    section = container.unpack(data, "fedavg.up", FINGERPRINT, [24]).sections[0]
    (array,) = floats.decode(section, [(2, 3)])
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))
    assert not array.flags.writeable
    assert not floats.decode(bytearray(values.tobytes()), [(6,)])[0].flags.writeable
    (unaligned,) = floats.decode(memoryview(bytes(1) + values.tobytes())[1:], [(6,)])
    assert unaligned.flags.aligned
    assert unaligned.tolist() == values.tolist()


@pytest.mark.parametrize(("bad", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_floats_not_finite(bad: float, text: str) -> None:
    arrays = [np.zeros(2, np.float32), np.array([0, bad, 0], np.float32)]
    data = b"".join(array.tobytes() for array in arrays)
    for call in (
        lambda names: floats.encode(arrays, names),
        lambda names: floats.decode(data, [(2,), (3,)], names),
    ):
        with pytest.raises(PayloadError, match=f"^tensor 1: value 1 is {text},"):
            call(None)
        with pytest.raises(PayloadError, match=f"^conv.bias: value 1 is {text},"):
            call(["conv.weight", "conv.bias"])


def test_floats_wrong_length_or_dtype() -> None:
    for size in (0, 11, 13, 16):
        with pytest.raises(PayloadError, match=f"{size} bytes, expected 12 for 2 tensors"):
            floats.decode(bytes(size), [(2,), (1,)])
    with pytest.raises(TypeError, match="w: float64, expected float32"):
        floats.encode([np.zeros(2)], ["w"])
