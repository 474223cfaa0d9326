"""Memory that need not be set before each launch: zeros that a kernel leaves as it found them, and a one."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

_Recorded = dict[tuple[torch.device, int], Tensor]
_RECORDED: ContextVar[_Recorded | None] = ContextVar("recorded", default=None)

_ONES: dict[torch.device, Tensor] = {}

LEAST = 2**19
"""Integers at first, enough for most launches: a graph sets them to zero once, each larger piece once more."""


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Record what runs within as a CUDA graph whose launches share their zeros (options: those of torch.cuda.graph).

    Recorded without this, every launch that needs zeros has its own, set to zero before it at each replay.
    """
    token = _RECORDED.set({})
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        _RECORDED.reset(token)


def zeros(device: torch.device, size: int) -> Tensor:
    """Return int32 [size], zero. What launches of one stream share; each leaves it as it found it."""
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    rounded = 1 << (size - 1).bit_length()
    if not (on_gpu and torch.cuda.is_current_stream_capturing()):
        return _kept(device, stream, rounded)[:size]
    shared = _RECORDED.get()
    if shared is None:
        return _zeros(device, size)
    found = shared.get((device, stream))
    if found is None or len(found) < size:
        found = shared[device, stream] = _zeros(device, max(LEAST, rounded))
    return found[:size]


def one(device: torch.device) -> Tensor:
    """Return a float32 one that nobody writes to."""
    found = _ONES.get(device)
    if found is None:
        found = torch.ones((), device=device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return found  # set when the graph is replayed, so nobody else may have it
            torch.cuda.current_stream(device).synchronize()  # other streams may read it from now on
        _ONES[device] = found
    return found


@cache
def _kept(device: torch.device, stream: int, size: int) -> Tensor:
    return _zeros(device, size)


def _zeros(device: torch.device, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
