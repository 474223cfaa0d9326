"""Products of codes in Triton. x [M, K], weight [N, K] or packed [N, K / 2], y [M, N]."""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _dot(a, b, acc, INTEGER: tl.constexpr, BK: tl.constexpr):
    if INTEGER:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        # Hopper's fp8 tensor cores add with 14 significant bits until the sum moves to float32 registers. 128 products
        # of 4-bit codes sum to at most 2^13, so moving it that often keeps the sum exact. (Not at all would take Triton
        # off the fp8 tensor cores.)
        tl.static_assert(BK <= 128)
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=BK)
    return acc


@triton.jit
def _as(codes, dtype: tl.constexpr):
    return codes.to(tl.float16).to(dtype) if dtype == tl.float8e4nv else codes.to(dtype)


@triton.jit
def linear_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    y,
    M,
    N,
    K,
    PACKED: tl.constexpr,
    INTEGER: tl.constexpr,
    X_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one tile [BM, BN]; X_SCALE: 0 none, 1 one for all rows, 2 one a row; GROUP: rows of tiles in turn."""
    i = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = i // (GROUP * tiles_n) * GROUP  # tiles that run together share rows and columns in the L2 cache
    height = tl.minimum(tiles_m - first, GROUP)
    i_m = first + i % (GROUP * tiles_n) % height
    i_n = i % (GROUP * tiles_n) // height
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    o_k = tl.arange(0, BK)
    half = K // 2
    width = half if PACKED else K
    p_x = x + o_m.to(tl.int64)[:, None] * K
    p_w = weight + o_n.to(tl.int64)[None, :] * width
    acc = tl.zeros((BM, BN), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(0, width, BK):
        m_k = o_k + k < width
        b_w = tl.load(p_w + (o_k + k)[:, None], mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_x = tl.load(p_x + (o_k + k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if PACKED:
            b_s = b_w.to(tl.int8, bitcast=True)
            acc = _dot(b_x, _as((b_s << 4) >> 4, b_x.dtype), acc, INTEGER, BK)
            b_x = tl.load(p_x + (half + o_k + k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            acc = _dot(b_x, _as(b_s >> 4, b_x.dtype), acc, INTEGER, BK)
        else:
            acc = _dot(b_x, b_w, acc, INTEGER, BK)
    b_y = acc.to(tl.float32)
    if X_SCALE == 1:
        b_y *= tl.load(x_scale)
    if X_SCALE == 2:
        b_y *= tl.load(x_scale + o_m, mask=m_m, other=0.0)[:, None]
    b_y *= tl.load(weight_scale + o_n, mask=m_n, other=0.0)[None, :]
    if BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + o_m.to(tl.int64)[:, None] * N + o_n[None, :],
        b_y.to(y.dtype.element_ty),
        mask=m_m[:, None] & m_n[None, :],
    )


def tiling(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile and launch sizes for a number of rows of x, of a type."""
    if dtype == torch.float32:  # without tensor cores
        return {"BM": 16 if rows <= 16 else 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    if rows <= 16:
        return {"BM": 16, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        return {"BM": 64, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4}


def linear_triton(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Do on x [M, K], contiguous, what the reference does."""
    rows, columns, outputs = *x.shape, weight.shape[0]
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    tile = tiling(rows, x.dtype)
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(outputs, tile["BN"]),)
    linear_kernel[grid](
        x,
        weight_scale if x_scale is None else x_scale,
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        y,
        rows,
        outputs,
        columns,
        PACKED=weight.dtype == torch.uint8,
        INTEGER=x.dtype == torch.int8,
        X_SCALE=0 if x_scale is None else 1 if x_scale.numel() == 1 else 2,
        BIAS=bias is not None,
        GROUP=8,
        **tile,
    )
    return y
