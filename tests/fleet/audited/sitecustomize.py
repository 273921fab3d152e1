"""On the path of every Python process of a test: writes down, before anything else loads, whom it asks or connects to.

A line each: process, event, and what it is about, in the file that AUDITED names.
"""

import json
import os
import sys
from typing import Any

EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


def note(event: str, about: Any) -> None:
    line = json.dumps([os.getpid(), event, about], default=str) + "\n"
    handle = os.open(os.environ["AUDITED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, line.encode())
    os.close(handle)


def hook(event: str, arguments: Any) -> None:
    if event in EVENTS:
        note(event, arguments[EVENTS[event]])


note("start", sys.orig_argv)
sys.addaudithook(hook)
