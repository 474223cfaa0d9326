"""Hadamard transform of a row in one program, perhaps with SwiGLU in front and quantization behind.

A row of n = A B values is a matrix [A, B]; the transform is H_A^T (X H_B). Sizes are filled up to powers of two, BA and
BB. A transform with a single axis takes BA rows at once instead.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixquant.kernels.hadamard.reference import hadamard_axes, hadamard_matrix

MAX_TILE = 128 * 256
"""Values of a program's tile at most: 128 a thread of eight warps."""


@triton.jit
def _codes(y, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    # Bounds first: they are whole, so the result is the same, and rounding then never meets a large number.
    y = tl.minimum(tl.maximum(tl.div_rn(y, scale), LOW * 1.0), HIGH * 1.0)
    return (y + 12582912.0) - 12582912.0  # to the nearest, halves to even


@triton.jit
def hadamard_kernel(
    x,
    up,
    first,
    last,
    scale,
    clip_ratio,
    y,
    scales,
    ROWS,
    stride,
    A: tl.constexpr,
    B: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    TWO: tl.constexpr,
    SWIGLU: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Transform one row (TWO) or BA rows; QUANTIZE: 0 not, 1 by one scale, 2 by one a row."""
    i = tl.program_id(0).to(tl.int64)
    o_a, o_b = tl.arange(0, BA), tl.arange(0, BB)
    if TWO:
        m = (o_a < A)[:, None] & (o_b < B)[None, :]
        o_x = i * stride + o_a[:, None] * B + o_b[None, :]
        o_y = i * A * B + o_a[:, None] * B + o_b[None, :]
    else:
        o_r = i * BA + o_a
        m = (o_r < ROWS)[:, None] & (o_b < B)[None, :]
        o_x = o_r[:, None] * stride + o_b[None, :]
        o_y = o_r[:, None] * B + o_b[None, :]
    b_x = tl.load(x + o_x, mask=m, other=0.0)
    if SWIGLU:  # every step rounded to the type of x, as the unfused model rounds it
        gate = b_x.to(tl.float32)
        b_x = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(b_x.dtype)
        b_x = (b_x.to(tl.float32) * tl.load(up + o_x, mask=m, other=0.0).to(tl.float32)).to(b_x.dtype)
    b_h = tl.load(last + o_b[:, None] * B + o_b[None, :], mask=(o_b < B)[:, None] & (o_b < B)[None, :], other=0.0)
    b_y = tl.dot(b_x, b_h, input_precision="ieee").to(x.dtype.element_ty)
    if TWO:
        # The transpose: element [i, j] of the first matrix at row j.
        m_h = (o_a < A)[:, None] & (o_a < A)[None, :]
        b_h = tl.load(first + o_a[None, :] * A + o_a[:, None], mask=m_h, other=0.0)
        b_y = tl.dot(b_h, b_y, input_precision="ieee").to(x.dtype.element_ty)
    if QUANTIZE == 0:
        tl.store(y + o_y, b_y, mask=m)
    else:
        b_y = b_y.to(tl.float32)
        if QUANTIZE == 1:
            b_s = tl.load(scale)
        else:
            top = tl.max(tl.abs(b_y), axis=1)
            if TWO:
                top = tl.max(top, axis=0)
            top *= tl.load(clip_ratio)
            b_s = tl.maximum(tl.div_rn(2.0 * top, HIGH * 2.0 + 1.0), 1e-8)
            if TWO:
                tl.store(scales + i, b_s)
            else:
                tl.store(scales + i * BA + o_a, b_s, mask=i * BA + o_a < ROWS)
                b_s = b_s[:, None]
        tl.store(y + o_y, _codes(b_y, b_s, LOW, HIGH).to(y.dtype.element_ty), mask=m)


def fits(n: int) -> bool:
    """Return whether a row of n values fits a program."""
    return math.prod(padded(n)) <= MAX_TILE


def padded(n: int) -> list[int]:
    """Return the sizes of a tile's axes."""
    return [max(16, triton.next_power_of_2(math.prod(axis))) for axis in hadamard_axes(n)]


def hadamard_triton(
    x: Tensor,
    up: Tensor | None = None,
    scale: Tensor | None = None,
    clip_ratio: Tensor | None = None,
    *,
    bits: int = 4,
    codes: torch.dtype | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Transform rows [R, n] with contiguous columns, of silu(x) * up if `up` is given, by H or its transpose.

    Without `codes` returns the transform and None; else codes of that type and their scale, as `quantize` does.
    """
    rows, n = x.shape
    axes = hadamard_axes(n)
    *first, last = (hadamard_matrix(axis, x.dtype, x.device, transposed=transposed) for axis in axes)
    two = len(axes) == 2
    a, b = (math.prod(axes[0]), math.prod(axes[-1])) if two else (1, n)
    tile = padded(n)
    block_a, block_b = tile if two else (max(16, min(64, 8192 // tile[0])), tile[0])
    dynamic = codes is not None and scale is None
    y = torch.empty(rows, n, dtype=codes or x.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if dynamic else scale
    nothing = x.new_empty(1, dtype=torch.float32)
    hadamard_kernel[(rows if two else triton.cdiv(rows, block_a),)](
        x,
        x if up is None else up,
        first[0] if two else last,
        last,
        nothing if scale is None else scale,
        nothing if clip_ratio is None else clip_ratio,
        y,
        nothing if scales is None else scales,
        rows,
        x.stride(0),
        A=a,
        B=b,
        BA=block_a,
        BB=block_b,
        TWO=two,
        SWIGLU=up is not None,
        QUANTIZE=0 if codes is None else 2 if dynamic else 1,
        LOW=-(2 ** (bits - 1)),
        HIGH=2 ** (bits - 1) - 1,
        num_warps=8 if block_a * block_b >= 8192 else 4,
    )
    return y, scales
