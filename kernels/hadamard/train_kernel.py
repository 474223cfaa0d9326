"""Hadamard transform and fake quantization of a row in one program, forward and backward.

A row of n = A B values is a matrix [A, B], as in `kernel.py`; one scale for all rows. A program makes BC of the B
columns at a time, which keeps what it does with them in registers.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixquant.kernels.fake_quantize.kernel import row_codes
from prefixquant.kernels.hadamard.kernel import fits, kernel_axes, padded
from prefixquant.kernels.hadamard.reference import hadamard_matrix


@triton.jit
def _transform(b_x, first, last, o_a, o_b, o_c, A: tl.constexpr, B: tl.constexpr):
    """Return the columns o_c of the transform of [A, B]."""
    m_last = (o_b < B)[:, None] & (o_c < B)[None, :]
    b_h = tl.load(last + o_b[:, None] * B + o_c[None, :], mask=m_last, other=0.0)
    b_y = tl.dot(b_x, b_h, input_precision="ieee").to(b_x.dtype)
    m_first = (o_a < A)[:, None] & (o_a < A)[None, :]
    b_h = tl.load(first + o_a[:, None] * A + o_a[None, :], mask=m_first, other=0.0)
    return tl.dot(b_h, b_y, input_precision="ieee").to(b_x.dtype)


@triton.jit
def _hadamard_forward_kernel(
    x,
    first,
    last,
    scale,
    transformed,
    y,
    A: tl.constexpr,
    B: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    o_a, o_b = tl.arange(0, BA), tl.arange(0, BB)
    m = (o_a < A)[:, None] & (o_b < B)[None, :]
    o = o_a[:, None] * B + o_b[None, :]
    start = i * A * B
    b_x = tl.load(x + start + o, mask=m, other=0.0)
    b_s = tl.load(scale)
    for c in range(0, BB, BC):
        o_c = c + tl.arange(0, BC)
        m_c = (o_a < A)[:, None] & (o_c < B)[None, :]
        o_y = o_a[:, None] * B + o_c[None, :]
        b_y = _transform(b_x, first, last, o_a, o_b, o_c, A, B)
        tl.store(transformed + start + o_y, b_y, mask=m_c)
        _, centred, _ = row_codes(b_y.to(tl.float32), b_s, 0.0, LOW, HIGH)
        tl.store(y + start + o_y, (centred * b_s).to(y.dtype.element_ty), mask=m_c)


@triton.jit
def _hadamard_backward_kernel(
    grad,
    transformed,
    first,
    last,
    scale,
    dx,
    dscale,
    A: tl.constexpr,
    B: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    o_a, o_b = tl.arange(0, BA), tl.arange(0, BB)
    m = (o_a < A)[:, None] & (o_b < B)[None, :]
    o = o_a[:, None] * B + o_b[None, :]
    start = i * A * B
    b_g = tl.load(grad + start + o, mask=m, other=0.0).to(tl.float32)
    b_y = tl.load(transformed + start + o, mask=m, other=0.0).to(tl.float32)
    ratio, centred, inside = row_codes(b_y, tl.load(scale), 0.0, LOW, HIGH)
    terms = b_g * (centred - tl.where(inside, ratio, 0.0))
    # Columns first: that holds fewer values at a time. Rows are added outside, in a fixed order.
    tl.store(dscale + i, tl.sum(tl.sum(terms, axis=0), axis=0))
    b_g = tl.where(inside, b_g, 0.0).to(dx.dtype.element_ty)
    for c in range(0, BB, BC):
        o_c = c + tl.arange(0, BC)
        m_c = (o_a < A)[:, None] & (o_c < B)[None, :]
        o_d = o_a[:, None] * B + o_c[None, :]
        tl.store(dx + start + o_d, _transform(b_g, first, last, o_a, o_b, o_c, A, B), mask=m_c)


def takes(x: Tensor) -> bool:
    """Return whether the kernels take rows of this size and type: two axes in 16 bits, a tile a program."""
    n = x.shape[-1]
    return x.dtype in (torch.bfloat16, torch.float16) and len(kernel_axes(n)) == 2 and fits(n, x.dtype)


def forward_triton(
    x_RN: Tensor, scale: Tensor, low: int, high: int, sizes: Mapping[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the transform of contiguous rows on the grid of a float32 scale, and the transform itself.

    `sizes`: of the launch, others than those of `launch_sizes`.
    """
    transformed, y = torch.empty_like(x_RN), torch.empty_like(x_RN)
    sizes = sizes or launch_sizes(x_RN.shape[1])
    matrices = _matrices(x_RN, transposed=False)
    _hadamard_forward_kernel[(len(x_RN),)](x_RN, *matrices, scale, transformed, y, LOW=low, HIGH=high, **sizes)
    return y, transformed


def backward_triton(
    grad_RN: Tensor,
    transformed_RN: Tensor,
    scale: Tensor,
    low: int,
    high: int,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients for x and the scale.

    `sizes`: as in `forward_triton`.
    """
    dx = torch.empty_like(transformed_RN)
    dscale = torch.empty(len(dx), dtype=torch.float32, device=dx.device)
    sizes = sizes or launch_sizes(dx.shape[1])
    matrices = _matrices(dx, transposed=True)
    _hadamard_backward_kernel[(len(dx),)](
        grad_RN, transformed_RN, *matrices, scale, dx, dscale, LOW=low, HIGH=high, **sizes
    )
    return dx, dscale.sum()


def launch_sizes(n: int) -> dict[str, int]:
    """Return the constants of a launch on rows of n values, and its number of warps and stages."""
    axes = kernel_axes(n)
    block_a, block_b = padded(n)
    sizes = {"A": math.prod(axes[0]), "B": math.prod(axes[1]), "BA": block_a, "BB": block_b}
    # What a program makes at a time fits its registers, beside its row.
    return sizes | {"BC": min(128, block_b), "num_warps": 8 if block_a * block_b >= 8192 else 4, "num_stages": 1}


def _matrices(x_RN: Tensor, *, transposed: bool) -> list[Tensor]:
    """Return the matrices of both axes, the first one as the left operand."""
    return [
        hadamard_matrix(axis, x_RN.dtype, x_RN.device, transposed=turned)
        for axis, turned in zip(kernel_axes(x_RN.shape[1]), (not transposed, transposed), strict=True)
    ]
