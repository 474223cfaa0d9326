"""Fake quantization in Triton: forward and straight-through backward. R rows, C columns; a row shares one scale.

The scale of row r is number r % NUM of the scales. Columns are cut into CHUNKS tiles of BC, rows into tiles of BR.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Elements of a program's tile, rows times columns: 32 a thread."""


@triton.jit
def _round(x):
    # To the nearest integer, halves to even, as torch.round: adding 2^23 to a magnitude leaves no bits below one, and
    # from 2^23 on there are none. NaN and infinities stay what they are.
    magnitude = tl.abs(x)
    whole = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    return tl.where(x < 0.0, -whole, whole)


@triton.jit
def row_codes(b_x, b_s, b_z, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return x / scale, the codes minus the zero point, and where the code was within range."""
    ratio = tl.div_rn(b_x, b_s)  # the default division is off by up to two units in the last place
    raw = _round(ratio) + b_z
    # Two choices instead of minimum and maximum, which would make a NaN a code.
    code = tl.where(raw < LOW, LOW * 1.0, tl.where(raw > HIGH, HIGH * 1.0, raw))
    return ratio, code - b_z, (raw >= LOW) & (raw <= HIGH)


@triton.jit
def _tile(scale, zero, R, C, NUM, CHUNKS, ZERO: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)  # int64: R * C may pass 2**31
    i_c = i % CHUNKS
    o_r = i // CHUNKS * BR + tl.arange(0, BR)
    o_c = i_c * BC + tl.arange(0, BC)
    m_r = o_r < R
    o_s = o_r % NUM
    b_s = tl.load(scale + o_s, mask=m_r, other=1.0)[:, None]
    b_z = _round(tl.load(zero + o_s, mask=m_r, other=0.0))[:, None] if ZERO else tl.zeros_like(b_s)
    return o_r[:, None] * C + o_c[None, :], m_r[:, None] & (o_c < C)[None, :], b_s, b_z, o_r * CHUNKS + i_c, m_r


@triton.jit
def _forward_kernel(
    x,
    scale,
    zero,
    y,
    codes,
    R,
    C,
    NUM,
    CHUNKS,
    ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CODES: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    offsets, m, b_s, b_z, _, _ = _tile(scale, zero, R, C, NUM, CHUNKS, ZERO, BR, BC)
    b_x = tl.load(x + offsets, mask=m, other=0.0).to(tl.float32)
    _, centred, _ = row_codes(b_x, b_s, b_z, LOW, HIGH)
    tl.store(y + offsets, (centred * b_s).to(y.dtype.element_ty), mask=m)
    if CODES:
        tl.store(codes + offsets, centred.to(codes.dtype.element_ty), mask=m)


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
    NUM,
    CHUNKS,
    ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    DX: tl.constexpr,
    DS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    offsets, m, b_s, b_z, o_partial, m_r = _tile(scale, zero, R, C, NUM, CHUNKS, ZERO, BR, BC)
    b_x = tl.load(x + offsets, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(grad + offsets, mask=m, other=0.0).to(tl.float32)
    ratio, centred, inside = row_codes(b_x, b_s, b_z, LOW, HIGH)
    if DX:
        tl.store(dx + offsets, tl.where(inside, b_g, 0.0).to(dx.dtype.element_ty), mask=m)
    if DS:  # one partial sum a row and chunk; those of the same scale are added outside, in a fixed order
        tl.store(dscale + o_partial, tl.sum(b_g * (centred - tl.where(inside, ratio, 0.0)), axis=1), mask=m_r)
        if ZERO:
            tl.store(dzero + o_partial, tl.sum(tl.where(inside, 0.0, -b_g * b_s), axis=1), mask=m_r)


def _tiling(rows: int, columns: int) -> tuple[int, int, int]:
    """Return the chunks of a row, and the rows and columns of a program's tile."""
    block_columns = min(triton.next_power_of_2(columns), _BLOCK)
    block_rows = min(_BLOCK // block_columns, triton.next_power_of_2(rows))
    return triton.cdiv(columns, block_columns), block_rows, block_columns


def forward_triton(
    x_RC: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    dtype: torch.dtype,
    codes_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows on their grids, and their codes minus the zero point in `codes_dtype`, if it is given.

    x contiguous, scale and zero point [NUM] contiguous float32, NUM divides R.
    """
    rows, columns = x_RC.shape
    y = torch.empty_like(x_RC, dtype=dtype)
    codes = None if codes_dtype is None else torch.empty_like(x_RC, dtype=codes_dtype)
    chunks, block_rows, block_columns = _tiling(rows, columns)
    _forward_kernel[(triton.cdiv(rows, block_rows) * chunks,)](
        x_RC, scale, scale if zero_point is None else zero_point, y, y if codes is None else codes,
        rows, columns, scale.numel(), chunks, ZERO=zero_point is not None, LOW=low, HIGH=high, CODES=codes is not None,
        BR=block_rows, BC=block_columns,
    )  # fmt: skip
    return y, codes


def backward_triton(
    grad_RC: Tensor,
    x_RC: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    *,
    needs_x: bool,
    needs_grid: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients for x [R, C] (in `dtype` or else x's), scale and zero point [NUM] float32, where needed.

    As `forward_triton`; grad contiguous too.
    """
    rows, columns = x_RC.shape
    chunks, block_rows, block_columns = _tiling(rows, columns)
    with_zero = needs_grid and zero_point is not None
    dx = torch.empty_like(x_RC, dtype=dtype) if needs_x else None
    dscale = torch.empty((rows, chunks), dtype=torch.float32, device=x_RC.device) if needs_grid else None
    dzero = torch.empty((rows, chunks), dtype=torch.float32, device=x_RC.device) if with_zero else None
    unused = scale
    _backward_kernel[(triton.cdiv(rows, block_rows) * chunks,)](
        grad_RC, x_RC, scale, unused if zero_point is None else zero_point,
        unused if dx is None else dx, unused if dscale is None else dscale, unused if dzero is None else dzero,
        rows, columns, scale.numel(), chunks, ZERO=zero_point is not None, LOW=low, HIGH=high,
        DX=needs_x, DS=needs_grid, BR=block_rows, BC=block_columns,
    )  # fmt: skip
    return dx, _by_scale(dscale, scale), _by_scale(dzero, scale)


def _by_scale(partial: Tensor | None, scale: Tensor) -> Tensor | None:
    """Return the partial sums [R, CHUNKS] added up for each scale."""
    if partial is None or partial.numel() == scale.numel():
        return None if partial is None else partial.view(-1)
    return partial.view(-1, scale.numel(), partial.shape[1]).sum((0, 2))
