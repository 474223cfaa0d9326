"""RMSNorm and quantization of a row of activations, or of any piece of them, in one program. M rows, K columns."""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixquant.kernels.overlap import launch_flags, wait_for_inputs
from prefixquant.kernels.quantize.reference import STORAGE
from prefixquant.kernels.rounding import codes_of

PIECE = 4096
"""Values of a program where rows do not matter."""


@triton.jit
def quantize_kernel(
    x,
    gain,
    scale,
    clip_ratio,
    codes,
    scales,
    K,
    stride,
    eps,
    NORM: tl.constexpr,
    DYNAMIC: tl.constexpr,
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one row or piece; BLOCK covers half of it, the halves being what an int4 byte holds one each of."""
    i = tl.program_id(0).to(tl.int64)
    half = K // 2
    o = tl.arange(0, BLOCK)
    m = o < half
    if NORM:  # fixed, so it may be read before the inputs are there
        g_lo = tl.load(gain + o, mask=m, other=0.0).to(tl.float32)
        g_hi = tl.load(gain + half + o, mask=m, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    row = x + i * stride
    b_lo = tl.load(row + o, mask=m, other=0.0).to(tl.float32)
    b_hi = tl.load(row + half + o, mask=m, other=0.0).to(tl.float32)
    if NORM:
        rms = tl.rsqrt((tl.sum(b_lo * b_lo, axis=0) + tl.sum(b_hi * b_hi, axis=0)) / K + eps)
        b_lo *= rms * g_lo
        b_hi *= rms * g_hi
        b_lo = b_lo.to(x.dtype.element_ty).to(tl.float32)  # rounded as the norm's output would be
        b_hi = b_hi.to(x.dtype.element_ty).to(tl.float32)
    if DYNAMIC:
        ratio = tl.load(clip_ratio)
        top = tl.maximum(tl.max(tl.abs(b_lo), axis=0), tl.max(tl.abs(b_hi), axis=0)) * ratio
        b_s = tl.maximum(tl.div_rn(2.0 * top, HIGH * 2.0 + 1.0), 1e-8)
        tl.store(scales + i, b_s)
    else:
        b_s = tl.load(scale)
    b_lo = codes_of(b_lo, b_s, LOW, HIGH)
    b_hi = codes_of(b_hi, b_s, LOW, HIGH)
    if PACKED:
        byte = (b_lo.to(tl.int32) & 15) | ((b_hi.to(tl.int32) & 15) << 4)
        tl.store(codes + i * half + o, byte.to(tl.uint8), mask=m)
    else:
        tl.store(codes + i * K + o, b_lo.to(codes.dtype.element_ty), mask=m)
        tl.store(codes + i * K + half + o, b_hi.to(codes.dtype.element_ty), mask=m)


def quantize_triton(
    x: Tensor,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    gain: Tensor | None,
    eps: float,
    bits: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Do on rows [M, K] with contiguous columns what the reference does."""
    shape, packed = x.shape, layout == "int4"
    if gain is None and scale is not None and not packed and x.is_contiguous() and x.numel() % PIECE == 0:
        x = x.view(-1, PIECE)  # value by value, so rows do not matter
    rows, columns = x.shape
    codes = torch.empty(rows, columns // 2 if packed else columns, dtype=STORAGE[layout], device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if scale is None else scale
    block = max(16, triton.next_power_of_2(columns // 2))
    quantize_kernel[(rows,)](
        x,
        x if gain is None else gain,
        scales,
        scales if clip_ratio is None else clip_ratio,
        codes,
        scales,
        columns,
        x.stride(0),
        eps,
        NORM=gain is not None,
        DYNAMIC=scale is None,
        PACKED=packed,
        LOW=-(2 ** (bits - 1)),
        HIGH=2 ** (bits - 1) - 1,
        BLOCK=block,
        **launch_flags(x, shape[0], brief=True),
        num_warps=min(8, max(1, block // 256)),
    )
    return codes if packed else codes.view(shape), scales
