"""Hadamard transform of rows, perhaps with SwiGLU in front and quantization behind.

A row of n = A B values is a matrix [A, B]; the transform is H_A^T (X H_B). Sizes are filled up to powers of two, BA and
BB. A transform with a single axis takes BA rows at once instead.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixquant.kernels.hadamard.reference import MAX_POWER, hadamard_axes, hadamard_matrix
from prefixquant.kernels.overlap import launch_flags, wait_for_inputs
from prefixquant.kernels.rounding import nearest

MAX_TILE = 128 * 256
"""Values of a program's tile at most: 128 a thread of eight warps."""

MAX_MATRICES = 160 * 1024
"""Bytes of a program's Hadamard matrices at most; what it computes in between needs shared memory as well."""

PROGRAMS = 264
"""Programs that a large GPU runs at once; with more rows each takes several in turn and loads the matrices once."""


@triton.jit
def _load(x, scale, o_x, o_n, m, SCALED: tl.constexpr):
    b_x = tl.load(x + o_x, mask=m, other=0.0)
    if SCALED:
        b_x = (b_x.to(tl.float32) * tl.load(scale + o_n, mask=m, other=0.0)).to(b_x.dtype)
    return b_x


@triton.jit
def _gated(x, up, scale, o_x, o_n, m, N, SWIGLU: tl.constexpr, SCALED: tl.constexpr):
    """Return x, or silu(x) * up; every step is rounded to the type of x, as the unfused model rounds it."""
    b_x = _load(x, scale, o_x, o_n, m, SCALED)
    if SWIGLU:
        gate = b_x.to(tl.float32)
        b_x = (gate / (1.0 + tl.exp(-gate))).to(b_x.dtype)
        b_up = _load(up, scale + N, o_x, o_n, m, SCALED)
        b_x = (b_x.to(tl.float32) * b_up.to(tl.float32)).to(b_x.dtype)
    return b_x


@triton.jit
def _codes(y, factor, LOW: tl.constexpr, HIGH: tl.constexpr):
    # Bounds first: they are whole, so the result is the same, and rounding then never meets a large number.
    return nearest(tl.minimum(tl.maximum(y * factor, LOW * 1.0), HIGH * 1.0))


