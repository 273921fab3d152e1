"""Where data sets come from: a mirror folder, public mirrors, Debian's package; each file's hash is checked.

A file is unpacked under a temporary name and moved into place only when its hash is right, so that a kill at any moment
leaves either the right file or none.
"""

import errno
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from fedlib.data import archive, sets
from fedlib.errors import DataError

TIMEOUT = 15  # seconds without an answer
# What a source that is absent, broken or lying can raise; anything else is a mistake of ours.
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)  # no source can help
NO_ANSWER = (OSError, *archive.BROKEN, http.client.HTTPException, subprocess.SubprocessError)


def home() -> Path:
    """The project's root: $FEDLIB_HOME, else the folder that holds this package when it is a checkout, else `.`."""
    if given := os.environ.get("FEDLIB_HOME"):
        return Path(given)
    parent = Path(__file__).resolve().parents[2]
    checkout = any((parent / name).exists() for name in ("params.yaml", "pyproject.toml"))
    return parent if checkout else Path.cwd()


def verify(name: str | sets.Entry, root: Path | None = None) -> Path:
    """Hash every file of a data set (0.1 s for 55 MB) and return the folder to read from.

    Raises DataError naming each missing or altered file, both hashes and the command that mends it.
    """
    entry, root = sets.find(name), root or home()
    if wrong := _wrong(entry, root):
        expected = dict(entry.files)
        lines = [f"{root / entry.folder / path}: expected {expected[path]}, found {wrong[path]}" for path in wrong]
        raise DataError("\n".join([*lines, f"to mend it: python -m fedlib data get {entry.name}"]))
    return root / entry.folder


def get(name: str | sets.Entry, root: Path | None = None, mirror: Path | None = None) -> Path:
    """Make the files of a data set present and verified below `root`; returns the folder to read from.

    Sources, in order: what is already there; the folder `mirror` (by default $FEDLIB_MIRROR), with the files plain,
    gzip'd or in torchvision's layout; public mirrors; Debian's package. Prints one line saying which was used.
    Raises DataError naming every source with its reason when files are still missing after the last.
    """
    entry, root = sets.find(name), root or home()
    missing = set(_wrong(entry, root))
    if not missing:
        print(f"{entry.name}: nothing to fetch, hashes right")
        return root / entry.folder
    used: list[str] = []
    refused: dict[str, list[str]] = {}
    (root / ".cache").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=root / ".cache") as temporary:
        stage = Path(temporary).resolve()
        for label, items in _sources(entry, missing, mirror, stage):
            before, reasons = len(missing), []
            if sys.stderr.isatty():
                print(f"{entry.name}: trying {label}", file=sys.stderr)
            try:
                for item in items:
                    reasons += _install(item, entry, missing, root, stage)
            except NO_ANSWER as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise DataError(
                        f"{entry.name}: its files cannot be written below {root} ({error.strerror}); free the disk, or "
                        f"name another folder by FEDLIB_HOME, and say again: python -m fedlib data get {entry.name}"
                    ) from error
                reasons.append(_reason(error))
            if missing:
                refused[label] = reasons or ["has not all of the files"]
            if len(missing) < before:
                used.append(label)
            if not missing:
                break
    if missing:
        raise DataError(
            f"data set {entry.name!r}: no source gave {', '.join(sorted(missing))}\n"
            + "".join(f"  {label}: {reason}\n" for label, reasons in refused.items() for reason in reasons)
            + "put the files, plain or gzip'd, into a folder and name it: "
            f"python -m fedlib data get {entry.name} --mirror FOLDER, or FEDLIB_MIRROR=FOLDER"
        )
    useless = "; ".join(f"{label}: {reasons[0]}" for label, reasons in refused.items() if label not in used)
    print(f"{entry.name}: from {' and '.join(used)}, hashes right" + (f" (no use: {useless})" if useless else ""))
    return root / entry.folder


def _wrong(entry: sets.Entry, root: Path) -> dict[str, str]:
    """Paths of missing and altered files, with the hash found in place of the right one."""
    hashes = {path: _hash(root / entry.folder / path, expected) for path, expected in entry.files}
    return {path: hashes[path] for path, expected in entry.files if hashes[path] != expected}


def _hash(path: Path, like: str) -> str:
    """The file's hash of the kind that `like` is, or in words why it has none.

    "md5:" and "sha256:" are followed by that of all bytes, "wav:" by that of an archive's recordings: two servers pack
    the same files into different bytes.
    """
    kind = like.partition(":")[0]
    try:
        if kind == "wav":
            return f"wav:{archive.contents(path, '.wav')}"
        with path.open("rb") as file:
            return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"
    except (FileNotFoundError, NotADirectoryError):
        return "no file"
    except archive.BROKEN as error:
        return f"no readable archive ({_reason(error)})"


