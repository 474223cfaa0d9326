"""Processes as /proc shows them; any of them can end while it is looked at."""

import os
import signal
import time
from pathlib import Path

MARK = "PREFIXQUANT_TEST_MARK"
"""Environment variable by which a test finds what it started, and that alone."""

_GONE = (FileNotFoundError, ProcessLookupError)


def marked(mark: str) -> dict[int, str]:
    """Return the processes, with their command lines, that have the mark in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (*_GONE, PermissionError):
            continue  # it ended meanwhile, or belongs to somebody else
    return found


def descendants(pid: int) -> list[int]:
    """Return all processes below this one."""
    try:
        found = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except _GONE:
        return []
    direct = [int(each) for part in found for each in part]
    return direct + [each for child in direct for each in descendants(child)]


def alive(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except _GONE:
        return False


def kill(pid: int) -> bool:
    """Kill a process and return whether it was there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def end_marked(mark: str, seconds: float = 60) -> None:
    """Kill all that has the mark, and return when nothing of it is left."""
    end = time.monotonic() + seconds
    while left := marked(mark):
        for pid in left:
            kill(pid)
        assert time.monotonic() < end, left
        time.sleep(0.05)
