"""Processes as /proc shows them; any of them can end while it is looked at."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

MARK = "PREFIXQUANT_TEST_MARK"
"""Environment variable by which a test finds what it started, and that alone."""

_GONE = (FileNotFoundError, ProcessLookupError)


def running(fits: Callable[[list[bytes], str], bool]) -> dict[int, str]:
    """Return the processes, with their command lines, whose environment and command line fit."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (*_GONE, PermissionError):
            continue  # it ended meanwhile, or belongs to somebody else
        if fits(environment, line):
            found[int(folder.name)] = line
    return found


def marked(mark: str) -> dict[int, str]:
    """Return the processes, with their command lines, that have the mark in their environment."""
    return running(lambda environment, _: f"{MARK}={mark}".encode() in environment)


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
