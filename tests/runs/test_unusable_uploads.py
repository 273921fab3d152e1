"""Updates that cannot be used: refused, logged and counted; the round goes on, is repeated, or ends the run."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from jobs import CPU, MakeSpec, job_of
from projects import HERE, RUN, edit, put
from typing_extensions import override

from fedlib.__main__ import main
from fedlib.claims import measures, results
from fedlib.core.client import Job, Memories, Upload
from fedlib.core.uploads import LONGEST, Buffer, Update, Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError, RunError
from fedlib.runs import integrity, record, rounds
from fedlib.wire import container


class Tampered(InProcess):
    """The reference engine; `change(upload, round, attempt, position)` may replace what arrives."""

    def __init__(self, change: Callable[..., Any]) -> None:
        super().__init__(CPU)
        self.change = change
        self.broadcasts: list[tuple[int, bytes, list[int]]] = []

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        attempt = sum(number == round for number, _, _ in self.broadcasts)
        self.broadcasts.append((round, message, list(cohort)))
        for position, (client, upload) in enumerate(super().train(job, message, round, cohort, memories)):
            yield client, self.change(upload, round, attempt, position)


def repacked(upload: bytes, change: Callable[[list[bytearray]], object], kind: str | None = None) -> bytes:
    """The same message with other sections and a right checksum."""
    length = upload[4]
    name = upload[5 : 5 + length].rstrip(b"\0").decode()
    fingerprint, start = upload[5 + length : 13 + length], len(upload) - 4
    sections: list[bytearray] = []
    for size in reversed(container.section_sizes(upload)):
        sections.insert(0, bytearray(upload[start - size : start]))
        start -= size
    change(sections)
    samples = int.from_bytes(upload[13 + length : 17 + length], "little")
    address = (int.from_bytes(upload[at : at + 4], "little") for at in (17 + length, 21 + length))
    return container.address(container.pack(kind or name, fingerprint, samples, sections), *address)


def last_value(value: float) -> Callable[[list[bytearray]], object]:
    return lambda sections: sections[-1].__setitem__(slice(-4, None), np.float32(value).tobytes())


def restated(upload: bytes, samples: int) -> bytes:
    """The same upload, of so many samples."""
    at = 13 + upload[4]
    head = upload[:at] + samples.to_bytes(4, "little") + upload[at + 4 : -4]
    return head + (xxhash.xxh3_64_intdigest(head) % 2**32).to_bytes(4, "little")


def flipped(upload: bytes, at: int) -> bytes:
    return upload[:at] + bytes([upload[at] ^ 1]) + upload[at + 1 :]


BAD: dict[str, tuple[Callable[[bytes], Any], str]] = {
    "NaN": (lambda u: repacked(u, last_value(math.nan)), "nan"),
    "infinity": (lambda u: repacked(u, last_value(-math.inf)), "inf"),
    "too short": (lambda u: repacked(u, lambda sections: sections[-1].__delitem__(slice(-4, None))), "expected"),
    "too long": (lambda u: repacked(u, lambda sections: sections[-1].extend(bytes(4))), "at most"),
    "a section more": (lambda u: repacked(u, lambda sections: sections.append(bytearray(4))), "sections"),
    "another kind": (lambda u: repacked(u, lambda sections: None, "other.up"), "'other.up'"),
    "another method": (lambda u: container.pack("else.up", bytes(8), 1, [b"1234", b"5678"]), "of round 0 and client 0"),
    "altered in the middle": (lambda u: flipped(u, len(u) // 2), "altered"),
    "altered at the end": (lambda u: flipped(u, len(u) - 1), "altered"),
    "altered at the start": (lambda u: flipped(u, 0), "not a fedlib message"),
    "altered version": (lambda u: flipped(u, 3), "version"),
    "truncated": (lambda u: u[: len(u) // 2], "truncated"),
    "trailing bytes": (lambda u: u + b"x", "trailing"),
    "nothing": (lambda u: b"", "not a fedlib message"),
    "too many samples": (lambda u: restated(u, 60_000), "60000 training samples, this client has at most"),
    "no samples": (lambda u: restated(u, 0), "no training sample"),
    "not finite at the client": (lambda u: PayloadError("u is not finite"), "u is not finite"),
}
RUNS: list[dict[str, Any]] = [
    {"method": "fedavg", "model": "mlp"},
    {"method": "fedmrn", "model": "cnn2", "hyper": {"mask": "signed"}},  # with a section in full precision
]


@pytest.mark.parametrize("run", RUNS, ids=["fedavg", "fedmrn"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_update_is_refused_logged_and_counted_and_the_round_goes_on(
    tiny: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, run: dict[str, Any], bad: str
) -> None:
    def second(make: Callable[[bytes], Any]) -> Tampered:
        return Tampered(lambda upload, round, attempt, position: make(upload) if position == 1 else upload)

    spoil, words = BAD[bad]
    spec = tiny(**run, rounds=1, cohort=3, clients=40)
    engine = second(spoil)
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = rounds.run(spec, engine, root=tmp_path)
    (_, message, cohort), (entry,) = engine.broadcasts[0], found["rounds"]
    ((client, reason),) = entry["refused"]
    assert client == cohort[1] and words in reason
    assert entry["clients"] == [cohort[0], cohort[2]]
    assert found["final"]["refused"] == 1
    (line,) = [r.getMessage() for r in caplog.records if r.name == "fedlib"]
    assert str(client) in line and reason in line
    # What is left is what an engine gives in which that client could not send at all.
    without = rounds.run(spec, second(lambda upload: PayloadError("absent")), root=tmp_path)
    for name in ("accuracy", "loss"):
        assert found["final"][name] == without["final"][name]
    sent = InProcess(CPU).client(job_of(spec), message, 1, client)
    assert isinstance(sent, bytes)
    arrived = spoil(sent)
    size = len(arrived) if isinstance(arrived, bytes) else 0
    assert entry["uplink_bytes"] == without["rounds"][0]["uplink_bytes"] + size
    assert json.loads(record.text(found)) == json.loads(json.dumps(found)) | {"digest": integrity.digest(found)}


def test_refused_bytes_do_not_make_an_upload_look_smaller(tiny: MakeSpec, tmp_path: Path) -> None:
    """Bits per weight are measured on uploads; that some were refused changes their number, not their size."""
    spec = tiny(method="fedmrn", label="signed", rounds=1)
    clean = rounds.run(spec, InProcess(CPU), root=tmp_path)
    engine = Tampered(lambda u, round, attempt, position: flipped(u, len(u) // 2) if position else u)
    spoilt = rounds.run(spec, engine, root=tmp_path)
    assert spoilt["final"]["uplink_bytes"] == clean["final"]["uplink_bytes"] and spoilt["final"]["refused"] == 3
    tables = [results.runs([record]) for record in (clean, spoilt)]
    bits = [measures.bits_per_weight(table, ["signed"], ["main"], "mask")["signed, main, iid"] for table in tables]
    assert bits == [{spec.seed: 1.0}, {spec.seed: 1.0}]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_round_without_an_update_is_repeated_from_the_old_state(
    tiny: MakeSpec, tmp_path: Path, failures: int
) -> None:
    def change(upload: bytes, round: int, attempt: int, position: int) -> bytes:
        return flipped(upload, len(upload) // 2) if round == 2 and attempt < failures else upload

    engine = Tampered(change)
    found = rounds.run(tiny(cohort=3), engine, root=tmp_path)
    second = [(message, cohort) for number, message, cohort in engine.broadcasts if number == 2]
    assert len(second) == failures + 1
    assert len({message for message, _ in second}) == 1  # the old state, to the byte
    assert second[0][0] != engine.broadcasts[0][1]
    assert second[0][1] != second[1][1]  # another cohort
    entry, normal = found["rounds"][1], found["rounds"][0]
    assert [client for client, _ in entry["refused"]] == [c for _, cohort in second[:-1] for c in cohort]
    assert entry["clients"] == second[-1][1]
    assert len(entry["clients"]) == 3 and len(entry["refused"]) == 3 * failures
    assert entry["uplink_bytes"] == (failures + 1) * normal["uplink_bytes"]  # what was passed is paid for
    assert entry["downlink_bytes"] == (failures + 1) * normal["downlink_bytes"]
    assert [e["round"] for e in found["rounds"]] == [1, 2, 3]


def test_three_rounds_without_an_update_end_the_run(tiny: MakeSpec, tmp_path: Path) -> None:
    engine = Tampered(lambda upload, round, attempt, position: b"" if round == 2 else upload)
    with pytest.raises(RunError, match=r"round 2 got no usable update in 3 attempts.*not a fedlib message"):
        rounds.load_or_run(tiny(), engine, root=tmp_path)
    assert [number for number, _, _ in engine.broadcasts] == [1, 2, 2, 2]
    assert not record.path(tiny(), tmp_path).exists()


def test_training_that_diverges_ends_with_the_reason(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(digits, put("methods/fedavg/lr", 1e12))
    edit(digits, put(f"{HERE}/batch", 8))
    assert main([*RUN, "--only", "main_fedavg_*"]) == 2
    said = capsys.readouterr().err
    assert "no usable update in 3 attempts" in said and "finite" in said
    assert not (digits / "records").exists()


def test_a_record_never_holds_what_json_does_not_know(tiny: MakeSpec, tmp_path: Path) -> None:
    """After some steps of 1e12 weights are still finite, but outputs are not, and the loss is no number."""

    def no_number(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    for epochs in range(1, 7):
        with contextlib.suppress(RunError):
            found = rounds.run(tiny(lr=1e12, batch=1000, rounds=1, epochs=epochs), InProcess(CPU), root=tmp_path)
            json.loads(record.text(found), parse_constant=no_number)


def test_whatever_a_decoder_raises_its_client_is_refused_in_few_words() -> None:
    def decode(upload: Buffer) -> Update:
        errors = {
            b"a": ValueError("x" * 5000),
            b"b": PayloadError("y" * 5000),
            b"c": MemoryError(),
            b"d": KeyError("k"),
        }
        if bytes(upload) in errors:
            raise errors[bytes(upload)]
        return {"w": torch.full((2,), math.inf if upload == b"e" else 1.0)}, 1

    uploads = Uploads(enumerate([b"a", b"b", b"c", b"d", b"e", b"f"]))
    assert len(list(uploads.read(decode))) == 1 and uploads.accepted == [5]
    reasons = dict(uploads.refused)
    assert [reason[:9] for reason in reasons.values()] == [
        "ValueErro",
        "yyyyyyyyy",
        "MemoryErr",
        "KeyError:",
        "w: decode",
    ]
    assert max(map(len, reasons.values())) == LONGEST == 200


# Values


def enormous(value: float) -> Callable[[bytearray], None]:
    """A section of float32 all of which have this value."""

    def change(section: bytearray) -> None:
        section[:] = np.full(len(section) // 4, value, "<f4").tobytes()

    return change


def test_a_step_that_is_not_finite_keeps_the_old_model_and_names_the_round(
    tiny: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An update of 1e30 has a square, in the second moment of the server's Adam, that float32 cannot hold."""

    def change(upload: bytes, round: int, attempt: int, position: int) -> bytes:
        spoil = round == 2 and position == 0
        return repacked(upload, lambda sections: enormous(1e30)(sections[-1])) if spoil else upload

    spec = tiny(method="fedpt", hyper={"optimizer": "adam", "server_lr": 0.01}, rounds=3, cohort=2, evaluate_every=1)
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = rounds.run(spec, Tampered(change), root=tmp_path)
    kept = {entry["round"]: entry["kept"] for entry in found["rounds"] if "kept" in entry}
    assert kept.keys() == {2} and kept[2].startswith("own/") and kept[2].endswith("is not finite")
    assert any(f"round 2 keeps the old model: {kept[2]}" in message for message in caplog.messages)
    assert found["rounds"][1]["accuracy"] == found["rounds"][0]["accuracy"]
    assert found["rounds"][2]["loss"] != found["rounds"][1]["loss"], "and the run goes on"
    record.save(found, tmp_path)
    assert "fault" not in (record.load(spec, tmp_path) or {"fault": "absent"})


