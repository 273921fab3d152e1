"""A SuperLink with TLS that lets registered nodes in alone, set up as the book says, with Flower's own programs."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import projects
import pytest

pytest.importorskip("flwr", reason="make test-fleet has Flower")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlib.__main__ import main
from fedlib.engines.flower import extra
from fedlib.engines.flower.fleet import free_port
from fedlib.runs import record
from fedlib.runs.experiments import specs

PROGRAMS = Path(sys.executable).parent
FEDLIB = [sys.executable, "-m", "fedlib"]
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fleet")])
PEM = serialization.Encoding.PEM


def certify(folder: Path) -> None:
    """ca.crt, and server.crt with server.key for this machine's address."""
    own, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    now = datetime.datetime.now(datetime.UTC)

    def certificate(key: ec.EllipticCurvePrivateKey, subject: x509.Name, *extensions: x509.ExtensionType) -> bytes:
        draft = x509.CertificateBuilder(NAME, subject, key.public_key(), x509.random_serial_number())
        draft = draft.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(1))
        for extension in (*extensions, x509.SubjectKeyIdentifier.from_public_key(key.public_key())):
            draft = draft.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        of = x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key())
        return draft.add_extension(of, critical=False).sign(own, hashes.SHA256()).public_bytes(PEM)

    may = x509.KeyUsage(*[name in (5, 6) for name in range(9)])  # sign certificates and lists of them
    (folder / "ca.crt").write_bytes(certificate(own, NAME, x509.BasicConstraints(ca=True, path_length=0), may))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "superlink")])
    (folder / "server.crt").write_bytes(certificate(server, subject, address))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "server.key").write_bytes(server.private_bytes(PEM, *plain))


def key(file: Path) -> Path:
    """As ssh-keygen -t ecdsa -b 384 makes it: `file` and `file.pub`."""
    made = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    file.write_bytes(made.private_bytes(PEM, *form))
    public = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    file.with_suffix(".pub").write_bytes(made.public_key().public_bytes(*public))
    return file


class Place:
    """A SuperLink, its certificates, and who has been registered there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        certify(folder)
        (folder / "secret").write_bytes(b"shared by server and SuperLink")
        (folder / "config.toml").write_text(
            f'[superlink.fleet]\naddress = "{self.address}"\nroot-certificates = "{folder / "ca.crt"}"\n'
        )
        self.environment = extra.without_proxy(dict(os.environ)) | extra.QUIET | {"FLWR_HOME": str(folder)}
        tls = [f"--ssl-{kind}={folder / file}" for kind, file in TLS.items()]
        self.processes = [
            self.start(
                *[str(PROGRAMS / "flower-superlink"), *tls, "--isolation", "process", "--enable-supernode-auth"],
                *["--superexec-auth-secret-file", str(folder / "secret"), "--host", "127.0.0.1"],
                *["--port", self.address.rpartition(":")[2]],
            )
        ]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError("the SuperLink does not start")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def link(self) -> list[str]:
        return ["--superlink", self.address, "--root-certificates", str(self.folder / "ca.crt")]

    @property
    def secret(self) -> list[str]:
        return ["--secret", str(self.folder / "secret")]

    def start(self, *words: str, **other: str) -> subprocess.Popen[str]:
        pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(words, env=self.environment | other, **pipe)

    def node(self, name: str, clients: str) -> None:
        """Register it by Flower's command line, and let it serve."""
        file = key(self.folder / name)
        register = [str(PROGRAMS / "flwr"), "supernode", "register", str(file.with_suffix(".pub")), "fleet"]
        done = subprocess.run(
            [*register, "--name", name], env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        words = ["--key", str(file), "--clients", clients, "--end-with-input"]
        self.processes.append(self.start(*FEDLIB, "serve-client", *self.link, *words))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of ours, to its end."""
        return subprocess.run(
            [*FEDLIB, *words], env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )


TLS = {"certfile": "server.crt", "keyfile": "server.key", "ca-certfile": "ca.crt"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("superlink"))
    yield made
    for process in reversed(made.processes):
        process.terminate()
        process.wait(timeout=20)
        process.communicate()


def test_registered_nodes_make_the_record_of_one_process(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projects.small(tmp_path)
    place.node("north", "0-4")
    place.node("south", "5-9")
    monkeypatch.setitem(place.environment, "FEDLIB_HOME", str(tmp_path))
    words = ["run", "fedmrn", "--profile", "smoke", "--engine", "flower", *place.link, *place.secret, "--nodes", "2"]
    done = place.run(*words)
    assert done.returncode == 0, done.stderr
    found = {file.name: record.read(file) for file in (tmp_path / "records").rglob("*.json")}
    assert len(found) == 2 and {made["made"]["engine"] for made in found.values()} == {"Flower: 2 nodes"}
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    assert main([*projects.RUN, "--again"]) == 0
    for name, made in found.items():
        (file,) = (tmp_path / "records").rglob(name)
        assert record.stable(record.read(file)) == record.stable(made)
    assert [reason for *_, reason in record.fresh(specs("fedmrn", "smoke"))] == ["", ""]


def test_a_key_that_is_not_registered_is_refused(place: Place) -> None:
    done = place.run("serve-client", *place.link, "--key", str(key(place.folder / "stranger")))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: SuperLink {place.address}: ") and "(status 4" in done.stderr


def test_a_node_without_a_key_is_refused(place: Place) -> None:
    done = place.run("serve-client", *place.link)
    assert done.returncode == 2 and "(status 4" in done.stderr


@pytest.mark.parametrize("secret", [None, b"another"])
def test_a_server_without_the_secret_is_refused(place: Place, secret: bytes | None, tmp_path: Path) -> None:
    projects.small(tmp_path)
    words = ["run", "fedmrn", "--profile", "smoke", "--engine", "flower", *place.link]
    if secret:
        (tmp_path / "secret").write_bytes(secret)
        words += ["--secret", str(tmp_path / "secret")]
    done = subprocess.run(
        [*FEDLIB, *words],
        env=place.environment | {"FEDLIB_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and "(status 401)" in done.stderr, done.stderr


def test_without_the_right_certificate_nothing_is_sent(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    certify(other)
    done = place.run("serve-client", "--superlink", place.address, "--root-certificates", str(other / "ca.crt"))
    assert done.returncode == 2 and "certificate verify failed" in done.stderr.lower(), done.stderr


def test_how_to_connect_is_said_outright(place: Place) -> None:
    done = place.run("serve-client", "--superlink", place.address)
    assert done.returncode == 2 and "give either --root-certificates FILE or" in done.stderr