def _sources(
    entry: sets.Entry, missing: set[str], mirror: Path | None, stage: Path
) -> Iterator[tuple[str, Iterator[Path]]]:
    """Each source's name and the files it offers, which come as they are asked for."""
    if folder := mirror or os.environ.get("FEDLIB_MIRROR"):
        yield f"mirror folder {folder}", _in_folder(entry, missing, Path(folder))
    for addresses in entry.mirrors:
        most = entry.most * len(entry.files)
        yield f"mirror {addresses[0].rpartition('/')[0]}", _download(addresses, missing, stage, most)
    if entry.package:
        yield f"Debian's package {entry.package}", _unpack_package(entry.package, stage)


def _in_folder(entry: sets.Entry, missing: set[str], mirror: Path) -> Iterator[Path]:
    """What may hold a missing file: first in torchvision's layout, then by its bare name, each also one level down.

    All places are offered, not the first one only: MNIST's files have the same names as Fashion-MNIST's.
    """
    if not mirror.is_dir():
        raise FileNotFoundError("no such folder")
    for path in sorted(missing):
        for place in (path, f"{path}.gz", PurePosixPath(path).name, f"{PurePosixPath(path).name}.gz"):
            for file in (mirror / place, *sorted(mirror.glob(f"*/{place}"))):
                if path in missing and file.is_file():
                    yield file
    if entry.archive and missing:
        yield from (path for path in (mirror / entry.archive, *mirror.glob(f"*/{entry.archive}")) if path.is_file())


def _download(addresses: Sequence[str], missing: set[str], stage: Path, most: int) -> Iterator[Path]:
    wanted = {PurePosixPath(path).name for path in missing}
    for address in addresses:
        name = address.rpartition("/")[2].rpartition("#")[2]  # urllib asks for what is before the #
        if not name.endswith(".tar.gz") and name.removesuffix(".gz") not in wanted:
            continue
        request = urllib.request.Request(address, headers={"User-Agent": "fedlib"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply, (stage / name).open("wb") as file:
            size = reply.length  # None when the server does not say
            # disable=None: no progress where nobody watches
            with tqdm.wrapattr(file, "write", total=size, desc=name, leave=False, disable=None) as watched:
                archive.copy(reply, watched, most, name)
            if size is not None and file.tell() != size:
                raise EOFError(f"{name}: {file.tell()} bytes of {size}, then the connection ended")
        yield stage / name


def _unpack_package(package: str, stage: Path) -> Iterator[Path]:
    """Fetch a Debian package and unpack it, as any user and without installing: apt's folders are ours."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise FileNotFoundError("no apt-get on this machine")
    for needed in ("lists", "archives"):
        (stage / "apt" / needed / "partial").mkdir(parents=True)
    settings = (
        f"Dir::State::Lists={stage / 'apt' / 'lists'}",
        f"Dir::Cache={stage / 'apt'}",
        "APT::Sandbox::User=root",  # else apt, started by root, changes to a user who cannot enter our folder
        "Acquire::Languages=none",
        "Acquire::Retries=0",
        f"Acquire::http::Timeout={TIMEOUT}",  # and of https
    )
    apt = ["apt-get", "-qq", *(f"-o{setting}" for setting in settings)]
    unpack = ["sh", "-c", f"dpkg-deb -x {package}_*.deb unpacked"]
    english = {**os.environ, "LC_ALL": "C"}
    said: list[str] = []
    for command in ([*apt, "update"], [*apt, "download", package], unpack):
        done = subprocess.run(command, check=False, cwd=stage, env=english, capture_output=True, text=True, timeout=600)
        said += done.stderr.strip().splitlines()[-1:]
        # One repository that does not answer fails `update`, and is often not the one that has the package.
        if done.returncode and "update" not in command:
            raise OSError("; ".join(said) or f"{command[0]} ended with status {done.returncode}")
    yield from sorted(path for path in (stage / "unpacked").rglob("*") if path.is_file())


def _install(item: Path, entry: sets.Entry, missing: set[str], root: Path, stage: Path) -> list[str]:
    """Unpack one file of a source and move what is right into place and out of `missing`; returns what was wrong."""
    reasons = []
    paths = {PurePosixPath(path).name: path for path in missing}
    try:
        for name, source in archive.unpacked(item, set(paths)):
            staged, path = stage / f"{name}.part", paths[name]
            with source, staged.open("wb") as file:
                archive.copy(source, file, entry.most, name)
            expected = dict(entry.files)[path]
            if (actual := _hash(staged, expected)) == expected:
                _place(staged, root / entry.folder / path)
                missing.discard(path)
            else:
                reasons.append(f"{item.name}: expected {expected}, found {actual}")
    except NO_ANSWER as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        reasons.append(f"{item.name}: {_reason(error)}")
    return reasons


def _place(staged: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Copied where the data folder is on another disk: only a rename there is atomic. Another process may do the same.
    handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    try:
        shutil.move(staged, beside)
        Path(beside).replace(target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def load(name: str | sets.Entry, root: Path | None = None) -> sets.Dataset:
    """Verify and read a data set below the project's root (`home()` by default).

    Names: those of `sets.ENTRIES`; a result on "cifar10-jpeg" is not a result on CIFAR-10. Raises SpecError for any
    other, DataError when a file is missing, altered or unreadable.
    """
    entry = sets.find(name)
    return entry.held or sets.read(entry, verify(entry, root))
