"""Processes that tests start, with all that these start."""

from pathlib import Path


def session(leader: int) -> list[int]:
    """Living processes of a session (field 6 of /proc/PID/stat; field 3 is the state, Z when dead)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found
