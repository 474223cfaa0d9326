"""Fake quantization in Triton: forward and straight-through backward. R rows, C columns; the last axis shares a scale.

The scale of row r is number (r / INNER) % NUM of the scales: INNER consecutive rows share one, NUM of them repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # elements of a program, columns times rows


@triton.jit
def _round(x):
    # To the nearest integer, halves to even, as torch.round: adding 1.5 * 2^23 leaves no bits below one. For |x| < 2^22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _row_codes(b_x, b_s, b_z, LOW: tl.constexpr, HIGH: tl.constexpr):
    ratio = tl.div_rn(b_x, b_s)
    # One step beyond the range is enough to tell that a code is outside, and keeps the rounding exact.
    bounded = tl.minimum(tl.maximum(ratio, LOW - 1.0 - b_z), HIGH + 1.0 - b_z)
    raw = _round(bounded) + b_z
    code = tl.minimum(tl.maximum(raw, LOW), HIGH)
    return ratio, code, (raw >= LOW) & (raw <= HIGH)


@triton.jit
def _forward_kernel(
    x,
    scale,
    zero,
    y,
    R,
    C,
    INNER,
    NUM,
    ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # int64: R * C may pass 2**31
    m_r = o_r < R
    o_s = (o_r // INNER) % NUM
    b_s = tl.load(scale + o_s, mask=m_r, other=1.0)[:, None]
    b_z = _round(tl.load(zero + o_s, mask=m_r, other=0.0))[:, None] if ZERO else tl.zeros_like(b_s)
    for start in range(0, C, BC):
        o_c = start + tl.arange(0, BC)
        m = m_r[:, None] & (o_c < C)[None, :]
        offsets = o_r[:, None] * C + o_c[None, :]
        b_x = tl.load(x + offsets, mask=m, other=0.0).to(tl.float32)
        _, code, _ = _row_codes(b_x, b_s, b_z, LOW, HIGH)
        tl.store(y + offsets, ((code - b_z) * b_s).to(y.dtype.element_ty), mask=m)


@triton.jit
def _backward_kernel(
    grad,
    x,
    scale,
    zero,
    dx,
    dscale,
    dzero,
    R,
    C,
    INNER,
    NUM,
    ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    DX: tl.constexpr,
    DS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < R
    o_s = (o_r // INNER) % NUM
    b_s = tl.load(scale + o_s, mask=m_r, other=1.0)[:, None]
    b_z = _round(tl.load(zero + o_s, mask=m_r, other=0.0))[:, None] if ZERO else tl.zeros_like(b_s)
    sum_s = tl.zeros((BR, BC), dtype=tl.float32)
    sum_z = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, C, BC):
        o_c = start + tl.arange(0, BC)
        m = m_r[:, None] & (o_c < C)[None, :]
        offsets = o_r[:, None] * C + o_c[None, :]
        b_x = tl.load(x + offsets, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(grad + offsets, mask=m, other=0.0).to(tl.float32)
        ratio, code, inside = _row_codes(b_x, b_s, b_z, LOW, HIGH)
        if DX:
            tl.store(dx + offsets, tl.where(inside, b_g, 0.0).to(dx.dtype.element_ty), mask=m)
        if DS:
            sum_s += b_g * (code - b_z - tl.where(inside, ratio, 0.0))
            if ZERO:
                sum_z -= tl.where(inside, 0.0, b_g * b_s)
    if DS:  # one partial sum a row; rows of the same scale are added outside, in a fixed order
        tl.store(dscale + o_r, tl.sum(sum_s, axis=1), mask=m_r)
        if ZERO:
            tl.store(dzero + o_r, tl.sum(sum_z, axis=1), mask=m_r)


def _tile(rows: int, columns: int) -> tuple[tuple[int], int, int]:
    """Return the grid, and the rows and columns of a program's tile."""
    block_columns = min(triton.next_power_of_2(columns), _BLOCK)
    block_rows = max(1, min(_BLOCK // block_columns, triton.next_power_of_2(rows)))
    return (triton.cdiv(rows, block_rows),), block_rows, block_columns


def forward_triton(
    x_RC: Tensor, scale: Tensor, zero_point: Tensor | None, inner: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """Return the rows on their grids; x contiguous, scale and zero point [NUM] float32."""
    rows, columns = x_RC.shape
    y = torch.empty_like(x_RC, dtype=dtype)
    grid, block_rows, block_columns = _tile(rows, columns)
    _forward_kernel[grid](
        x_RC, scale, scale if zero_point is None else zero_point, y, rows, columns, inner, scale.numel(),
        ZERO=zero_point is not None, LOW=low, HIGH=high, BR=block_rows, BC=block_columns,
    )  # fmt: skip
    return y


def backward_triton(
    grad_RC: Tensor,
    x_RC: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    inner: int,
    low: int,
    high: int,
    *,
    needs_x: bool,
    needs_grid: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients for x [R, C], scale and zero point [NUM], each where it is needed."""
    rows, columns = x_RC.shape
    with_zero = needs_grid and zero_point is not None
    dx = torch.empty_like(x_RC) if needs_x else None
    dscale = torch.empty(rows, dtype=torch.float32, device=x_RC.device) if needs_grid else None
    dzero = torch.empty(rows, dtype=torch.float32, device=x_RC.device) if with_zero else None
    grid, block_rows, block_columns = _tile(rows, columns)
    unused = scale
    _backward_kernel[grid](
        grad_RC, x_RC, scale, unused if zero_point is None else zero_point,
        unused if dx is None else dx, unused if dscale is None else dscale, unused if dzero is None else dzero,
        rows, columns, inner, scale.numel(), ZERO=zero_point is not None, LOW=low, HIGH=high, DX=needs_x, DS=needs_grid,
        BR=block_rows, BC=block_columns,
    )  # fmt: skip
    return dx, _by_scale(dscale, scale, inner), _by_scale(dzero, scale, inner)


def _by_scale(partial_R: Tensor | None, scale: Tensor, inner: int) -> Tensor | None:
    return None if partial_R is None else partial_R.view(-1, scale.numel(), inner).sum((0, 2))
