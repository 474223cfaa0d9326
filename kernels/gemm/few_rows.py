"""Products of packed 4-bit weights with few rows of int8 codes, bound by reading the weights.

x [M, K] int8, weight packed [N, K / 2], y [M, N]. A word is four bytes: eight weights, or four codes of x.

Nibbles are used as n ^ 8 = code + 8, which is not negative, so that four unpack by two instructions; what that adds,
8 times the sum of a row of x, is taken off at the end. All sums are integers and exact.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixquant.kernels.overlap import launch_flags, wait_for_inputs
from prefixquant.kernels.workspace import zeros

PROGRAMS = 264
"""Programs that a large GPU runs at once, at least."""

MAX_TILES = 1024
"""Tiles that are split at most; with more there is no need to."""

VECTOR_TILE = {"BN": 4, "BW": 256, "num_warps": 2}
"""Block and launch sizes of `vector_kernel`: on an H100, in a chain of overlapping launches, within 0.3 us of the best
of each layer of a Llama-3-8B block."""


@triton.jit
def _add_products(words, x_lo, x_hi, total, ASM: tl.constexpr):
    """Return total + the products of eight weights with eight codes, elementwise."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 lo, hi;
            lop3.b32 lo, $1, 0x0F0F0F0F, 0x08080808, 0x6A;
            shr.u32 hi, $1, 4;
            lop3.b32 hi, hi, 0x0F0F0F0F, 0x08080808, 0x6A;
            dp4a.u32.s32 lo, lo, $2, $4;
            dp4a.u32.s32 $0, hi, $3, lo;
            }""",
            "=r,r,r,r,r",
            [words, x_lo, x_hi, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    for byte in tl.static_range(4):
        nibbles = (words >> (8 * byte)) & 255
        total += ((nibbles & 15) ^ 8) * ((x_lo << (24 - 8 * byte)) >> 24)
        total += ((nibbles >> 4) ^ 8) * ((x_hi << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def _add_codes(x_lo, x_hi, total, ASM: tl.constexpr):
    """Return total + the sum of eight codes, elementwise."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            dp4a.s32.s32 t, $1, 0x01010101, $3;
            dp4a.s32.s32 $0, $2, 0x01010101, t;
            }""",
            "=r,r,r,r",
            [x_lo, x_hi, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    for byte in tl.static_range(4):
        total += (x_lo << (24 - 8 * byte)) >> 24
        total += (x_hi << (24 - 8 * byte)) >> 24
    return total


@triton.jit
def vector_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    added,
    y,
    N,
    WORDS,
    X_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Multiply BN rows of WORDS words of the weight with one row of x [M, 2 WORDS], words as well."""
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    m_n = o_n < N
    p_w = weight + o_n.to(tl.int64)[:, None] * WORDS
    # Weights and what else is fixed may be read before the inputs are there.
    words = tl.load(p_w + o_w[None, :], mask=m_n[:, None] & (o_w < WORDS)[None, :], other=0)
    b_s = tl.load(weight_scale + o_n, mask=m_n, other=0.0)
    if BIAS:
        b_b = tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    p_x = x + i_m * 2 * WORDS
    b_xs = tl.load(x_scale) if X_SCALE == 1 else tl.load(x_scale + i_m)
    if ADDED:
        b_a = tl.load(added + i_m * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    total = tl.zeros((BN, BW), dtype=tl.int32)
    codes = tl.zeros((BW,), dtype=tl.int32)
    for k in range(0, WORDS, BW):
        o_k = o_w + k
        x_lo = tl.load(p_x + o_k, mask=o_k < WORDS, other=0)
        x_hi = tl.load(p_x + WORDS + o_k, mask=o_k < WORDS, other=0)
        o_k += BW
        following = tl.load(p_w + o_k[None, :], mask=m_n[:, None] & (o_k < WORDS)[None, :], other=0)
        total = _add_products(words, x_lo[None, :], x_hi[None, :], total, ASM)
        codes = _add_codes(x_lo, x_hi, codes, ASM)
        words = following
    b_y = (tl.sum(total, axis=1) - 8 * tl.sum(codes, axis=0)).to(tl.float32) * b_xs * b_s
    if BIAS:
        b_y += b_b
    b_y = b_y.to(y.dtype.element_ty)
    if ADDED:
        b_y = (b_y.to(tl.float32) + b_a).to(b_y.dtype)
    tl.store(y + i_m * N + o_n, b_y, mask=m_n)


@triton.jit
def _nibbles(packed, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return code + 8 of the low or high nibbles of bytes, as int8."""
    if ASM and HIGH:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; lop3.b32 $0, t, 0x0F0F0F0F, 0x08080808, 0x6A; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x0F0F0F0F, 0x08080808, 0x6A;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return (((packed >> 4) & 15 if HIGH else packed & 15) ^ 8).to(tl.int8)


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    added,
    y,
    sums,
    arrived,
    M,
    N,
    HALF,
    X_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute y^T [BN, BM]: the weight is the first operand, which tensor cores take from registers.

    SPLITS programs share a tile, each a part of K. They add what they have to `sums`, and the last to arrive finishes
    the tile and leaves `sums` and `arrived` as it found them: zero.
    """
    i_m, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # neighbours share their part of the weight
    o_n, o_m = i_n * BN + tl.arange(0, BN), i_m * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_n, m_m = o_n < N, o_m < M
    p_w = weight + o_n.to(tl.int64)[:, None] * HALF
    b_s = tl.load(weight_scale + o_n, mask=m_n, other=0.0)[:, None]
    if BIAS:
        b_b = tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    wait_for_inputs(OVERLAP)
    b_xs = tl.load(x_scale) if X_SCALE == 1 else tl.load(x_scale + o_m, mask=m_m, other=0.0)[None, :]
    p_x = x + o_m.to(tl.int64)[None, :] * (2 * HALF)
    total = tl.zeros((BN, BM), dtype=tl.int32)
    codes = tl.zeros((BM,), dtype=tl.int32)
    part = tl.cdiv(tl.cdiv(HALF, BK), SPLITS) * BK
    for k in range(i_s * part, tl.minimum(HALF, i_s * part + part), BK):
        m_k = o_k + k < HALF
        m_x = m_k[:, None] & m_m[None, :]
        packed = tl.load(p_w + (o_k + k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0)
        x_lo = tl.load(p_x + (o_k + k)[:, None], mask=m_x, other=0)
        x_hi = tl.load(p_x + (HALF + o_k + k)[:, None], mask=m_x, other=0)
        total = tl.dot(_nibbles(packed, False, ASM), x_lo, total, out_dtype=tl.int32)
        total = tl.dot(_nibbles(packed, True, ASM), x_hi, total, out_dtype=tl.int32)
        codes += tl.sum(x_lo.to(tl.int32) + x_hi.to(tl.int32), axis=0)
    total -= 8 * codes[None, :]
    last = True
    if SPLITS > 1:
        tile = i_n * tl.num_programs(0) + i_m
        p_s = sums + tile * (BN * BM) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.atomic_add(p_s, total, sem="relaxed")
        tl.debug_barrier()  # every warp of the program has added before the program counts as arrived
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = tl.load(p_s, cache_modifier=".cg")
            tl.store(p_s, tl.zeros((BN, BM), dtype=tl.int32))
            tl.store(arrived + tile, 0)
    if last:
        b_y = total.to(tl.float32) * b_xs * b_s
        if BIAS:
            b_y += b_b
        b_y = b_y.to(y.dtype.element_ty)
        o_y = o_m.to(tl.int64)[None, :] * N + o_n[:, None]
        m_y = m_m[None, :] & m_n[:, None]
        if ADDED:
            b_a = tl.load(added + o_y, mask=m_y, other=0.0).to(tl.float32)
            b_y = (b_y.to(tl.float32) + b_a).to(b_y.dtype)
        tl.store(y + o_y, b_y, mask=m_y)


def tiling(rows: int, outputs: int, half: int) -> dict[str, int]:
    """Return tile, splits and launch sizes of `rows_kernel`, as they measured best on an H100."""
    if rows <= 64:
        wide = outputs >= 16384
        block = 16 if rows <= 16 else 32 if rows <= 32 else 64
        tile = {"BN": 128 if wide and block == 64 else 64, "BM": block, "BK": 128 if wide or block > 16 else 256}
        tiles = triton.cdiv(outputs, tile["BN"])
        steps = triton.cdiv(half, tile["BK"])
        splits = 1 if tiles > PROGRAMS // 3 else max(1, min(PROGRAMS // tiles, steps // 4))
        return tile | {"SPLITS": splits, "num_warps": 4, "num_stages": 3}
    wide = rows > 256
    return {"BN": 256 if wide else 128, "BM": 128, "BK": 64, "SPLITS": 1, "num_warps": 8, "num_stages": 3}


def linear_few_rows(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    dtype: torch.dtype,
    tile: dict[str, int] | None = None,
    asm: bool = True,
) -> Tensor:
    """Do on int8 x [M, K], contiguous, and packed weights what the reference does."""
    rows, outputs, half = x.shape[0], *weight.shape
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    nothing = weight_scale
    flags = {
        "X_SCALE": 1 if x_scale.numel() == 1 else 2,
        "BIAS": bias is not None,
        "ADDED": added is not None,
        "ASM": asm,
    }
    shared = (weight_scale, nothing if bias is None else bias, nothing if added is None else added, y)
    if rows == 1 and half % 4 == 0 and tile is None:
        vector_kernel[(triton.cdiv(outputs, VECTOR_TILE["BN"]), rows)](
            x.view(torch.int32),
            x_scale,
            weight.view(torch.int32),
            *shared,
            outputs,
            half // 4,
            **VECTOR_TILE,
            **launch_flags(x, rows),
            **flags,
        )
        return y
    tile = tile or tiling(rows, outputs, half)
    grid = (triton.cdiv(rows, tile["BM"]), triton.cdiv(outputs, tile["BN"]), tile["SPLITS"])
    sums = arrived = x
    if tile["SPLITS"] > 1:
        size = grid[0] * grid[1] * tile["BM"] * tile["BN"]
        shared_zeros = zeros(x.device, size + MAX_TILES)
        sums, arrived = shared_zeros[:size], shared_zeros[size:]
    rows_kernel[grid](
        x,
        x_scale,
        weight.view(torch.int8),
        *shared,
        sums,
        arrived,
        rows,
        outputs,
        half,
        **launch_flags(x, rows),
        **flags,
        **tile,
    )
    return y
