"""Attention over a 4-bit KV cache in Triton.

B batch, H key-value heads, G queries a head, T tokens, S places, C channels.
A head's C channels are two halves, the low and the high nibbles of its bytes; so they are in the rotary embedding.
"""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixquant.kernels.hadamard.reference import hadamard_axes, hadamard_matrix
from prefixquant.kernels.overlap import launch_flags, wait_for_inputs
from prefixquant.kernels.rounding import codes_of

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

SPLIT_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
"""Without fusion, which would leave the rotary embedding's products unrounded before they are added."""


def _unpacking(kind: str, one: str, base: str, offset: str) -> tl.constexpr:
    """Return PTX that turns four bytes into eight codes of a 16-bit type: `base` is a power of two plus 8 whose last
    bits count by one, `offset` its negative, each twice in a word."""
    return tl.constexpr(
        f"""{{
        .reg .b32 a, b, c, d, u, v;
        mov.b32 u, {one};
        mov.b32 v, {offset};
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        lop3.b32 a, a, 0x000F000F, {base}, 0x6A;
        lop3.b32 b, b, 0x000F000F, {base}, 0x6A;
        lop3.b32 c, c, 0x000F000F, {base}, 0x6A;
        lop3.b32 d, d, 0x000F000F, {base}, 0x6A;
        fma.rn.{kind}x2 $0, a, u, v;
        fma.rn.{kind}x2 $1, b, u, v;
        fma.rn.{kind}x2 $2, c, u, v;
        fma.rn.{kind}x2 $3, d, u, v;
        }}"""
    )


_TO_BFLOAT16 = _unpacking("bf16", one="0x3F803F80", base="0x43084308", offset="0xC308C308")
_TO_FLOAT16 = _unpacking("f16", one="0x3C003C00", base="0x64086408", offset="0xE408E408")