def test_a_change_out_of_proportion_is_not_taken_where_the_spec_says_so(tiny: MakeSpec, tmp_path: Path) -> None:
    def change(upload: bytes, round: int, attempt: int, position: int) -> bytes:
        spoil = round == 2 and position == 0
        return repacked(upload, lambda sections: enormous(1e20)(sections[0])) if spoil else upload

    honest = rounds.run(tiny(evaluate_every=1, rounds=2), InProcess(CPU), root=tmp_path)
    believed, kept = (
        rounds.run(tiny(evaluate_every=1, rounds=2, most_change=most), Tampered(change), root=tmp_path)
        for most in (0.0, 10.0)
    )
    assert "kept" not in believed["rounds"][1] and believed["final"]["accuracy"] < honest["final"]["accuracy"] - 0.2
    assert "most_change is 10" in kept["rounds"][1]["kept"]
    assert kept["final"]["accuracy"] == honest["rounds"][0]["accuracy"]
    assert kept["final"]["loss"] == honest["rounds"][0]["loss"]
    assert not [entry for entry in honest["rounds"] if "kept" in entry]


def test_a_loss_that_is_not_finite_is_told_apart_from_one_that_was_not_evaluated(
    tiny: MakeSpec, tmp_path: Path
) -> None:
    def change(upload: bytes, round: int, attempt: int, position: int) -> bytes:
        return repacked(upload, lambda sections: enormous(3e38)(sections[0])) if round == 2 else upload

    spec = tiny(evaluate_every=2, rounds=2)
    found = rounds.run(spec, Tampered(change), root=tmp_path)
    first, second = (entry["loss"] for entry in found["rounds"])
    assert first is None and second in ("nan", "inf")
    record.save(found, tmp_path)
    kept = record.load(spec, tmp_path)
    assert kept and "fault" not in kept and not math.isfinite(results.runs([kept])["loss"][0])
