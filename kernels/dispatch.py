"""Whether an operator runs as a Triton kernel or as its PyTorch reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from torch import Tensor

_forced: list[None] = []


def uses_triton(x: Tensor) -> bool:
    """Return whether an operator on x runs as a kernel: x is on a GPU, and Triton is there and not switched off."""
    return x.is_cuda and not _forced and _has_triton()


@contextmanager
def references() -> Iterator[None]:
    """Run every operator's PyTorch reference inside, also on a GPU, to check results against."""
    _forced.append(None)
    try:
        yield
    finally:
        _forced.pop()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