@triton.jit
def hadamard_kernel(
    x,
    up,
    channel_scale,
    first,
    last,
    scale,
    clip_ratio,
    y,
    scales,
    ROWS,
    stride_x,
    stride_up,
    A: tl.constexpr,
    B: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    TWO: tl.constexpr,
    SWIGLU: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Transform rows in turn (TWO), or BA rows; QUANTIZE: 0 not, 1 by one scale, 2 by one a row.

    With TWO, program_id(1) gives BC of a row's B result columns, so that several programs share a row.
    """
    # The matrices are fixed, so they may be read before the inputs are there.
    o_a, o_b = tl.arange(0, BA), tl.arange(0, BB)
    if TWO:
        o_c = tl.program_id(1) * BC + tl.arange(0, BC)
        m = (o_a < A)[:, None] & (o_b < B)[None, :]
        m_c = (o_a < A)[:, None] & (o_c < B)[None, :]
        o_n = o_a[:, None] * B + o_b[None, :]
        m_h = (o_b < B)[:, None] & (o_c < B)[None, :]
        b_last = tl.load(last + o_b[:, None] * B + o_c[None, :], mask=m_h, other=0.0)
        m_h = (o_a < A)[:, None] & (o_a < A)[None, :]
        b_first = tl.load(first + o_a[:, None] * A + o_a[None, :], mask=m_h, other=0.0)
        wait_for_inputs(OVERLAP)
        for row in range(tl.program_id(0), ROWS, tl.num_programs(0)):
            i = tl.cast(row, tl.int64)
            b_x = _gated(x + i * stride_x, up + i * stride_up, channel_scale, o_n, o_n, m, A * B, SWIGLU, SCALED)
            b_y = tl.dot(b_x, b_last, input_precision="ieee").to(x.dtype.element_ty)
            b_y = tl.dot(b_first, b_y, input_precision="ieee").to(x.dtype.element_ty)
            o_y = i * A * B + o_a[:, None] * B + o_c[None, :]
            if QUANTIZE == 0:
                tl.store(y + o_y, b_y, mask=m_c)
            else:
                b_y = b_y.to(tl.float32)
                if QUANTIZE == 1:
                    b_s = tl.load(scale)
                else:
                    top = tl.max(tl.max(tl.abs(b_y), axis=1), axis=0) * tl.load(clip_ratio)
                    b_s = tl.maximum(tl.div_rn(2.0 * top, HIGH * 2.0 + 1.0), 1e-8)
                    tl.store(scales + i, b_s)
                tl.store(y + o_y, _codes(b_y, tl.div_rn(1.0, b_s), LOW, HIGH).to(y.dtype.element_ty), mask=m_c)
    else:
        o_r = tl.program_id(0).to(tl.int64) * BA + o_a
        m = (o_r < ROWS)[:, None] & (o_b < B)[None, :]
        m_h = (o_b < B)[:, None] & (o_b < B)[None, :]
        b_last = tl.load(last + o_b[:, None] * B + o_b[None, :], mask=m_h, other=0.0)
        wait_for_inputs(OVERLAP)
        o_n = tl.broadcast_to(o_b[None, :], (BA, BB))
        b_x = _gated(
            x + o_r[:, None] * stride_x, up + o_r[:, None] * stride_up, channel_scale, o_n, o_n, m, B, SWIGLU, SCALED
        )
        b_y = tl.dot(b_x, b_last, input_precision="ieee").to(x.dtype.element_ty)
        o_y = o_r[:, None] * B + o_b[None, :]
        if QUANTIZE == 0:
            tl.store(y + o_y, b_y, mask=m)
        else:
            b_y = b_y.to(tl.float32)
            if QUANTIZE == 1:
                factor = tl.div_rn(1.0, tl.load(scale))
            else:
                top = tl.max(tl.abs(b_y), axis=1) * tl.load(clip_ratio)
                b_s = tl.maximum(tl.div_rn(2.0 * top, HIGH * 2.0 + 1.0), 1e-8)
                tl.store(scales + o_r, b_s, mask=o_r < ROWS)
                factor = tl.div_rn(1.0, b_s)[:, None]
            tl.store(y + o_y, _codes(b_y, factor, LOW, HIGH).to(y.dtype.element_ty), mask=m)


@lru_cache(maxsize=256)
def kernel_axes(n: int) -> tuple[tuple[int, ...], ...]:
    """Return the factors of n as one axis or two, so cut that the filled-up tile is smallest, then squarest."""
    factors = [factor for axis in hadamard_axes(n) for factor in axis]
    if n <= MAX_POWER:
        return (tuple(factors),)
    cuts = [(tuple(factors[:cut]), tuple(factors[cut:])) for cut in range(1, len(factors))]

    def size(axes: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
        sides = [_side(axis) for axis in axes]
        return math.prod(sides), max(sides)

    return min(cuts, key=size, default=(tuple(factors),))


def _side(axis: tuple[int, ...]) -> int:
    return max(16, triton.next_power_of_2(math.prod(axis)))


def fits(n: int, dtype: torch.dtype) -> bool:
    """Return whether a row of n values fits a program: its tile the registers, the matrices the shared memory."""
    sides = [_side(axis) for axis in kernel_axes(n)]
    return math.prod(sides) <= MAX_TILE and sum(side * side for side in sides) * dtype.itemsize <= MAX_MATRICES


def padded(n: int) -> list[int]:
    """Return the sizes of a tile's axes."""
    return [_side(axis) for axis in kernel_axes(n)]


def hadamard_triton(
    x: Tensor,
    up: Tensor | None = None,
    scale: Tensor | None = None,
    clip_ratio: Tensor | None = None,
    channel_scale: Tensor | None = None,
    *,
    bits: int = 4,
    codes: torch.dtype | None = None,
    launch: dict[str, int] | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Transform rows [R, n] with contiguous columns, of silu(x) * up if `up` is given, by H or its transpose.

    Without `codes` returns the transform and None; else codes of that type and their scale, as `quantize` does.
    """
    rows, n = x.shape
    axes = kernel_axes(n)
    last = hadamard_matrix(axes[-1], x.dtype, x.device, transposed=transposed)
    two = len(axes) == 2
    first = hadamard_matrix(axes[0], x.dtype, x.device, transposed=not transposed) if two else last
    a, b = (math.prod(axes[0]), math.prod(axes[-1])) if two else (1, n)
    tile = padded(n)
    block_a, block_b = tile if two else (max(16, min(64, 8192 // tile[0])), tile[0])
    dynamic = codes is not None and scale is None
    y = torch.empty(rows, n, dtype=codes or x.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if dynamic else scale
    nothing = x.new_empty(1, dtype=torch.float32)
    if launch is None:
        shared = two and rows <= PROGRAMS // 4 and not dynamic
        launch = {
            "BC": max(16, block_b // 8) if shared else block_b,
            "programs": min(rows, PROGRAMS) if two else triton.cdiv(rows, block_a),
            "num_warps": 8 if block_a * block_b >= 8192 else 4,
            "num_stages": 1,  # what a row needs fills the shared memory; other programs hide the loads
        }
        if two and not shared and block_a * block_b == 128 * 128:
            launch["maxnreg"] = 128  # lets two programs share a multiprocessor
    launch = dict(launch)
    grid = (launch.pop("programs"), triton.cdiv(block_b, launch["BC"]))
    hadamard_kernel[grid](
        x,
        x if up is None else up,
        nothing if channel_scale is None else channel_scale,
        first,
        last,
        nothing if scale is None else scale,
        nothing if clip_ratio is None else clip_ratio,
        y,
        nothing if scales is None else scales,
        rows,
        x.stride(0),
        0 if up is None else up.stride(0),
        A=a,
        B=b,
        BA=block_a,
        BB=block_b,
        TWO=two,
        SWIGLU=up is not None,
        SCALED=channel_scale is not None,
        QUANTIZE=0 if codes is None else 2 if dynamic else 1,
        LOW=-(2 ** (bits - 1)),
        HIGH=2 ** (bits - 1) - 1,
        **launch_flags(x, rows),
        **launch,
    )
    return y, scales
