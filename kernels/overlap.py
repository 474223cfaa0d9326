"""Programmatic dependent launch (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization").

A kernel is set up on the GPU, and may fetch what no kernel before it writes, while the kernel before it still runs:
from when that has begun (EARLY), or from when its last programs end (LATE). Early is right where kernels take a few
microseconds. A kernel that fills the GPU for longer lets the next one come late, or programs that wait would be in the
way of its own.

Every kernel launched with `launch_flags` calls `wait_for_inputs` before it reads what another kernel writes, and before
it writes, so each is over after the one before it, and with that after all before that: memory is used in turn as
without. What is read before that is fixed: weights, their scales, biases, gains and Hadamard matrices.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prefixquant.kernels.dispatch import wants_overlap

LATE, EARLY = 1, 2
"""When the next kernel may be set up: OVERLAP, which is 0 where it may not before the end."""

OVERLAPPED_TOKENS = 16
"""Tokens up to which launches overlap; for 64 that measured slower."""


def launch_flags(x: Tensor, tokens: int, brief: bool = False) -> dict[str, int | bool]:
    """Return what a launch on x's device, for so many tokens, adds to its arguments: OVERLAP, and Triton's option if
    it is set. `brief`: a kernel of few programs, a few a token."""
    if tokens > OVERLAPPED_TOKENS or not wants_overlap() or not x.is_cuda:
        return {"OVERLAP": 0}
    if torch.cuda.get_device_capability(x.device) < (9, 0):
        return {"OVERLAP": 0}
    return {"OVERLAP": EARLY if brief or tokens == 1 else LATE, "launch_pdl": True}


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel be set up if it is to be early, and wait until the one before has written what it writes."""
    if OVERLAP == 2:
        gdc_launch_dependents()
    if OVERLAP:
        gdc_wait()
