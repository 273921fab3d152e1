"""Fetching and verifying of data sets: a tiny set, local servers, mirrors, a process killed half way."""

import gzip
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT, present
from tiny_set import FILES, IN_PLACE, NAMES, TINY, Capture, Serve, files_below, mirrored, sha256, zipped

from fedlib.data import sets, sources
from fedlib.data.sets import digest
from fedlib.data.sources import load
from fedlib.errors import DataError, SpecError


@pytest.fixture(autouse=True)
def no_mirror_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLIB_MIRROR", raising=False)


def test_fetched_from_a_server_then_loaded(tmp_path: Path, serve: Serve, capsys: Capture) -> None:
    entry = mirrored(serve(zipped()))
    assert not present(entry, tmp_path)
    assert sources.get(entry, tmp_path) == tmp_path / "data"
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "from mirror http://127.0.0.1" in said.out
    assert said.err == ""  # no progress where stderr is no terminal
    assert files_below(tmp_path) == IN_PLACE
    assert present(entry, tmp_path)

    data = load(entry, tmp_path)
    assert data.train_x.shape == (3, 1, 2, 2) and data.test_x.shape == (1, 1, 2, 2)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.train_y.tolist() == [2, 0, 1] and data.test_y.tolist() == [2]
    # the last pixel of the last image is 11: (11/255 - 0.5) / 0.25
    assert data.train_x[2, 0, 1, 1].item() == pytest.approx(-1.827451, abs=1e-6)
    assert data.train_x.is_contiguous()


def test_what_is_there_is_not_fetched_again(tmp_path: Path, serve: Serve, capsys: Capture) -> None:
    sources.get(mirrored(serve(zipped())), tmp_path)
    first = tmp_path / IN_PLACE[0]
    before = first.stat().st_mtime_ns
    sources.get(TINY, tmp_path)  # has no source at all
    assert "nothing to fetch" in capsys.readouterr().out
    (tmp_path / IN_PLACE[1]).unlink()
    sources.get(mirrored(serve(zipped())), tmp_path)
    assert first.stat().st_mtime_ns == before
    assert files_below(tmp_path) == IN_PLACE


def test_second_mirror_after_404(tmp_path: Path, serve: Serve, capsys: Capture) -> None:
    empty, full = serve({}), serve(zipped())
    sources.get(mirrored(empty, full), tmp_path)
    said = capsys.readouterr().out
    assert f"from mirror {full}," in said and f"mirror {empty}: HTTP Error 404" in said
    assert files_below(tmp_path) == IN_PLACE


@pytest.mark.parametrize(("name", "end"), [("shakespeare", "/input.txt"), ("spoken-digits", ".tar.gz")])
def test_a_public_address_has_our_name_for_the_file(name: str, end: str) -> None:
    entry = sets.find(name)
    public, ours = entry.mirrors[0][0].split("#")
    assert public.startswith("https://") and public.endswith(end)
    assert [path for path, _ in entry.files] == [f"{name}/{ours}"]


