"""What several test files share: a run on digits that takes a fraction of a second, a project, servers for downloads, a
browser; and one thread for each process that runs tests (`pytest -n 2 --dist loadfile`).

`built` is imported when the first browser test asks for it: a machine that only computes need not have Playwright.
"""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import projects
import pytest
import torch
from hypothesis import HealthCheck, settings
from known_answers import TINY

from fedlib.runs.spec import Spec

if TYPE_CHECKING:
    from built import Tab
    from playwright.sync_api import Browser


# A machine may be busy with something else: no example is timed. The rest is as Hypothesis has it, here or under CI.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the tests, and the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Spec]:
    """A small spec with the given fields changed."""
    return lambda **changes: Spec.from_dict(TINY | changes)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread, as `rounds.run` sets it on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_world() -> Iterator[None]:
    """Networks and data of `engine_tasks`, by name."""
    from engine_tasks import small_world

    with small_world():
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the real experiments, claims and pages, but no data and no records."""
    projects.copy_to(tmp_path)
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def digits(project: Path) -> Path:
    """The same, profile smoke of FedMRN cut down to two runs of two rounds on digits."""
    projects.edit(project, projects.put("profiles/smoke", {"main": projects.group()}))
    return project


@pytest.fixture
def refused(project: Path, capsys: pytest.CaptureFixture[str]) -> projects.Refused:
    """What a command says that must end with status 2 and write nothing in the project."""
    return lambda *arguments: projects.refusal(project, capsys, arguments)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start servers on 127.0.0.1; serve({path: body}) gives the address.

    `cut` ends each body early. A path in `held` is sent but for its end, then its event is set.
    """
    servers = []

    def start(bodies: dict[str, bytes], cut: int | None = None, held: dict[str, threading.Event] | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                body = bodies.get(name)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if held and name in held:
                    self.wfile.write(body[:-5])
                    self.wfile.flush()
                    held[name].set()
                    self.rfile.read(1)  # until the other side is gone
                else:
                    self.wfile.write(body[:cut])

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from built import launched

    yield from launched()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the book, served on this machine."""
    from built import served

    yield from served()


@pytest.fixture
def tab(browser: Browser, site: str) -> Iterator[Tab]:
    from built import opened

    yield from opened(browser, site)
