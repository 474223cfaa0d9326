"""Products of 4-bit codes with many rows: the vendor's fp8 kernels, which are exact without their fast accumulation."""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def unpack_kernel(packed, scale, y, HALF, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK bytes of one row [K / 2] as the codes [K] they hold, times the row's scale if SCALED."""
    i_n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < HALF
    b = tl.load(packed + i_n * HALF + o, mask=m, other=0).to(tl.int8, bitcast=True)
    lo, hi = ((b << 4) >> 4).to(tl.float16), (b >> 4).to(tl.float16)
    if SCALED:
        b_s = tl.load(scale + i_n)
        lo, hi = lo.to(tl.float32) * b_s, hi.to(tl.float32) * b_s
    row = y + i_n * 2 * HALF + o
    tl.store(row, lo.to(y.dtype.element_ty), mask=m)
    tl.store(row + HALF, hi.to(y.dtype.element_ty), mask=m)


def unpack(packed: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Return packed codes [N, K / 2] as values [N, K] of a floating type, times `scale` [N] if given."""
    outputs, half = packed.shape
    y = torch.empty(outputs, 2 * half, dtype=dtype, device=packed.device)
    block = min(2048, max(128, triton.next_power_of_2(half)))
    unpack_kernel[(outputs, triton.cdiv(half, block))](
        packed, packed if scale is None else scale, y, half, SCALED=scale is not None, BLOCK=block, num_warps=4
    )
    return y


@triton.jit
def add_channels_kernel(added, y, scale, result, SIZE, N, BLOCK: tl.constexpr):
    """Finish BLOCK values: multiply them by their channel's scale, round, and add."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    b_y = tl.load(y + o, mask=m, other=0.0)
    b_s = tl.load(scale + o % N, mask=m, other=0.0)
    scaled = (b_y.to(tl.float32) * b_s).to(b_y.dtype).to(tl.float32)
    b_a = tl.load(added + o, mask=m, other=0.0).to(tl.float32)
    tl.store(result + o, (b_a + scaled).to(b_y.dtype), mask=m)


def add_channels_triton(added: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Do what the reference does."""
    result = torch.empty_like(y)
    add_channels_kernel[(triton.cdiv(y.numel(), 1024),)](
        added, y, scale, result, y.numel(), y.shape[-1], BLOCK=1024, num_warps=4
    )
    return result
