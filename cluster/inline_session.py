"""A session without Ray: functions run in this process, one after the other, when somebody waits for them."""

import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from prefixquant.cluster.errors import ResourceError
from prefixquant.cluster.ray_session import Ref

Listener = Callable[[dict[str, Any]], None]


class InlineMailbox:
    """Where a function that runs here leaves its messages."""

    def __init__(self, listener: Listener | None = None) -> None:
        self._messages: list[dict[str, Any]] = []
        self._listener = listener

    def put(self, message: dict[str, Any]) -> None:
        """Keep a message, or give it to who listens."""
        if self._listener is None:
            self._messages.append(message)
        else:
            self._listener(message)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Return True: nothing is under way."""
        return True

    def take(self) -> list[dict[str, Any]]:
        """Return what has arrived since the last call."""
        messages = list(self._messages)
        self._messages.clear()  # in place: senders hold this list
        return messages


class _Traceback(Exception):  # noqa: N818 - the cause of an error, as Ray's RayTaskError is
    """Where in a function an error arose."""


class _Call:
    """A function and its arguments, then its result or error."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.ended = False
        self.value: Any = None
        self.error: Exception | None = None
        self.trace = ""

    def run(self) -> None:
        try:
            self.value = self.function(*self.args)
        except Exception as err:  # whatever it is, `result` raises it
            self.error, self.trace = err, traceback.format_exc()
        self.ended = True


class InlineSession:
    """What a RaySession does, where Ray is not installed or one process is wanted. Nothing is tried twice."""

    def __init__(self, *, device: str, cpus: int = 1, listener: Listener | None = None) -> None:
        """`device`: where tasks compute, e.g. `cuda:0`. `cpus`: cores of each.

        `listener`: gets what functions say at once, instead of `messages`, which comes to it when they have ended.
        """
        self.device: str | None = device
        """Where tasks compute."""
        self.cpus = cpus
        """Cores, all of which one task has."""
        self.gpus = int(device.startswith("cuda"))
        """GPUs."""
        self._mailbox = InlineMailbox(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def gpu(self) -> tuple[str, int] | None:
        """Return name and memory of the GPU, if it computes."""
        if not self.gpus:
            return None
        import torch

        properties = torch.cuda.get_device_properties(self.device)
        return properties.name, properties.total_memory

    def fit(self, cpus: int, gpus: float) -> tuple[int, float]:
        """Return what a task gets: all cores, since it runs alone, and of GPUs what it asks for if that is here."""
        return self.cpus, min(gpus, self.gpus)

    def submit(self, function: Callable[..., Any], *args: Any, **request: Any) -> Ref:
        """Keep `function(*args)` for `wait` and return a handle; what it asks for is all here."""
        return _Call(function, args)

    def submit_group(
        self, function: Callable[..., Any], *args: Any, name: str, ranks: int, cpus: float = 1, gpus: float = 0
    ) -> Ref:
        """Raise ResourceError: there is one process."""
        raise ResourceError(f"{name}: {ranks} ranks need a Ray cluster, this session is one process; use --ranks 1")

    def mailbox(self) -> InlineMailbox:
        """Return where functions leave messages."""
        return self._mailbox

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages since the last call."""
        return self._mailbox.take()

    def wait(self, refs: Sequence[Ref], timeout: float | None = None) -> list[Ref]:
        """Run the first that has not ended, and return it; `timeout` does not interrupt it."""
        for ref in refs:
            if not ref.ended:
                ref.run()
                return [ref]
        return list(refs[:1])

    def result(self, ref: Ref) -> Any:
        """Return what the function returned or raise what it raised, chained to its traceback."""
        if ref.error is not None:
            raise ref.error from _Traceback(ref.trace)
        return ref.value

    def abandon(self, refs: Sequence[Ref]) -> None:
        """Forget them: none is under way."""
