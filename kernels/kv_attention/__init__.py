"""Keys and values as packed 4-bit codes, and attention over them behind a full-precision prefix."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from prefixquant.kernels.errors import KernelInputError

from .reference import attention_reference, pack_heads_reference, rotate_reference

__all__ = ["kv_attention", "rotate", "store_heads"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, hadamard: bool) -> Tensor:
    """Return x [B, H, T, C] after the rotary embedding (arXiv:2104.09864, equation 34), then perhaps x @ H_C (R3).

    cos and sin: [B or 1, T, C] of x's type, both halves of the last axis equal, as transformers computes them.

    Raises:
        KernelInputError: types, shapes or devices do not fit.
    """
    _check_heads(x, cos, sin, hadamard)
    y: Tensor = _rotate(x, cos, sin, hadamard)
    return y


@torch.library.custom_op("prefixquant::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, hadamard: bool) -> Tensor:
    if not _on_gpu(x):
        return rotate_reference(x, cos, sin, hadamard).contiguous()
    from .kernel import rotate_triton

    with torch.cuda.device(x.device):  # Triton launches on the current device
        return rotate_triton(x, cos, sin, hadamard)


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, hadamard: bool) -> Tensor:
    return x.new_empty(x.shape)


def store_heads(
    x: Tensor,
    scale: Tensor,
    packed: Tensor,
    place: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    hadamard: bool = False,
) -> None:
    """Quantize keys or values x [B, H, T, C] and write the codes into a cache at `place` and the places after.

    Keys pass the rotary embedding and R3 first, as in `rotate`.

    Args:
        x: float32, bfloat16 or float16, last axis contiguous.
        scale: float32 [H], a scale a head.
        packed: the cache, uint8 [B, H, S, C / 2] (`kernels.int4`). What would lie past its end is dropped.
        place: int32 [1], on the device, so that a CUDA graph need not know it.
        cos: as in `rotate`, or None: no rotary embedding.
        sin: likewise.
        hadamard: apply R3.

    Raises:
        KernelInputError: types, shapes or devices do not fit.
    """
    _check_heads(x, cos, sin, hadamard)
    batch, heads, _, channels = x.shape
    if scale.shape != (heads,) or scale.dtype != torch.float32:
        raise KernelInputError(f"scale must be float32 [{heads}], got {tuple(scale.shape)} {scale.dtype}")
    _check_cache(packed, batch, heads, channels)
    _check_counter(place, "place", 1)
    _check_devices(x, scale=scale, packed=packed, place=place)
    _store_heads(x, scale, packed, place, cos, sin, hadamard)


@torch.library.custom_op("prefixquant::store_heads", mutates_args=("packed",))
def _store_heads(
    x: Tensor,
    scale: Tensor,
    packed: Tensor,
    place: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    hadamard: bool,
) -> None:
    if _on_gpu(x):
        from .kernel import rotate_triton

        with torch.cuda.device(x.device):
            rotate_triton(x, cos, sin, hadamard, scale, packed, place)
        return
    if cos is not None and sin is not None:
        x = rotate_reference(x, cos, sin, hadamard)
    first = int(place)
    kept = packed[:, :, first : first + x.shape[2]]
    kept.copy_(pack_heads_reference(x, scale)[:, :, : kept.shape[2]])


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
) -> Tensor:
    """Return causal attention [B, T, heads, C] of the last T tokens over a cache of 4-bit keys and values.

    softmax(scaling * q [K_prefix, s_k k]^T) [V_prefix, s_v v]; every query sees the prefix, and of the cache the places
    from `start` to its own. A query before its `start` (padding) sees the prefix alone.

    Args:
        query: [B, heads, T, C], contiguous, float32, bfloat16 or float16; C 64 or 128.
        keys: uint8 [B, H, S, C / 2] (`kernels.int4`), those of the T tokens included; heads a multiple of H.
        values: likewise.
        key_scale: float32 [H].
        value_scale: likewise.
        length: int32 [1]: filled places, on the device; the queries are those of the last T.
        scaling: what scores are multiplied by.
        start: int32 [B], the first place of each sequence, or None: 0.
        prefix: keys and values [H, P, C] in full precision, of the query's type.
        splits: parts of the cache seen by programs of their own; more than 1 helps where B H is small.

    Raises:
        KernelInputError: types, shapes, strides or devices do not fit.
    """
    if query.dtype not in _TYPES or query.ndim != 4 or not query.is_contiguous():
        raise KernelInputError(
            f"kv_attention needs a contiguous query [B, heads, T, C] in float32, bfloat16 or float16, got "
            f"{tuple(query.shape)} {query.dtype} with strides {query.stride()}"
        )
    batch, heads, tokens, channels = query.shape
    kv_heads = keys.shape[1] if keys.ndim == 4 else 0
    if channels not in (16, 32, 64, 128) or not kv_heads or heads % kv_heads or keys.shape != values.shape:
        raise KernelInputError(
            f"kv_attention needs heads of 16, 32, 64 or 128 channels and keys and values alike, their heads dividing "
            f"the query's; got query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
        )
    for packed in (keys, values):
        _check_cache(packed, batch, kv_heads, channels)
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale.shape != (kv_heads,) or scale.dtype != torch.float32:
            raise KernelInputError(f"{name} must be float32 [{kv_heads}], got {tuple(scale.shape)} {scale.dtype}")
    _check_counter(length, "length", 1)
    if start is not None:
        _check_counter(start, "start", batch)
    if tokens > keys.shape[2]:
        raise KernelInputError(f"the cache has {keys.shape[2]} places, fewer than the {tokens} queries")
    for part in prefix or ():
        if part.ndim != 3 or part.shape[::2] != (kv_heads, channels) or part.dtype != query.dtype:
            raise KernelInputError(
                f"prefix must be [{kv_heads}, P, {channels}] {query.dtype}, got {tuple(part.shape)} {part.dtype}"
            )
        if not part.is_contiguous():
            raise KernelInputError("the prefix must be contiguous")
    if splits < 1:
        raise KernelInputError(f"splits must be at least 1, got {splits}")
    _check_devices(query, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale, length=length)
    first, second = prefix or (None, None)
    y: Tensor = _kv_attention(
        query, keys, values, key_scale, value_scale, length, start, first, second, scaling, splits
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
) -> Tensor:
    prefix = None if prefix_keys is None or prefix_values is None else (prefix_keys, prefix_values)
    if not _on_gpu(query):
        y = attention_reference(query, keys, values, key_scale, value_scale, length, start, prefix, scaling)
        return y.contiguous()
    from .kernel import attention_triton

    with torch.cuda.device(query.device):
        return attention_triton(query, keys, values, key_scale, value_scale, length, start, prefix, scaling, splits)


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
) -> Tensor:
    batch, heads, tokens, channels = query.shape
    return query.new_empty(batch, tokens, heads, channels)


def _check_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, hadamard: bool) -> None:
    if x.dtype not in _TYPES or x.ndim != 4 or x.shape[-1] % 2 or x.stride(-1) != 1:
        raise KernelInputError(
            f"heads must be [B, H, T, C] in float32, bfloat16 or float16, C even and contiguous, got {tuple(x.shape)} "
            f"{x.dtype} with strides {x.stride()}"
        )
    if (cos is None) != (sin is None) or (cos is None and hadamard):
        raise KernelInputError("the rotary embedding needs cos and sin, and R3 comes after it")
    batch, _, tokens, channels = x.shape
    for table in (cos, sin):
        if table is not None and (
            table.ndim != 3
            or table.shape[0] not in (1, batch)
            or table.shape[1:] != (tokens, channels)
            or table.dtype != x.dtype
            or table.stride(-1) != 1
        ):
            raise KernelInputError(
                f"cos and sin must be [{batch} or 1, {tokens}, {channels}] {x.dtype}, got {tuple(table.shape)} "
                f"{table.dtype}"
            )
    if cos is not None and sin is not None and cos.stride() != sin.stride():
        raise KernelInputError("cos and sin must have the same strides")
    if hadamard and channels not in (16, 32, 64, 128):
        raise KernelInputError(f"R3 takes heads of 16, 32, 64 or 128 channels here, got {channels}")
    if cos is not None and sin is not None:
        _check_devices(x, cos=cos, sin=sin)


def _check_cache(packed: Tensor, batch: int, heads: int, channels: int) -> None:
    wanted = (batch, heads, channels // 2)
    if packed.dtype != torch.uint8 or (*packed.shape[:2], packed.shape[-1]) != wanted or not packed.is_contiguous():
        raise KernelInputError(
            f"a cache must be contiguous uint8 [{batch}, {heads}, places, {channels // 2}], got {tuple(packed.shape)} "
            f"{packed.dtype}"
        )


def _check_counter(value: Tensor, name: str, count: int) -> None:
    if value.dtype != torch.int32 or value.shape != (count,):
        raise KernelInputError(f"{name} must be int32 [{count}], got {tuple(value.shape)} {value.dtype}")


def _check_devices(x: Tensor, **others: Tensor) -> None:
    for name, each in others.items():
        if each.device != x.device:
            raise KernelInputError(f"one device is needed, got {x.device} and {name} on {each.device}")


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
