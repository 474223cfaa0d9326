"""Keys and values as packed 4-bit codes, and attention over them behind a full-precision prefix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.kernels.dispatch import VALUE_TYPES_TEXT, call, takes_values, uses_triton
from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.quantize import quantize

from .reference import attention_reference, split_reference

__all__ = ["kv_attention", "split_heads"]

FLASH_TOKENS = 128
"""Queries from which on dequantizing the whole cache for flash attention pays."""


def split_heads(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    scales: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    place: Tensor,
    *,
    hadamard: bool,
    channel_scale: Tensor | None = None,
    gains: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Return the queries in x, and write its keys and values into the caches, as codes, at `place` and after.

    Queries and keys pass the rotary embedding (arXiv:2104.09864, equation 34), then perhaps the Hadamard transform of
    a head (R3).

    Args:
        x: [B, T, (heads + 2 H) C], contiguous, float32, bfloat16 or float16, or float64 where the reference runs:
            queries, keys and values side by side.
        cos: [B or 1, T, C] of x's type, both halves of the last axis equal, as transformers computes them.
        sin: likewise.
        scales: of keys and of values, float32 [H], a scale a head.
        caches: of keys and of values, uint8 [B, H, S, C / 2] (`kernels.int4`). What lies past their end is dropped.
        place: int32 [1], on the device, so that a CUDA graph need not know it.
        hadamard: apply R3.
        channel_scale: float32 [(heads + 2 H) C] that x is multiplied by first (`kernels.gemm.quantized_products`).
        gains: of an RMSNorm over each query head and over each key head, [C] of x's type, before the rotary embedding.
        eps: of these norms.

    Returns:
        [B, heads, T, C] of x's type.

    Raises:
        KernelInputError: types, shapes, strides or devices do not fit.
    """
    if not takes_values(x, x.dtype) or x.ndim != 3 or not x.is_contiguous():
        raise KernelInputError(
            f"split_heads needs contiguous [B, T, channels] in {VALUE_TYPES_TEXT}, got {tuple(x.shape)} {x.dtype} with "
            f"strides {x.stride()}"
        )
    batch, tokens, width = x.shape
    if caches[0].ndim != 4 or caches[0].shape != caches[1].shape:
        raise KernelInputError(
            f"caches must be alike, [{batch}, heads, places, C / 2], got {tuple(caches[0].shape)} and "
            f"{tuple(caches[1].shape)}"
        )
    kv_heads, channels = caches[0].shape[1], 2 * caches[0].shape[3]
    if not _has_heads(channels, x) or width % channels or width // channels <= 2 * kv_heads:
        raise KernelInputError(
            f"split_heads needs heads of 32, 64 or 128 channels (on the CPU 16 as well), more than {2 * kv_heads} of "
            f"them, got {width} channels and caches {tuple(caches[0].shape)}"
        )
    for packed, scale in zip(caches, scales, strict=True):
        _check_cache(packed, batch, kv_heads, channels)
        _check_vector("scales", scale, kv_heads, torch.float32)
        _check_devices(x, cache=packed, scale=scale)
    for table in (cos, sin):
        if (
            table.ndim != 3
            or table.shape[0] not in (1, batch)
            or table.shape[1:] != (tokens, channels)
            or table.dtype != x.dtype
            or table.stride(-1) != 1
            or (table.shape, table.stride()) != (cos.shape, cos.stride())
        ):
            raise KernelInputError(
                f"cos and sin must be alike, [{batch} or 1, {tokens}, {channels}] {x.dtype}, got "
                f"{tuple(table.shape)} {table.dtype} with strides {table.stride()}"
            )
    if channel_scale is not None:
        _check_vector("channel_scale", channel_scale, width, torch.float32)
    for gain in gains or ():
        _check_vector("gains", gain, channels, x.dtype)
        _check_devices(x, gain=gain)
    _check_vector("place", place, 1, torch.int32)
    _check_devices(x, cos=cos, sin=sin, place=place, channel_scale=channel_scale)
    first, second = gains or (None, None)
    y: Tensor = call(_split_heads, x, channel_scale, first, second, eps, cos, sin, hadamard, *scales, *caches, place)
    return y


@torch.library.custom_op("prefixquant::split_heads", mutates_args=("keys", "values"))
def _split_heads(
    x: Tensor,
    channel_scale: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    hadamard: bool,
    key_scale: Tensor,
    value_scale: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
) -> Tensor:
    gains = None if query_gain is None or key_gain is None else (query_gain, key_gain)
    arguments = (x, channel_scale, gains, eps, cos, sin, hadamard, (key_scale, value_scale), (keys, values), place)
    if not uses_triton(x):
        return split_reference(*arguments)
    from .kernel import split_triton

    with torch.cuda.device(x.device):  # Triton launches on the current device
        return split_triton(*arguments)


