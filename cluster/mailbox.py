"""Messages from workers to the driver while their tasks are under way."""

import logging
from collections import deque
from typing import Any

_MAX_MESSAGES = 100_000  # of a driver that does not read: the oldest are dropped rather than memory filled

logger = logging.getLogger(__name__)


class Mailbox:
    """Where workers put messages. Pass it to a task as an argument."""

    def __init__(self, box: Any) -> None:
        """Wrap the Ray actor that `start_mailbox` made."""
        self._box = box
        self._last: Any = None

    def put(self, message: dict[str, Any]) -> None:
        """Send a message without waiting. One that cannot be sent is dropped with a warning; nothing is raised.

        Messages of one worker arrive in the order in which it sent them.
        """
        import ray

        if not ray.is_initialized():  # the session is over; Ray would start a cluster for the call
            return
        try:
            self._last = self._box.put.remote(message)
        except Exception:
            logger.warning("message dropped: %.200r", message, exc_info=True)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until the last message has been delivered or was lost; False if that takes longer than `timeout_s`."""
        import ray

        if self._last is None or not ray.is_initialized():
            return True
        try:
            return bool(ray.wait([self._last], timeout=timeout_s)[0])
        except Exception:
            return False

    def __getstate__(self) -> Any:
        return self._box

    def __setstate__(self, box: Any) -> None:
        self._box = box
        self._last = None


class _Box:
    """The actor: keeps what arrives until it is taken."""

    def __init__(self) -> None:
        self._messages: deque[dict[str, Any]] = deque(maxlen=_MAX_MESSAGES)

    def put(self, message: dict[str, Any]) -> None:
        """Keep a message."""
        self._messages.append(message)

    def take(self) -> list[dict[str, Any]]:
        """Return what has arrived since the last call."""
        messages = list(self._messages)
        self._messages.clear()
        return messages


def start_mailbox() -> Any:
    """Start the Ray actor of a mailbox; it takes no CPU and comes back, empty, if its process or node dies."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1)(_Box).remote()
