"""Programmatic dependent launch (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization").

A kernel is set up on the GPU, and may fetch what no kernel before it writes, while the kernel before it still runs. For
one token, where a kernel takes a few microseconds, a block's products take a tenth less with sizes that suit it. With
more the kernels are longer and fill the GPU, where those that wait already are in the way: 16 tokens took a tenth
longer.

Every kernel launched with `launch_flags` calls `wait_for_inputs` before it reads or writes anything, so each is over
after the one before it, and with that after all before that: memory is used in turn as without.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prefixquant.kernels.dispatch import wants_overlap


def launch_flags(x: Tensor, tokens: int) -> dict[str, bool]:
    """Return what a launch on x's device, for so many tokens, adds to its arguments: OVERLAP, and Triton's option if
    it is set."""
    if tokens == 1 and wants_overlap() and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel be set up, and wait until the one before has written what it writes."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch_rows(start, rows, size, stride, ROWS: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr):
    """Ask the L2 cache for up to LINES lines of 128 bytes of each of min(rows, ROWS) rows, `stride` bytes apart.

    `start` points to bytes, `size` of which belong to a row. Nothing is read: what another kernel writes there
    meanwhile is seen by who reads it later.
    """
    if OVERLAP:
        o_r = tl.minimum(tl.arange(0, ROWS), rows - 1).to(tl.int64)
        o_b = tl.minimum(tl.arange(0, LINES) * 128, size - 1)
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l",
            [(start + o_r[:, None] * stride + o_b[None, :]).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