@_split_heads.register_fake
def _(
    x: Tensor,
    channel_scale: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    hadamard: bool,
    key_scale: Tensor,
    value_scale: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
) -> Tensor:
    channels = 2 * keys.shape[3]
    return x.new_empty(x.shape[0], x.shape[2] // channels - 2 * keys.shape[1], x.shape[1], channels)


def kv_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: Tensor,
    *,
    scaling: float,
    start: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    splits: int = 1,
    filled: int | None = None,
    out_scale: Tensor | None = None,
    out_bits: int = 4,
) -> Tensor:
    """Return causal attention [B, T, heads, C] of the last T tokens over a cache of 4-bit keys and values.

    softmax(scaling * q [K_prefix, s_k k]^T) [V_prefix, s_v v]; every query sees the prefix, and of the cache the places
    from `start` to its own. A query before its `start` (padding) sees the prefix alone.

    Args:
        query: [B, heads, T, C], contiguous, float32, bfloat16 or float16, or float64 where the reference runs; C 32,
            64 or 128 (on the CPU 16 as well).
        keys: uint8 [B, H, S, C / 2] (`kernels.int4`), those of the T tokens included; heads a multiple of H.
        values: likewise.
        key_scale: float32 [H].
        value_scale: likewise.
        length: int32 [1]: filled places, on the device; the queries are those of the last T.
        scaling: what scores are multiplied by.
        start: int32 [B], the first place of each sequence, or None: 0.
        prefix: keys and values [H, P, C] in full precision, of the query's type.
        splits: parts of the cache seen by programs of their own; more than 1 helps where B H is small.
        filled: what `length` holds, if the host knows it. Long prompts without padding then take a dequantized copy
            of the cache through PyTorch's flash attention, which is faster than unpacking tile by tile.
        out_scale: float32 scalar; the result is then quantized by it: int8 codes.
        out_bits: of these codes.

    Raises:
        KernelInputError: types, shapes, strides or devices do not fit.
    """
    if not takes_values(query, query.dtype) or query.ndim != 4 or not query.is_contiguous():
        raise KernelInputError(
            f"kv_attention needs a contiguous query [B, heads, T, C] in {VALUE_TYPES_TEXT}, got {tuple(query.shape)} "
            f"{query.dtype} with strides {query.stride()}"
        )
    batch, heads, tokens, channels = query.shape
    kv_heads = keys.shape[1] if keys.ndim == 4 else 0
    if not _has_heads(channels, query) or not kv_heads or heads % kv_heads or keys.shape != values.shape:
        raise KernelInputError(
            f"kv_attention needs heads of 32, 64 or 128 channels (on the CPU 16 as well) and keys and values alike, "
            f"their heads dividing the query's; got query {tuple(query.shape)}, keys {tuple(keys.shape)}, values "
            f"{tuple(values.shape)}"
        )
    for packed in (keys, values):
        _check_cache(packed, batch, kv_heads, channels)
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        _check_vector(name, scale, kv_heads, torch.float32)
    _check_vector("length", length, 1, torch.int32)
    if start is not None:
        _check_vector("start", start, batch, torch.int32)
    if tokens > keys.shape[2]:
        raise KernelInputError(f"the cache has {keys.shape[2]} places, fewer than the {tokens} queries")
    for part in prefix or ():
        if part.ndim != 3 or part.shape[::2] != (kv_heads, channels) or part.dtype != query.dtype:
            raise KernelInputError(
                f"prefix must be [{kv_heads}, P, {channels}] {query.dtype}, got {tuple(part.shape)} {part.dtype}"
            )
        if not part.is_contiguous():
            raise KernelInputError("the prefix must be contiguous")
        _check_devices(query, prefix=part)
    if prefix is not None and prefix[0].shape != prefix[1].shape:
        raise KernelInputError(
            f"the prefix needs as many keys as values, got {tuple(prefix[0].shape)} and {tuple(prefix[1].shape)}"
        )
    if splits < 1:
        raise KernelInputError(f"splits must be at least 1, got {splits}")
    if out_scale is not None and (out_scale.shape != () or out_scale.dtype != torch.float32 or out_bits not in (4, 8)):
        raise KernelInputError(
            f"out_scale must be a float32 scalar and out_bits 4 or 8, got {tuple(out_scale.shape)} {out_scale.dtype} "
            f"and {out_bits}"
        )
    if filled is not None and not tokens <= filled <= keys.shape[2]:
        raise KernelInputError(f"filled must lie between {tokens} and {keys.shape[2]}, got {filled}")
    _check_devices(
        query,
        keys=keys,
        values=values,
        key_scale=key_scale,
        value_scale=value_scale,
        length=length,
        start=start,
        out_scale=out_scale,
    )
    first, second = prefix or (None, None)
    y: Tensor = call(
        _kv_attention,
        query,
        keys,
        values,
        key_scale,
        value_scale,
        length,
        start,
        first,
        second,
        scaling,
        splits,
        filled,
        out_scale,
        out_bits,
    )
    return y


