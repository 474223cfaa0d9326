"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 120, shown: Callable[[], Any] = lambda: "") -> Any:
    """Return what the condition gives once that is true; fail after so many seconds, with what `shown` gives."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain: {shown()}"
        time.sleep(0.05)
    return found