@triton.jit
def _halves(packed, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return the codes in the low and in the high nibbles of bytes, as values of a type.

    In 16 bits, nibble ^ 8 set into the last bits of 128 (bfloat16) or 1024 (float16) is that number + 8 + code: two
    codes take an instruction to place and one to subtract, where conversions would take more time than the products.
    """
    if ASM and dtype != tl.float32:
        lo, hi = tl.inline_asm_elementwise(
            _TO_BFLOAT16 if dtype == tl.bfloat16 else _TO_FLOAT16,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        lo, hi = lo.to(dtype, bitcast=True), hi.to(dtype, bitcast=True)
    else:
        signed = packed.to(tl.int8, bitcast=True)
        lo, hi = ((signed << 4) >> 4).to(dtype), (signed >> 4).to(dtype)
    return lo, hi


@triton.jit
def split_kernel(
    x,
    channel_scale,
    query_gain,
    key_gain,
    cos,
    sin,
    matrix,
    key_scale,
    value_scale,
    place,
    query,
    keys,
    values,
    T,
    S,
    eps,
    s_cb,
    s_ct,
    HQ: tl.constexpr,
    H: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    HADAMARD: tl.constexpr,
    OVERLAP: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
):
    """Take BT tokens of one head of x [B, T, (HQ + 2 H) C]: a query's, a key's or a value's, in this order."""
    HALF: tl.constexpr = C // 2
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    o_c = tl.arange(0, HALF)
    if HADAMARD:  # fixed, so it may be read before the inputs are there
        p_h = matrix + o_c[:, None] * C + o_c[None, :]
        h_ll, h_hl, h_lh, h_hh = (
            tl.load(p_h),
            tl.load(p_h + HALF * C),
            tl.load(p_h + HALF),
            tl.load(p_h + HALF * C + HALF),
        )
    wait_for_inputs(OVERLAP)
    m_t = o_t < T
    m = m_t[:, None] & (o_c < HALF)[None, :]
    dtype = x.dtype.element_ty
    p_x = x + (i_b * T + o_t[:, None]) * ((HQ + 2 * H) * C) + i_h * C + o_c[None, :]
    b_lo, b_hi = tl.load(p_x, mask=m, other=0.0), tl.load(p_x + HALF, mask=m, other=0.0)
    if SCALED:
        p_s = channel_scale + i_h * C + o_c
        b_lo = (b_lo.to(tl.float32) * tl.load(p_s)[None, :]).to(dtype)
        b_hi = (b_hi.to(tl.float32) * tl.load(p_s + HALF)[None, :]).to(dtype)
    if i_h < HQ + H:  # a query or a key
        if NORM:
            lo, hi = b_lo.to(tl.float32), b_hi.to(tl.float32)
            rms = tl.rsqrt((tl.sum(lo * lo, axis=1) + tl.sum(hi * hi, axis=1)) / C + eps)[:, None]
            gain = tl.where(i_h < HQ, query_gain, key_gain) + o_c
            b_lo = (lo * rms * tl.load(gain).to(tl.float32)[None, :]).to(dtype)
            b_hi = (hi * rms * tl.load(gain + HALF).to(tl.float32)[None, :]).to(dtype)
        o_r = i_b * s_cb + o_t[:, None] * s_ct + o_c[None, :]
        b_cos, b_sin = tl.load(cos + o_r, mask=m, other=0.0), tl.load(sin + o_r, mask=m, other=0.0)
        # products and sum are rounded one by one, as the unfused model rounds them
        new = (b_lo * b_cos).to(dtype) + (-b_hi * b_sin).to(dtype)
        b_hi = (b_hi * b_cos).to(dtype) + (b_lo * b_sin).to(dtype)
        b_lo = new
        if HADAMARD:
            low = tl.dot(b_lo, h_ll, input_precision="ieee")
            low = tl.dot(b_hi, h_hl, low, input_precision="ieee")
            high = tl.dot(b_lo, h_lh, input_precision="ieee")
            high = tl.dot(b_hi, h_hh, high, input_precision="ieee")
            b_lo, b_hi = low.to(dtype), high.to(dtype)
    if i_h < HQ:
        p_q = query + ((i_b * HQ + i_h) * T + o_t[:, None]) * C + o_c[None, :]
        tl.store(p_q, b_lo, mask=m)
        tl.store(p_q + HALF, b_hi, mask=m)
    else:
        is_key = i_h < HQ + H
        i_kv = tl.where(is_key, i_h - HQ, i_h - HQ - H)
        b_s = tl.load(tl.where(is_key, key_scale, value_scale) + i_kv)
        lo = codes_of(b_lo.to(tl.float32), b_s, -8, 7).to(tl.int32) & 15
        hi = codes_of(b_hi.to(tl.float32), b_s, -8, 7).to(tl.int32) & 15
        byte = lo | (hi << 4)
        o_s = tl.load(place) + o_t
        p_y = tl.where(is_key, keys, values) + (i_b * H + i_kv) * S * HALF + o_s[:, None] * HALF + o_c[None, :]
        tl.store(p_y, byte.to(tl.uint8), mask=m & (o_s < S)[:, None])


@triton.jit
def dequantize_kernel(packed, scale, prefix, y, L, S, P, H: tl.constexpr, C: tl.constexpr, BT: tl.constexpr):
    """Write the prefix and BT places of one head's L filled ones as values: y [B, H, P + L, C]."""
    HALF: tl.constexpr = C // 2
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    o_c = tl.arange(0, HALF)
    i_h = i_bh % H
    is_prefix = (o_t < P)[:, None] & (o_c < HALF)[None, :]
    is_filled = ((o_t >= P) & (o_t < P + L))[:, None] & (o_c < HALF)[None, :]
    b = tl.load(packed + (i_bh * S + o_t[:, None] - P) * HALF + o_c[None, :], mask=is_filled, other=0)
    b = b.to(tl.int8, bitcast=True)
    b_s = tl.load(scale + i_h)
    p_p = prefix + (i_h * P + o_t[:, None]) * C + o_c[None, :]
    dtype = y.dtype.element_ty
    lo = tl.where(is_filled, (((b << 4) >> 4).to(tl.float32) * b_s).to(dtype), tl.load(p_p, mask=is_prefix, other=0.0))
    hi = tl.where(is_filled, ((b >> 4).to(tl.float32) * b_s).to(dtype), tl.load(p_p + HALF, mask=is_prefix, other=0.0))
    p_y = y + (i_bh * (P + L) + o_t[:, None]) * C + o_c[None, :]
    tl.store(p_y, lo, mask=is_prefix | is_filled)
    tl.store(p_y + HALF, hi, mask=is_prefix | is_filled)


@triton.jit
def _absorb(scores, top, total, acc_lo, acc_hi, v_lo, v_hi):
    # One step of the online softmax (arXiv:1805.02867); a row that has seen nothing keeps a top of -inf.
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(weights, axis=1)
    weights = weights.to(v_lo.dtype)
    acc_lo = tl.dot(weights, v_lo, acc_lo * shrink[:, None], input_precision="ieee")
    acc_hi = tl.dot(weights, v_hi, acc_hi * shrink[:, None], input_precision="ieee")
    return new_top, total, acc_lo, acc_hi


@triton.jit
def attention_kernel(
    query,
    keys,
    values,
    key_scale,
    value_scale,
    length,
    start,
    prefix_keys,
    prefix_values,
    y,
    tops,
    totals,
    T,
    H,
    S,
    P,
    scaling,
    SPLITS: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    STARTS: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Let BM rows (tokens times the G queries of a head) see one of SPLITS parts of the cache.

    y [SPLITS, B, T, H, G, C] holds a part's output divided by its own sum, `tops` and `totals` its softmax state.
    """
    HALF: tl.constexpr = C // 2
    wait_for_inputs(OVERLAP)
    i_m, i_bh, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    o_m = i_m * BM + tl.arange(0, BM)
    o_c = tl.arange(0, HALF)
    m_m = o_m < T * G
    i_t, i_g = o_m // G, o_m % G
    p_q = query + ((i_b * H * G + i_h * G + i_g[:, None]) * T + i_t[:, None]) * C + o_c[None, :]
    q_lo = tl.load(p_q, mask=m_m[:, None], other=0.0)
    q_hi = tl.load(p_q + HALF, mask=m_m[:, None], other=0.0)
    end = tl.load(length)
    row = end - T + i_t  # the place of each row's token
    unit = scaling * 1.4426950408889634  # exponentials are powers of two
    top = tl.full((BM,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    acc_lo = tl.zeros((BM, HALF), dtype=tl.float32)
    acc_hi = tl.zeros((BM, HALF), dtype=tl.float32)
    b_vs = tl.load(value_scale + i_h)
    if i_s == 0:
        o_p = tl.arange(0, BP)
        m_p = (o_p < P)[:, None]
        o_kv = (i_h * P + o_p[:, None]) * C + o_c[None, :]
        k_lo = tl.load(prefix_keys + o_kv, mask=m_p, other=0.0).to(q_lo.dtype)
        k_hi = tl.load(prefix_keys + o_kv + HALF, mask=m_p, other=0.0).to(q_lo.dtype)
        scores = tl.dot(q_lo, tl.trans(k_lo), input_precision="ieee")
        scores = tl.dot(q_hi, tl.trans(k_hi), scores, input_precision="ieee") * unit
        scores = tl.where((o_p < P)[None, :], scores, -float("inf"))
        v_lo = tl.load(prefix_values + o_kv, mask=m_p, other=0.0).to(q_lo.dtype)
        v_hi = tl.load(prefix_values + o_kv + HALF, mask=m_p, other=0.0).to(q_lo.dtype)
        top, total, acc_lo, acc_hi = _absorb(scores, top, total, acc_lo, acc_hi, v_lo, v_hi)
        acc_lo, acc_hi = acc_lo / b_vs, acc_hi / b_vs  # what follows is counted in codes
    b_ks = tl.load(key_scale + i_h) * unit
    first = tl.load(start + i_b) if STARTS else 0
    last = tl.minimum(end, end - T + tl.minimum(i_m * BM + BM - 1, T * G - 1) // G + 1)
    part = tl.cdiv(tl.cdiv(end, SPLITS), BN) * BN
    begin = tl.maximum(i_s * part, first // BN * BN)
    o_n = tl.arange(0, BN)
    base = (i_b * H + i_h) * S * HALF
    for n in range(begin, tl.minimum(last, i_s * part + part), BN):
        m_n = (n + o_n < last)[:, None]
        o_kv = base + (n + o_n[:, None]).to(tl.int64) * HALF + o_c[None, :]
        k_lo, k_hi = _halves(tl.load(keys + o_kv, mask=m_n, other=0), q_lo.dtype, ASM)
        scores = tl.dot(q_lo, tl.trans(k_lo), input_precision="ieee")
        scores = tl.dot(q_hi, tl.trans(k_hi), scores, input_precision="ieee") * b_ks
        seen = (n + o_n[None, :] <= row[:, None]) & (n + o_n[None, :] >= first)
        scores = tl.where(seen, scores, -float("inf"))
        v_lo, v_hi = _halves(tl.load(values + o_kv, mask=m_n, other=0), q_lo.dtype, ASM)
        top, total, acc_lo, acc_hi = _absorb(scores, top, total, acc_lo, acc_hi, v_lo, v_hi)
    norm = b_vs / tl.where(total == 0.0, 1.0, total)
    batch = tl.num_programs(1) // H
    o_row = ((i_s * batch + i_b) * T + i_t) * (H * G) + i_h * G + i_g
    p_y = y + o_row[:, None] * C + o_c[None, :]
    tl.store(p_y, (acc_lo * norm[:, None]).to(y.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_y + HALF, (acc_hi * norm[:, None]).to(y.dtype.element_ty), mask=m_m[:, None])
    if SPLITS > 1:
        tl.store(tops + o_row, top, mask=m_m)
        tl.store(totals + o_row, total, mask=m_m)


@triton.jit
def combine_kernel(
    parts,
    tops,
    totals,
    scale,
    y,
    ROWS,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
    C: tl.constexpr,
    QUANTIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
    DTYPE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Add one row's parts [SPLITS, ROWS, C], each weighted by its share of the softmax; QUANTIZE: write its codes."""
    wait_for_inputs(OVERLAP)
    i = tl.program_id(0).to(tl.int64)
    o_s, o_c = tl.arange(0, BS), tl.arange(0, C)
    m = o_s < SPLITS
    top = tl.load(tops + o_s * ROWS + i, mask=m, other=-float("inf"))
    best = tl.max(top, axis=0)
    best = tl.where(best == -float("inf"), 0.0, best)
    share = tl.exp2(top - best) * tl.load(totals + o_s * ROWS + i, mask=m, other=0.0)
    total = tl.sum(share, axis=0)
    share /= tl.where(total == 0.0, 1.0, total)
    b_y = tl.load(parts + (o_s[:, None] * ROWS + i) * C + o_c[None, :], mask=m[:, None], other=0.0)
    b_y = tl.sum(b_y * share[:, None], axis=0).to(DTYPE)
    if QUANTIZE:
        b_y = codes_of(b_y.to(tl.float32), tl.load(scale), LOW, HIGH)
    tl.store(y + i * C + o_c, b_y.to(y.dtype.element_ty))


def split_triton(
    x: Tensor,
    channel_scale: Tensor | None,
    gains: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    hadamard: bool,
    scales: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    place: Tensor,
) -> Tensor:
    """Do on x [B, T, (HQ + 2 H) C], contiguous, what the reference does."""
    batch, tokens, width = x.shape
    _, kv_heads, places, half = caches[0].shape
    channels = 2 * half
    heads = width // channels - 2 * kv_heads
    query = torch.empty(batch, heads, tokens, channels, dtype=x.dtype, device=x.device)
    (axis,) = hadamard_axes(channels) if hadamard else ((),)
    matrix = hadamard_matrix(axis, x.dtype, x.device) if hadamard else x
    block = 16 if tokens <= 16 else 64
    split_kernel[(triton.cdiv(tokens, block), heads + 2 * kv_heads, batch)](
        x,
        x if channel_scale is None else channel_scale,
        *(gains or (x, x)),
        cos,
        sin,
        matrix,
        *scales,
        place,
        query,
        *caches,
        tokens,
        places,
        eps,
        *cos.expand(batch, -1, -1).stride()[:2],
        HQ=heads,
        H=kv_heads,
        SCALED=channel_scale is not None,
        NORM=gains is not None,
        HADAMARD=hadamard,
        C=channels,
        BT=block,
        **launch_flags(x, batch * tokens),
        **SPLIT_LAUNCH,
    )
    return query


def dequantize_triton(packed: Tensor, scale: Tensor, prefix: Tensor | None, length: int, dtype: torch.dtype) -> Tensor:
    """Return the prefix [H, P, C] and `length` filled places of a cache [B, H, S, C / 2] as values [B, H, P + L, C]."""
    batch, heads, places, half = packed.shape
    count = 0 if prefix is None else prefix.shape[1]
    y = torch.empty(batch, heads, count + length, 2 * half, dtype=dtype, device=packed.device)
    dequantize_kernel[(triton.cdiv(count + length, 64), batch * heads)](
        packed,
        scale,
        y if prefix is None else prefix,
        y,
        length,
        places,
        count,
        H=heads,
        C=2 * half,
        BT=64,
        num_warps=4,
    )
    return y


def attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: Tensor,
    start: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    scaling: float,
    splits: int,
    out_scale: Tensor | None = None,
    out_bits: int = 4,
    launch: dict[str, int] | None = None,
    asm: bool = True,
) -> Tensor:
    """Do what the reference does, the cache cut into `splits` parts; query [B, H G, T, C], contiguous.

    With `out_scale`, which takes two splits or more, the result is int8 codes.
    """
    batch, heads, tokens, channels = query.shape
    kv_heads, places = keys.shape[1:3]
    groups = heads // kv_heads
    rows = tokens * groups
    block = max(16, min(64 if channels > 64 else 128, triton.next_power_of_2(rows)))
    out = query.dtype if out_scale is None else torch.int8
    y = torch.empty(batch, tokens, heads, channels, dtype=out, device=query.device)
    parts = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=y.device)
    state = torch.empty(2, splits, *y.shape[:-1], dtype=torch.float32, device=y.device) if splits > 1 else parts
    count = 0 if prefix is None else prefix[0].shape[1]
    attention_kernel[(triton.cdiv(rows, block), batch * kv_heads, splits)](
        query,
        keys,
        values,
        key_scale,
        value_scale,
        length,
        length if start is None else start,
        query if prefix is None else prefix[0],
        query if prefix is None else prefix[1],
        parts,
        state[0],
        state[1] if splits > 1 else state,
        tokens,
        kv_heads,
        places,
        count,
        scaling,
        SPLITS=splits,
        G=groups,
        C=channels,
        BM=block,
        BP=max(16, triton.next_power_of_2(count)),
        STARTS=start is not None,
        ASM=asm,
        **launch_flags(query, batch * tokens),
        **(launch or {"BN": 64, "num_warps": 4, "num_stages": 3}),
    )
    if splits > 1:
        total = batch * tokens * heads
        combine_kernel[(total,)](
            parts,
            state[0],
            state[1],
            state if out_scale is None else out_scale,
            y,
            total,
            SPLITS=splits,
            BS=triton.next_power_of_2(splits),
            C=channels,
            QUANTIZE=out_scale is not None,
            **launch_flags(query, batch * tokens),
            DTYPE=_TYPES[query.dtype],
            LOW=-(2 ** (out_bits - 1)),
            HIGH=2 ** (out_bits - 1) - 1,
        )
    return y
