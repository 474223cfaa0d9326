"""Which of an operator's two versions runs: the Triton kernel on a GPU, elsewhere the PyTorch reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of values that kernels take and give."""

VALUE_TYPES_TEXT = "float32, bfloat16 or float16 (float64 on the CPU or within `references()`)"

_REFERENCES: ContextVar[bool] = ContextVar("references", default=False)
_OVERLAP: ContextVar[bool] = ContextVar("overlap", default=False)


def uses_triton(x: Tensor) -> bool:
    """Return whether operators on x run as Triton kernels: x is on a GPU, Triton is installed, and no `references()`
    is around."""
    return x.is_cuda and not _REFERENCES.get() and _has_triton()


def takes_values(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether operators on x take or give values of a type: one of `VALUE_TYPES`, or float64 where references
    run, which then compute in it."""
    return dtype in VALUE_TYPES or (dtype == torch.float64 and not uses_triton(x))


def has_fp8(device: torch.device) -> bool:
    """Return whether a device multiplies in fp8: a GPU of compute capability 8.9 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


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


@contextmanager
def overlapped_launches(wanted: bool = True) -> Iterator[None]:
    """Have the runtime's kernels for few tokens start while those before them end (`kernels.overlap`), on GPUs that can
    (Hopper and later), or not, which is the default.

    They then read weights, their scales, biases and gains early: no kernel launched just before may write these. It
    holds for this thread; a CUDA graph recorded before replays what it was recorded with.
    """
    token = _OVERLAP.set(wanted)
    try:
        yield
    finally:
        _OVERLAP.reset(token)


def wants_overlap() -> bool:
    """Return whether launches may overlap: where `overlapped_launches()` is around."""
    return _OVERLAP.get()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def call(operator: Any, *args: Any) -> Any:
    """Call a custom operator; its function itself where nobody looks at the call.

    torch.compile, tracers and other dispatch modes see the operator, and so does autograd, which refuses it. Otherwise
    the way through the dispatcher would take longer than many kernels.
    """
    seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if seen or (torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in args)):
        return operator(*args)
    return operator._init_fn(*args)