@torch.library.custom_op("prefixquant::kv_attention", mutates_args=())
def _kv_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: Tensor,
    start: Tensor | None,
    prefix_keys: Tensor | None,
    prefix_values: Tensor | None,
    scaling: float,
    splits: int,
    filled: int | None,
    out_scale: Tensor | None,
    out_bits: int,
) -> Tensor:
    prefix = None if prefix_keys is None or prefix_values is None else (prefix_keys, prefix_values)
    arguments = (query, keys, values, key_scale, value_scale, length, start, prefix, scaling)
    if not uses_triton(query):
        y = attention_reference(*arguments).contiguous()
    elif query.shape[2] >= FLASH_TOKENS and filled is not None and start is None and query.dtype != torch.float32:
        y = _flash(query, (keys, values), (key_scale, value_scale), filled, prefix, scaling)
    else:
        from .kernel import attention_triton

        fused = out_scale is not None and splits > 1
        with torch.cuda.device(query.device):
            y = attention_triton(*arguments, splits, out_scale if fused else None, out_bits)
        if fused:
            return y
    if out_scale is None:
        return y
    codes, _ = quantize(y.flatten(2), out_scale, bits=out_bits, layout="int8")
    return codes.view(y.shape)


def _flash(
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    filled: int,
    prefix: tuple[Tensor, Tensor] | None,
    scaling: float,
) -> Tensor:
    from .kernel import dequantize_triton

    with torch.cuda.device(query.device):
        key, value = (
            dequantize_triton(cache, scale, None if prefix is None else prefix[index], filled, query.dtype)
            for index, (cache, scale) in enumerate(zip(caches, scales, strict=True))
        )
    batch, heads, tokens, channels = query.shape
    lead = key.shape[2] - tokens
    if filled > tokens:
        # Its causal mask is aligned to the last query and the last key, which is what a cache asks for.
        y = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)[0]
        return y.transpose(1, 2).contiguous()
    # Queries in front of those there are, one for each token of the prefix, make the plain causal mask right, which
    # PyTorch's fastest kernels know.
    led = query.new_empty(batch, lead + tokens, heads, channels)
    led[:, :lead] = 0
    led[:, lead:] = query.transpose(1, 2)
    y = F.scaled_dot_product_attention(
        led.transpose(1, 2), key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] < heads
    )
    return y.transpose(1, 2)[:, lead:].contiguous()


@_kv_attention.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: Tensor,
    start: Tensor | None,
    prefix_keys: Tensor | None,
    prefix_values: Tensor | None,
    scaling: float,
    splits: int,
    filled: int | None,
    out_scale: Tensor | None,
    out_bits: int,
) -> Tensor:
    batch, heads, tokens, channels = query.shape
    return query.new_empty(batch, tokens, heads, channels, dtype=query.dtype if out_scale is None else torch.int8)


def _has_heads(channels: int, x: Tensor) -> bool:
    """Return whether heads so large run where x is: tensor cores add at least 16 products, half a head's."""
    return channels in (32, 64, 128) or (channels == 16 and not x.is_cuda)


def _check_cache(packed: Tensor, batch: int, heads: int, channels: int) -> None:
    wanted = (batch, heads, channels // 2)
    if packed.dtype != torch.uint8 or (*packed.shape[:2], packed.shape[-1]) != wanted or not packed.is_contiguous():
        raise KernelInputError(
            f"a cache must be contiguous uint8 [{batch}, {heads}, places, {channels // 2}], got {tuple(packed.shape)} "
            f"{packed.dtype}"
        )


def _check_vector(name: str, value: Tensor, count: int, dtype: torch.dtype) -> None:
    if value.dtype != dtype or value.shape != (count,) or not value.is_contiguous():
        raise KernelInputError(
            f"{name} must be contiguous {str(dtype).removeprefix('torch.')} [{count}], got {tuple(value.shape)} "
            f"{value.dtype} with strides {value.stride()}"
        )


def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    for name, each in others.items():
        if each is not None and each.device != x.device:
            raise KernelInputError(f"one device is needed, got {x.device} and {name} on {each.device}")