@pytest.mark.parametrize(
    ("bodies", "cut", "reason"),
    [
        (zipped(), 20, "then the connection ended"),
        ({name: body[:-12] for name, body in zipped().items()}, None, "ended before the end-of-stream marker"),
        (dict.fromkeys(zipped(), b"<html>log in first</html>"), None, "Not a gzipped file"),
    ],
)
def test_truncated_or_foreign_download(
    tmp_path: Path, serve: Serve, bodies: dict[str, bytes], cut: int | None, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        sources.get(mirrored(serve(bodies, cut)), tmp_path)
    assert "--mirror FOLDER" in str(caught.value)
    assert files_below(tmp_path) == []


def test_wrong_bytes_are_named_with_both_hashes(tmp_path: Path, serve: Serve) -> None:
    altered = FILES | {NAMES[0]: FILES[NAMES[0]][:-1] + b"\xff"}
    with pytest.raises(DataError) as caught:
        sources.get(mirrored(serve(zipped(altered))), tmp_path)
    message = str(caught.value)
    assert NAMES[0] in message and sha256(FILES[NAMES[0]]) in message and sha256(altered[NAMES[0]]) in message
    # the other three were right and stay; nothing else does
    assert files_below(tmp_path) == sorted(set(IN_PLACE) - {f"data/FashionMNIST/raw/{NAMES[0]}"})


def test_what_unpacks_to_more_than_it_may_is_stopped(tmp_path: Path, serve: Serve) -> None:
    """A few kilobytes that would become fifty megabytes, and a download that does not end where it should."""
    entry = replace(TINY, most=1_000_000)
    bomb = zipped() | {f"{NAMES[0]}.gz": gzip.compress(bytes(50_000_000))}
    with pytest.raises(DataError, match=f"{NAMES[0]}: more than the 1,000,000 bytes that it may have; stopped"):
        sources.get(mirrored(serve(bomb), entry=entry), tmp_path)
    long = zipped() | {f"{NAMES[0]}.gz": bytes(5_000_000)}
    with pytest.raises(DataError, match=r"gz: more than the 4,000,000 bytes"):
        sources.get(mirrored(serve(long), entry=entry), tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]
    assert not left


def test_every_source_is_named_when_none_answers(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without apt-get
    one, two = serve({}), serve({})
    entry = replace(mirrored(one, two), package="dataset-tiny")
    with pytest.raises(DataError) as caught:
        sources.get(entry, tmp_path, mirror=tmp_path / "absent")
    message = str(caught.value)
    for part in (
        *(f"mirror folder {tmp_path / 'absent'}: no such folder", f"mirror {one}: HTTP", f"mirror {two}: HTTP"),
        *("Debian's package dataset-tiny: no apt-get on this machine", "FEDLIB_MIRROR=FOLDER", "data get tiny"),
    ):
        assert part in message


def test_killed_half_way(tmp_path: Path, serve: Serve) -> None:
    """A real process is killed while the server holds back the rest of a file; the next fetch mends all."""
    script = """
        import sys
        from pathlib import Path
        from fedlib.data import sources
        from tiny_set import mirrored
        sources.get(mirrored(sys.argv[1]), Path(sys.argv[2]))
    """
    started = threading.Event()
    address = serve(zipped(), held={f"{NAMES[2]}.gz": started})
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), address, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert started.wait(300)
    time.sleep(0.05)
    process.kill()
    assert process.wait()
    in_data = files_below(tmp_path / "data")
    assert in_data == sorted(f"FashionMNIST/raw/{name}" for name in NAMES[:2])
    assert all((tmp_path / "data/FashionMNIST/raw" / name).read_bytes() == FILES[name] for name in NAMES[:2])
    sources.get(mirrored(serve(zipped())), tmp_path)
    assert present(TINY, tmp_path)
    assert files_below(tmp_path / "data") == sorted(f"FashionMNIST/raw/{name}" for name in NAMES)


@pytest.mark.parametrize(
    "layout", ["{}", "{}.gz", "any/{}", "any/{}.gz", "FashionMNIST/raw/{}", "data/FashionMNIST/raw/{}"]
)
def test_mirror_folder(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw in FILES.items():
        path = tmp_path / "mirror" / layout.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
        # MNIST has files of the same names, which must not be taken for these
        (tmp_path / "mirror" / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / "MNIST" / name).write_bytes(b"another set")
    monkeypatch.setenv("FEDLIB_MIRROR", str(tmp_path / "mirror"))
    sources.get(TINY, tmp_path / "home")
    assert files_below(tmp_path / "home") == IN_PLACE
    monkeypatch.setenv("FEDLIB_MIRROR", str(tmp_path / "absent"))
    sources.get(TINY, tmp_path / "other", mirror=tmp_path / "mirror")  # the argument goes first
    assert files_below(tmp_path / "other") == IN_PLACE


def test_mirror_folder_without_the_files(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    with pytest.raises(DataError, match="mirror: has not all of the files"):
        sources.get(TINY, tmp_path, mirror=tmp_path / "mirror")


def test_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for apt-get hands out a real package made here, if told to keep its state in private folders."""
    if not Path("/usr/bin/dpkg-deb").exists():
        pytest.skip("no dpkg-deb on this machine")
    content = tmp_path / "package"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN" / "control").write_text(
        "Package: dataset-tiny\nVersion: 1\nArchitecture: all\nMaintainer: none <none@localhost>\nDescription: tiny\n"
    )
    (content / "usr" / "share" / "tiny").mkdir(parents=True)
    for name, body in zipped().items():
        (content / "usr" / "share" / "tiny" / name).write_bytes(body)
    built = tmp_path / "dataset-tiny_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", content, built], check=True, capture_output=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text(
        f"""#!/bin/sh
        case "$*" in
        *Dir::State::Lists={tmp_path}*Dir::Cache={tmp_path}*) ;;
        *) echo "E: not private" >&2; exit 100 ;;
        esac
        case "$*" in
        *" update") echo "W: one repository did not answer" >&2; exit 100 ;;
        *" download dataset-tiny") cp {built} . ;;
        *) echo "E: Unable to locate package" >&2; exit 100 ;;
        esac
        """
    )
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    home = tmp_path / "home"
    sources.get(replace(TINY, package="dataset-tiny"), home)
    assert files_below(home) == IN_PLACE
    with pytest.raises(DataError, match="one repository did not answer; E: Unable to locate package"):
        sources.get(replace(TINY, package="dataset-other"), tmp_path / "other")
    assert files_below(tmp_path / "other") == []


def test_altered_and_missing_files_are_named(tmp_path: Path, serve: Serve) -> None:
    entry = replace(mirrored(serve(zipped())), name="fashion-mnist")
    sources.get(entry, tmp_path)
    altered, gone = (tmp_path / "data/FashionMNIST/raw" / name for name in NAMES[:2])
    raw = bytearray(altered.read_bytes())
    raw[-1] ^= 1
    altered.write_bytes(raw)
    gone.unlink()
    with pytest.raises(DataError) as caught:
        load(entry, tmp_path)
    message = str(caught.value)
    assert f"{altered}: expected {sha256(FILES[NAMES[0]])}, found {sha256(bytes(raw))}" in message
    assert f"{gone}: expected {sha256(FILES[NAMES[1]])}, found no file" in message
    assert "python -m fedlib data get fashion-mnist" in message
    sources.get(entry, tmp_path)  # mends both
    assert load(entry, tmp_path).train_y.tolist() == [2, 0, 1]


@pytest.mark.parametrize("use", [load, digest, sources.get, sources.verify])
def test_unknown_name(use: Callable[..., Any]) -> None:
    with pytest.raises(
        SpecError, match=r"^data: unknown data set 'mnist'; allowed: fashion-mnist, cifar10, cifar10-jpeg"
    ):
        use("mnist")


def test_digest_changes_with_what_decides_the_numbers() -> None:
    others = [
        replace(TINY, files=TINY.files[:3]),
        replace(TINY, mean=(0.4,)),
        replace(TINY, std=(0.4,)),
        replace(TINY, scale=1.0),
        replace(TINY, version=2),
        replace(TINY, shipped="sha256:00"),
    ]
    assert len({digest(TINY), *map(digest, others), *map(digest, sets.ENTRIES)}) == 7 + len(sets.ENTRIES)
    # where a file comes from does not matter
    assert digest(replace(TINY, package="p", archive="a", mirrors=[["x"]])) == digest(TINY)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    assert sources.home() == tmp_path
    monkeypatch.delenv("FEDLIB_HOME")
    assert sources.home() == ROOT.resolve()
