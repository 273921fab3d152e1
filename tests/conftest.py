"""What several test files share: a run on digits that takes a fraction of a second, servers for downloads, a browser.

`built` is imported when the first browser test asks for it: a machine that only computes need not have Playwright.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from known_answers import TINY

from fedlib.runs.spec import Spec

if TYPE_CHECKING:
    from built import Tab
    from playwright.sync_api import Browser


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


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start servers on 127.0.0.1; serve({path: body}, cut=None) gives the address, `cut` ends each body early."""
    servers = []

    def start(bodies: dict[str, bytes], cut: int | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = bodies.get(self.path.lstrip("/"))
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
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
