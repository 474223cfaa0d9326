"""Which of an operator's two versions runs: the Triton kernel on a GPU, elsewhere the PyTorch reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

from torch import Tensor

_REFERENCES: ContextVar[bool] = ContextVar("references", default=False)


def uses_triton(x: Tensor) -> bool:
    """Return whether operators on x run as Triton kernels: x is on a GPU, Triton is installed, and no `references()`
    is around."""
    return x.is_cuda and not _REFERENCES.get() and _has_triton()


@contextmanager
def references() -> Iterator[None]:
    """Have operators run their PyTorch references on every device, to check the kernels against them.

    It holds for this thread; a CUDA graph recorded before replays the kernels it was recorded with.
    """
    token = _REFERENCES.set(True)
    try:
        yield
    finally:
        _REFERENCES.reset(token)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
