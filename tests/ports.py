"""Ports for servers that are told theirs."""

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """Return ports of loopback on which nothing listens, below those that the kernel and Ray give to whoever asks."""
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 12000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"{count} free ports were not found")
